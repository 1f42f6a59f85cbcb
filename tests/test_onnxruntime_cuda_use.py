"""onnxruntime's CUDA backend as it is asked for: what is missing is told, what runs where, and the commands on a GPU."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_cuda import cudaError_t
from fake_engine import add_engine
from fake_onnxruntime import FakeOnnxRuntime, add_cuda_form
from test_tensorrt_cli import call

from mythos_export.inspection import doctor
from runtimes import cuda, cuda_kernels, onnxruntime_cuda_session
from runtimes.errors import BackendError, InputError
from runtimes.runner import load


def no_provider(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.providers = ["CPUExecutionProvider"]


def no_operators(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnxruntime_cuda_session, "LIBRARY", bundle / "libmythos_ops_cuda.so")


def no_kernels(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda_kernels, "LIBRARY", bundle / "libmythos_cuda.so")


def old_kernels(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(gpu.kernels, "mythos_cuda_append_launch")


def no_module(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cuda._runtime.cache_clear()


def no_driver(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.cuda.problem = cudaError_t.cudaErrorInsufficientDriver


def no_cuda_libraries(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.loaded = ["CPUExecutionProvider"]


def refused(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.fails.add("open")


def cache_on_host(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.host.add("past_kv")


MISSING = [
    (no_provider, "has no CUDAExecutionProvider; run: pip uninstall onnxruntime, then: pip install .* onnxruntime-gpu"),
    (no_operators, "the operators for CUDA are missing: .*libmythos_ops_cuda.so is not built; run: make cuda"),
    (no_kernels, "the CUDA kernels are missing: .*libmythos_cuda.so is not built; run: make cuda"),
    (old_kernels, "the CUDA kernels cannot be used: .*mythos_cuda_append_launch.*; run: make cuda"),
    (no_module, "cuda.bindings.runtime cannot be imported.*pip install cuda-bindings"),
    (no_driver, "no GPU can be used: .*install or update the NVIDIA driver"),
    (no_cuda_libraries, "cannot load its CUDAExecutionProvider: Failed to load libcublas.*onnxruntime-gpu.cuda,cudnn"),
    (refused, "refuses it on the GPU: .*no kernel for LatentAttention"),
    (cache_on_host, "reads its cache on the CPU; export again"),
]


@pytest.mark.parametrize(("spoil", "reason"), MISSING)
def test_what_is_missing_is_told(
    gpu: FakeOnnxRuntime, fixed: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], reason: str
) -> None:
    """And nothing else runs in its place."""
    spoil(gpu, fixed, monkeypatch)
    cuda_kernels.find.cache_clear()
    for backend in ("onnxruntime", "auto"):
        with pytest.raises(BackendError, match=reason):
            load(fixed, backend, device="cuda")
    gc.collect()
    assert gpu.cuda.allocated == 0
    assert load(fixed).device == "cpu"


def test_what_runs_where(gpu: FakeOnnxRuntime, own_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_cuda_form(own_bundle, None)
    with pytest.raises(
        BackendError, match=r"has no graph for onnxruntime on CUDA: it was made before .*matrices of two"
    ):
        load(own_bundle, device="cuda")
    add_cuda_form(own_bundle)
    add_engine(own_bundle, few_tokens=None)
    for backend, device, expected in (
        ("auto", None, ("tensorrt", "cuda")),
        ("auto", "cuda", ("tensorrt", "cuda")),
        ("tensorrt", "cuda", ("tensorrt", "cuda")),
        ("onnxruntime", "cuda", ("onnxruntime", "cuda")),
        ("onnxruntime", None, ("onnxruntime", "cpu")),
        ("auto", "cpu", ("onnxruntime", "cpu")),
    ):
        with load(own_bundle, backend, device=device) as runner:
            assert (runner.backend, runner.device) == expected
    assert not caplog.records
    shutil.rmtree(own_bundle / "engines")
    assert load(own_bundle, device="cuda").backend == "onnxruntime"
    for options, reason in (
        ({"device": "gpu"}, 'device is "gpu"; expected one of cpu, cuda'),
        ({"backend": "tensorrt", "device": "cpu"}, "backend tensorrt runs on a GPU, device is cpu"),
        ({"device": "cpu", "engine": "x"}, "engine x is TensorRT's, device cpu uses none"),
        ({"device": "cuda", "native": False}, "on CUDA there are no portable bodies"),
    ):
        with pytest.raises((BackendError, InputError), match=reason):
            load(own_bundle, **options)


@pytest.mark.parametrize(
    ("graphs", "cache", "row_bytes"), [(True, "float32", 4 * 48), (False, "float32", 4 * 48), (True, "int8", 48 + 4)]
)
def test_attention_alone(
    gpu: FakeOnnxRuntime,
    fixed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    graphs: bool,
    cache: str,
    row_bytes: int,
) -> None:
    """Over caches in turn; all memory is given back."""
    monkeypatch.setattr("mythos_export.bandwidth._BYTES", 2**20)
    monkeypatch.setattr("mythos_export.bench_attention._OnDevice._BYTES", 100_000)
    gpu.fails = set() if graphs else {"graph"}
    command = ("bench", fixed, "--attention", "8,300", "-b", 2, "-r", 1, "--cache-dtype", cache, "--device", "cuda")
    code, out, err = call(monkeypatch, capsys, *command, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [row["bytes"] for row in report["rows"]] == [2 * 8 * row_bytes, 2 * 300 * row_bytes]
    assert (report["environment"]["device"], report["environment"]["batch"]) == ("Fake GPU", 2)
    assert bool(gpu.cuda.calls["cudaGraphLaunch"]) is graphs
    gc.collect()
    assert (gpu.cuda.allocated, gpu.cuda.graphs) == (0, {})
    assert "share of copy bandwidth" in call(monkeypatch, capsys, *command)[1]
    code, _, err = call(monkeypatch, capsys, *command, "-b", 0)
    assert code == 2
    assert "-b is 0; expected at" in err


def test_the_command_line(
    gpu: FakeOnnxRuntime, fixed: Path, shakespeare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("mythos_export.bandwidth._BYTES", 2**20)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 4)
    commands = {
        "generate": ("-p", "To be", "-n", 8),
        "eval": ("--text", tmp_path / "text.txt"),
        "verify": (shakespeare, "--tokens", 20),
        "bench": ("-p", 8, "-n", 4, "-r", 1),
    }
    results = {}
    for device in ("cpu", "cuda"):
        for name, options in commands.items():
            gpu.shapes_run.clear()
            code, out, err = call(monkeypatch, capsys, name, fixed, *options, "--device", device, "--json")
            assert code == 0, err
            assert bool(gpu.shapes_run) == (device == "cuda")
            results[name, device] = json.loads(out)
    assert results["generate", "cuda"]["ids"] == results["generate", "cpu"]["ids"]
    assert [results["bench", device]["environment"]["device"] for device in ("cpu", "cuda")] == [None, "Fake GPU"]
    assert json.loads((fixed / "manifest.json").read_text())["parity"] == {
        name: results["verify", "cpu"][name] for name in ("oracle", "tokens", "checks")
    }
    health = doctor()
    assert health["can"]["run on an NVIDIA GPU with onnxruntime"]
    gpu.providers = ["CPUExecutionProvider"]
    assert "onnxruntime-gpu" in doctor()["missing"]["run on an NVIDIA GPU with onnxruntime"]
