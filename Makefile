# Each target is all a fresh machine needs (python3 with venv): it makes .venv, installs what is missing, and runs.
PYTHON ?= python3
BIN := .venv/bin
# One build folder an architecture, for a checkout that several machines share.
NATIVE := runtimes/native/build/$(shell uname -m)
CPP := runtimes/cpp/build/$(shell uname -m)
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
# Newer pips want this name for what a build is made with; older ones do not know it.
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: venv native cuda cpp cpp-asan cpp-tsan cpp-fuzz cpp-aarch64 toolchains streaming long-context demo test lint clean

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[export,report,tensorrt-rtx,dev]'
	$(BIN)/pip install --quiet --no-deps open-mythos
	touch $@

# The operators' C++ kernels. Where this machine lacks something, it says what, and all else works without them; a library
# of older sources would not fit then, and goes.
native: venv
	@rm -f $(NATIVE)/not_built
	@$(BIN)/cmake -S runtimes/native -B $(NATIVE) -DCMAKE_INSTALL_PREFIX=$(CURDIR)/runtimes/native/lib >/dev/null \
		|| test -f $(NATIVE)/not_built
	@if test -f $(NATIVE)/not_built; then rm -f runtimes/native/lib/libmythos_ops.so; \
		else $(BIN)/cmake --build $(NATIVE) --target install --parallel 2 >/dev/null \
		&& echo "native operators built: runtimes/native/lib/libmythos_ops.so"; fi

# The CUDA kernels; onnxruntime's operators that call them, and the TensorRT plugins over them, where the headers of onnxruntime and
# of TensorRT 10 or later are found. For one GPU alone, in a fraction of the time: make cuda CUDA_ARCHITECTURES=87
CUDA_ARCHITECTURES :=
TENSORRT_ROOT :=
cuda: venv
	@command -v nvcc >/dev/null || { echo "nvcc is missing; install the CUDA toolkit and put its bin folder on the PATH"; exit 1; }
	@rm -f runtimes/native/lib/libmythos_ops_cuda.so
	@$(BIN)/cmake -S runtimes/native/cuda -B $(NATIVE)-cuda -DCMAKE_INSTALL_PREFIX=$(CURDIR)/runtimes/native/lib \
		$(if $(CUDA_ARCHITECTURES),-DMYTHOS_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)",-UMYTHOS_CUDA_ARCHITECTURES) \
		$(if $(TENSORRT_ROOT),-DTENSORRT_ROOT="$(TENSORRT_ROOT)",-UTENSORRT_ROOT) >/dev/null
	@$(BIN)/cmake --build $(NATIVE)-cuda --target install --parallel 2 >/dev/null \
		&& for library in runtimes/native/lib/lib*cuda.so; do echo "CUDA kernels built: $$library"; done

# The Runner in C and C++: an SDK in runtimes/cpp/sdk, and its tests.
cpp: toolchains native
	$(BIN)/cmake -S runtimes/cpp --preset release -B $(CPP)/release -DPYTHON=$(CURDIR)/$(BIN)/python >/dev/null
	$(BIN)/cmake --build $(CPP)/release --target install --parallel 2 >/dev/null
	$(BIN)/pytest tests/test_cpp*.py

# Minutes of the C++ tests under sanitizers, and of fuzzing, on the shipped checkpoint: what CI does for seconds.
SECONDS := 600
CPP_BUNDLE := $(CPP)/bundle
CPP_TESTS = MYTHOS_TEST_CPP_BUNDLE=$(CURDIR)/$(CPP_BUNDLE) MYTHOS_OPERATORS=$(CURDIR)/runtimes/native/lib/libmythos_ops.so

$(CPP_BUNDLE): | native
	$(BIN)/mythos-export export examples/shakespeare -o $@ --max-loops 12

cpp-asan: toolchains $(CPP_BUNDLE)
	$(call cpp_build,asan)
	$(CPP_TESTS) MYTHOS_TEST_OPENS=1000 $(CPP)/asan/tests/runtime_tests

cpp-tsan: toolchains $(CPP_BUNDLE)
	$(call cpp_build,tsan)
	$(CPP_TESTS) MYTHOS_TEST_SECONDS=$(SECONDS) TSAN_OPTIONS='halt_on_error=1 suppressions=$(CURDIR)/tests/cpp/races.supp' \
		$(CPP)/tsan/tests/runtime_tests --gtest_filter='Header*:Threads*'

cpp-fuzz: toolchains $(CPP_BUNDLE)
	@command -v clang++ >/dev/null || { echo "libFuzzer comes with clang, which is missing; install it (Debian: clang)"; exit 1; }
	$(call cpp_build,fuzz)
	@mkdir -p $(CPP)/corpus/files $(CPP)/corpus/calls
	for what in files calls; do $(CPP_TESTS) MYTHOS_TEST_SEEDS=$(CURDIR)/$(CPP)/corpus/files ASAN_OPTIONS=allocator_may_return_null=1 \
		$(CPP)/fuzz/fuzz/fuzz_$$what -max_total_time=$(SECONDS) -timeout=60 -max_len=20000 -dict=tests/cpp/fuzz/json.dict \
		-artifact_prefix=$(CPP)/corpus/ $(CPP)/corpus/$$what || exit 1; done

# Cross-compiled, and run under emulation.
cpp-aarch64: toolchains native
	MYTHOS_TEST_AARCH64=1 $(BIN)/pytest tests/test_cpp_aarch64.py

# What takes minutes and much disk: a checkpoint of GB gigabytes exported and quantized, and 100,000 tokens, with the memory they took.
GB := 3
TOKENS := 100000

streaming: venv
	$(BIN)/python tests/streaming.py $(GB)

long-context: venv native
	$(BIN)/python tests/long_context.py $(TOKENS) 4096
	$(BIN)/python tests/long_context.py $(TOKENS) 0

cpp_build = $(BIN)/cmake -S runtimes/cpp --preset $(1) -B $(CPP)/$(1) -DPYTHON=$(CURDIR)/$(BIN)/python >/dev/null \
	&& $(BIN)/cmake --build $(CPP)/$(1) --parallel 2 >/dev/null

# Compilers and libraries for the tests of C++, the cross compiler for aarch64 and qemu-user, for `test`; says why where they cannot be
# installed.
toolchains:
	@tests/native/toolchains.sh

demo: venv native
	$(BIN)/mythos-export demo

# A thread for each of the two processes: with more, torch's wait for each other, and it takes half as long again.
test: lint toolchains native
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal --durations 20

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv dist build runtimes/native/build runtimes/native/lib runtimes/cpp/build runtimes/cpp/sdk runtimes/cpp/sdk-aarch64 .pytest_cache .mypy_cache .ruff_cache .hypothesis
