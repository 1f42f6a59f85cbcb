"""The native kernels in use: larger shapes, same tokens as the portable bodies, many threads, and what happens without them."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from mythos_export import ops
from mythos_export.inspection import doctor
from runtimes import native_operators
from runtimes.errors import BackendError
from runtimes.runner import load

needs_library = pytest.mark.skipif(
    not native_operators.is_available(),
    reason="the native operators are not built; make native builds them, or says what is missing",
)
GENERATOR = torch.Generator().manual_seed(1)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def run_native(name: str, tensors: list[torch.Tensor], attributes: str) -> list[np.ndarray]:
    from test_operators import one_node_model

    operator = next(operator for operator in ops.OPERATORS if operator.name == name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(native_operators.LIBRARY))
    session = onnxruntime.InferenceSession(one_node_model(operator, tensors, attributes).SerializeToString(), options)
    return session.run(None, {i[0]: tensor.numpy() for i, tensor in zip(operator.inputs, tensors, strict=True)})


@needs_library
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "dim", "hidden"),
    [(1, 128, 8, 70, 33), (5, 3, 2, 17, 50), (512, 1, 1, 24, 9), (333, 128, 4, 40, 49), (64, 16, 2, 129, 97)],
)
def test_mixture_of_many_sizes(tokens: int, experts: int, top_k: int, dim: int, hidden: int) -> None:
    """One to 512 tokens, one to 128 experts, many of them without tokens; then every token to one expert."""
    tensors = [randn(1, tokens, dim), randn(dim, experts), randn(experts)]
    tensors += [randn(experts, 2 * hidden, dim) / dim**0.5, randn(experts, dim, hidden) / hidden**0.5]
    for crowded in (False, True):
        if crowded:
            tensors[2][0] = 1e4
        (y,) = run_native("MixtureOfExperts", tensors, f"top_k = {top_k}")
        expected = torch.ops.mythos.mixture_of_experts(*(tensor.double() for tensor in tensors), top_k)
        np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=2e-5)


@needs_library
@pytest.mark.parametrize(("lengths", "seq"), [([700, 3], 1), ([0], 200), ([130, 0, 64], 67)])
def test_attention_over_many_rows(lengths: list[int], seq: int) -> None:
    """Several blocks of rows and tiles of tokens, ragged, NaN in every dead row."""
    batch, heads, nope, half, value, rank = len(lengths), 5, 12, 4, 10, 20

    def rows_of(width: int) -> list[torch.Tensor]:
        past = randn(3, batch, max(lengths) + 9, width)
        for b, length in enumerate(lengths):
            past[:, b, length:] = float("nan")
        return [past, torch.tensor(lengths), torch.tensor(1)]

    cos, sin = randn(batch, seq, half), randn(batch, seq, half)
    tensors = [randn(batch, seq, heads * (nope + 2 * half)), randn(batch, seq, rank + 2 * half), torch.ones(rank)]
    tensors += [randn(heads, nope, rank) / 4, randn(heads, value, rank) / 4, cos, sin, *rows_of(rank + 2 * half)]
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    for got, expected in zip(
        run_native("LatentAttention", tensors, "scale = 0.2, epsilon = 1e-6"),
        torch.ops.mythos.latent_attention(*wide, 0.2, 1e-6),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=5e-5)
    kv_heads, group = 2, 3
    tensors = [randn(batch, seq, (kv_heads * group + 2 * kv_heads) * 2 * half), cos, sin]
    tensors += rows_of(4 * kv_heads * half)
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    for got, expected in zip(
        run_native(
            "GroupedQueryAttention", tensors, f"n_heads = {kv_heads * group}, n_kv_heads = {kv_heads}, scale = 0.2"
        ),
        torch.ops.mythos.grouped_query_attention(*wide, kv_heads * group, kv_heads, 0.2),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=5e-5)


@needs_library
@pytest.mark.parametrize("which", ["tiny_bundle", "fixed_bundle"])
def test_same_tokens_with_and_without(which: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(which)
    native, portable = load(bundle, native=True), load(bundle, native=False)
    assert native.native
    assert not portable.native
    prompts = ["ROMEO.\nBut soft", "O", "Enter HAMLET, and a long line of others who have nothing to say.\n" * 3]
    for prompt in prompts:
        assert native.generate(prompt, 64).complete().ids == portable.generate(prompt, 64).complete().ids
    assert native.generate(prompts, 32).complete().ids == portable.generate(prompts, 32).complete().ids


@needs_library
def test_two_threads_give_what_one_gives(tiny_bundle: Path) -> None:
    runners = [load(tiny_bundle, threads=2, native=True) for _ in range(2)]
    expected = runners[0].generate("KING.", 48).complete().ids
    results: list[list[int] | None] = [None] * 4

    def work(index: int) -> None:
        results[index] = runners[index % 2].generate("KING.", 48).complete().ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


@needs_library
def test_shapes_that_do_not_fit_are_an_error_not_a_crash() -> None:
    tensors = [randn(1, 2, 8), randn(8, 4), randn(4), randn(4, 6, 8), randn(4, 8, 5)]
    with pytest.raises(Exception, match="do not fit each other"):
        run_native("MixtureOfExperts", tensors, "top_k = 2")


def test_a_library_that_cannot_be_loaded(tiny_bundle: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    """Asked for, it is an error; by default the portable bodies run, and the reason is said once."""
    broken = tmp_path / "libmythos_ops.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native_operators, "LIBRARY", broken)
    with pytest.raises(BackendError, match="refuses it"):
        load(tiny_bundle, native=True)
    with caplog.at_level(logging.WARNING):
        runner = load(tiny_bundle)
        load(tiny_bundle)
    assert not runner.native
    assert sum("portable bodies run instead" in record.message for record in caplog.records) == 1
    assert len(runner.generate("O", 3).complete().ids) == 3
    assert "make native" in doctor()["missing"]["native operators"]
    assert doctor()["native_operators"] is None
    monkeypatch.setattr(native_operators, "LIBRARY", tmp_path / "nothing.so")
    assert not load(tiny_bundle).native
    with pytest.raises(BackendError, match="make native"):
        load(tiny_bundle, native=True)


NATIVE = Path(native_operators.__file__).parent / "native"
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def build(folder: Path, target: str, *options: str) -> None:
    """Builds a target of runtimes/native with the headers that `make native` found."""
    cache = NATIVE / "build" / platform.machine() / "CMakeCache.txt"
    if not cache.is_file():
        pytest.skip(f"needs the headers that make native finds, and there is no {cache}")
    headers = [line for line in cache.read_text().splitlines() if "_INCLUDE_DIR:PATH=" in line]
    for command in (
        [CMAKE, "-S", NATIVE, "-B", folder, *options, *(f"-D{line}" for line in headers)],
        [CMAKE, "--build", folder, "--target", target, "--parallel", "2"],
    ):
        run(*command)


def run(*command: object, fails: bool = False) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (result.returncode != 0) is fails, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stderr if fails else result.stdout


def architecture(path: Path) -> bytes:
    """The machine field of an ELF file."""
    return path.read_bytes()[18:20]


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    """Every operator and instruction set over random shapes on two threads."""
    build(tmp_path, "stress", f"-DMYTHOS_SANITIZE={sanitizers}")
    assert "scalar ok" in run(tmp_path / "stress")


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder configured for aarch64, all symbols resolved, with programs that qemu-user runs without that system."""
    if platform.machine() == "aarch64":
        pytest.skip("aarch64 is this machine: the other tests run its kernels as they are")
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("aarch64-linux-gnu-g++ is missing; make toolchains installs it, or says why it cannot")
    folder = tmp_path_factory.mktemp("aarch64")
    options = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    options += ["-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++", "-DCMAKE_MODULE_LINKER_FLAGS=-Wl,--no-undefined"]
    build(folder, "mythos_ops", *options)
    return folder


@needs_library
@pytest.mark.slow
def test_aarch64_library(aarch64: Path) -> None:
    """The whole library compiles, door to onnxruntime included; it cannot be put where this machine's library lies."""
    assert architecture(aarch64 / "libmythos_ops.so") == (183).to_bytes(2, "little")
    assert "does not belong in" in run(CMAKE, "--install", aarch64, "--prefix", NATIVE / "lib", fails=True)
    assert architecture(native_operators.LIBRARY) == architecture(Path(sys.executable).resolve())


@needs_library
@pytest.mark.slow
def test_aarch64_under_emulation(aarch64: Path) -> None:
    """The NEON kernels agree with the scalar ones."""
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("qemu-aarch64 is missing; make toolchains installs it, or says why it cannot")
    build(aarch64, "stress")
    assert "neon ok" in run(emulator, aarch64 / "stress")
