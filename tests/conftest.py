"""Bundles that many tests share, each exported once. What needs ../shared skips where that folder is not beside the checkout."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import cpp_sdk
import pytest
from c_runtime import Library
from fake_cuda import FakeCuda
from fake_cuda_kernels import install_kernels
from fake_engine import add_engine
from fake_onnxruntime import FakeOnnxRuntime, add_cuda_form, install_onnxruntime
from fake_tensorrt import FakeTensorRT

from runtimes import backend as backend_module
from runtimes import cuda, cuda_kernels, device_memory, tensorrt_api, tensorrt_plugins
from runtimes.errors import BackendError
from runtimes.runner import Runner, load

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    """Folder of the shipped checkpoint: 0.8 M parameters, 4 loops, 512 positions, 2048 tokens."""
    return ROOT / "examples" / "shakespeare"


@pytest.fixture(scope="session")
def tiny_bundle(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with a dynamic loop count of up to 12."""
    pytest.importorskip("torch", reason="needs torch to export a bundle; tests of the Runner alone do without")
    from mythos_export.export import export_bundle

    target = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(shakespeare, target, max_loops=12)
    return target


@pytest.fixture(scope="session")
def fixed_bundle(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with its 4 loops unrolled."""
    pytest.importorskip("torch", reason="needs torch to export a bundle")
    from mythos_export.export import export_bundle

    target = tmp_path_factory.mktemp("fixed") / "bundle"
    export_bundle(shakespeare, target, loops=4)
    return target


@pytest.fixture(scope="session")
def runner(tiny_bundle: Path) -> Runner:
    return load(tiny_bundle, threads=2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the trained checkpoints and texts."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip("needs ../shared (trained checkpoints and texts), which is not beside this checkout")
    return SHARED


def clear_caches() -> None:
    tensorrt_api.find.cache_clear()
    cuda._runtime.cache_clear()
    cuda_kernels.find.cache_clear()
    tensorrt_plugins.load.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> FakeTensorRT:
    """Puts a fake CUDA, TensorRT and CUDA kernels where the real ones are loaded from."""
    fake = FakeTensorRT(FakeCuda(), version)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake.cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(backend_module, "_said", set())
    clear_caches()
    fake.kernels = install_kernels(monkeypatch, fake.cuda)
    return fake


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """A fake of TensorRT 8.6, or of the version that is asked for."""
    yield install(monkeypatch, getattr(request, "param", "8.6.1"))
    gc.collect()
    clear_caches()


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to put engines into."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def engine(fake: FakeTensorRT, own_bundle: Path) -> Path:
    """An engine's folder, for TensorRT 8.6."""
    return add_engine(own_bundle)


def has_gpu() -> bool:
    """Whether the real modules can be used, whatever fakes stood in their place before."""
    clear_caches()
    try:
        cuda.device()
        tensorrt_api.find("tensorrt")
    except BackendError:
        return False
    return True


@pytest.fixture(scope="session")
def real_bundle() -> Path | None:
    """A bundle with a real engine, where it can run."""
    if not has_gpu():
        return None
    if "MYTHOS_TEST_BUNDLE" not in os.environ:
        pytest.skip("there is a GPU, but MYTHOS_TEST_BUNDLE names no bundle with an engine for it")
    return Path(os.environ["MYTHOS_TEST_BUNDLE"])


@pytest.fixture(params=["8.6.1", "10.3.0"])
def pair(
    real_bundle: Path | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Runner, Runner]]:
    """A bundle on an engine, of fakes of two versions (or once of the real thing, where there is a GPU), and on onnxruntime."""
    if real_bundle is None:
        bundle, fake = request.getfixturevalue("own_bundle"), install(monkeypatch, request.param)
        monkeypatch.setattr(device_memory, "BUCKET", 16)
        add_engine(bundle, version=fake.__version__, integers="int64" if fake.modern else "int32")
    elif request.param == "8.6.1":
        bundle = real_bundle
    else:
        pytest.skip("the version that is installed runs, once")
    with load(bundle, "tensorrt") as on_gpu:
        yield on_gpu, load(bundle, "onnxruntime", threads=2, native=False)
    clear_caches()


@pytest.fixture
def runner_on_fake(engine: Path, own_bundle: Path) -> Iterator[Runner]:
    with load(own_bundle, "tensorrt") as runner:
        yield runner


@pytest.fixture(scope="session")
def int4_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with int4 weights and an int8 cache."""
    from mythos_export.quantize import quantize_bundle

    target = tmp_path_factory.mktemp("int4") / "bundle"
    quantize_bundle(tiny_bundle, target, "int4,kv-int8")
    return target


@pytest.fixture(scope="session")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Runner in C and C++: the installed library and headers."""
    prefix = tmp_path_factory.mktemp("sdk")
    cpp_sdk.install_sdk(prefix)
    return prefix


@pytest.fixture(scope="session")
def library(sdk: Path) -> Library:
    return Library(next(sdk.glob("lib*/libmythos_runtime.so")))


@pytest.fixture
def gpu(fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    monkeypatch.setattr(device_memory, "BUCKET", 16)
    return install_onnxruntime(monkeypatch, fake.cuda, fake.kernels)


@pytest.fixture
def fixed(fixed_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with its 4 loops unrolled, with a form for CUDA."""
    return add_cuda_form(Path(shutil.copytree(fixed_bundle, tmp_path / "fixed")))


@pytest.fixture
def dynamic(own_bundle: Path) -> Path:
    return add_cuda_form(own_bundle)


@pytest.fixture
def runner_on_gpu(gpu: FakeOnnxRuntime, fixed: Path) -> Iterator[Runner]:
    with load(fixed, device="cuda") as runner:
        yield runner
