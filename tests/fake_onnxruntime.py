"""An onnxruntime with a CUDA provider, made of the real one on the CPU and fake_cuda: sessions read and write the fake device's
memory, on their stream."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from fake_cuda import FakeCuda
from fake_cuda_kernels import FakeCudaKernels
from onnxruntime.capi import onnxruntime_pybind11_state as state

from runtimes import onnxruntime_cuda_session as target
from runtimes.bundle import open_bundle, rewrite_manifest
from runtimes.folder_writer import FileEntry, sha256_of

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def add_cuda_form(bundle: Path, name: str | None = "decoder.cuda.onnx") -> Path:
    """Gives a bundle a form for CUDA that the CPU runs as well: a copy of its graph; or none."""
    folder, manifest = open_bundle(bundle)
    (graph,), files = manifest.graphs, manifest.files
    if name is not None:
        (folder / name).write_bytes((folder / graph.file).read_bytes())
        files = files | {name: FileEntry((folder / name).stat().st_size, sha256_of(folder / name))}
    graphs = (msgspec.structs.replace(graph, cuda_file=name),)
    rewrite_manifest(folder, msgspec.structs.replace(manifest, files=files, graphs=graphs))
    return bundle


class FakeOptions:
    """SessionOptions or RunOptions that remember."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.libraries: list[str] = []
        self.add_session_config_entry = self.add_run_config_entry = self.entries.__setitem__
        self.register_custom_ops_library = self.libraries.append


class FakeOnnxRuntime:
    """Takes the place of the module. providers: those available; loaded: those that sessions get; host: inputs and outputs that
    graphs keep on the CPU; on_cpu: op types that fall there; fails: what fails, of "open", "graph" (opening for capture), "step",
    "capture". sessions: opened; shapes_run: B and S of each run."""

    __version__ = onnxruntime.__version__
    RunOptions = FakeOptions

    def __init__(self, cuda: FakeCuda, kernels: FakeCudaKernels) -> None:
        self.cuda, self.kernels = cuda, kernels
        self.providers = self.loaded = PROVIDERS
        self.host: set[str] = set()
        self.on_cpu: list[str] = []
        self.fails: set[str] = set()
        self.sessions: list[weakref.ref[FakeSession]] = []
        self.shapes_run: list[tuple[int, ...]] = []

    def get_available_providers(self) -> list[str]:
        return self.providers

    def preload_dlls(self) -> None:
        print("Failed to load libcublas.so.13")

    def InferenceSession(self, path: str, options: FakeOptions, *, providers: Any, enable_fallback: int) -> FakeSession:
        if "open" in self.fails:
            raise state.Fail("no kernel for LatentAttention")
        if "graph" in self.fails and "enable_cuda_graph" in providers[0][1]:
            raise state.Fail("the model has memcpy nodes")
        assert not enable_fallback
        assert options.libraries == [str(target.LIBRARY)]
        session = FakeSession(self, path, dict(providers[0][1]))
        self.sessions.append(weakref.ref(session))
        return session


class FakeSession:
    def __init__(self, module: FakeOnnxRuntime, path: str, provider: dict[str, str]) -> None:
        self.module, self.provider = module, provider
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.real = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = self.real.get_inputs, self.real.get_outputs
        weights = sum(file.stat().st_size for file in Path(path).parent.glob("*.bin"))
        (_, address) = module.cuda.cudaMalloc(weights)
        weakref.finalize(self, module.cuda.cudaFree, address)

    def get_providers(self) -> list[str]:
        return self.module.loaded

    def get_input_memory_infos(self) -> list[SimpleNamespace]:
        return [self._where(value.name) for value in self.get_inputs()]

    def get_output_memory_infos(self) -> list[SimpleNamespace]:
        return [self._where(value.name) for value in self.get_outputs()]

    def _where(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="Cpu" if name in self.module.host else "Cuda")

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        parts = [(PROVIDERS[1], op_type) for op_type in self.module.on_cpu] + [(PROVIDERS[0], "LatentAttention")]
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op)]) for name, op in parts
        ]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: FakeOptions) -> None:
        assert options.entries == {"disable_synchronize_execution_providers": "1", "gpu_graph_id": "-1"}
        module, stream = self.module, int(self.provider["user_compute_stream"])
        capturing = module.cuda.streams[stream].recording is not None
        assert not capturing or self.provider["enable_cuda_graph"] == "1"
        if "step" in module.fails or (capturing and "capture" in module.fails):
            raise state.Fail("it was told to fail")
        assert set(binding.inputs) == {value.name for value in self.get_inputs()}
        assert set(binding.outputs) == {value.name for value in self.get_outputs()}
        inputs, outputs = dict(binding.inputs), dict(binding.outputs)
        for name, (device, *_) in inputs.items():
            assert device == ("cpu" if name in module.host else "cuda")

        def run() -> None:
            feeds = {name: self._tensor(*bound).copy() for name, bound in inputs.items()}
            if "input_ids" in feeds:
                module.shapes_run.append(feeds["input_ids"].shape)
            names = list(outputs)
            for name, array in zip(names, self.real.run(names, feeds), strict=True):
                bound = self._tensor(*outputs[name])
                assert (bound.shape, bound.dtype) == (array.shape, array.dtype), name
                bound[...] = array

        module.cuda.put(stream, run)

    def _tensor(self, device: str, dtype: Any, shape: list[int], address: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.module.cuda.check(address, size, "device" if device == "cuda" else "host")
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)


class FakeBinding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: list[int], address: int) -> None:
        assert address % 256 == 0
        self.inputs[name] = (device, dtype, shape, address)

    def bind_output(self, name: str, device: str, index: int, dtype: Any, shape: list[int], address: int) -> None:
        self.outputs[name] = (device, dtype, shape, address)


def install_onnxruntime(monkeypatch: Any, cuda: FakeCuda, kernels: FakeCudaKernels) -> FakeOnnxRuntime:
    """Puts a fake onnxruntime where the CUDA backend takes the real one, and a file where its operators would be."""
    fake = FakeOnnxRuntime(cuda, kernels)
    monkeypatch.setattr(target, "onnxruntime", fake)
    monkeypatch.setattr(target, "LIBRARY", Path(__file__))
    monkeypatch.setattr(target, "session_options", lambda threads, native: FakeOptions())
    return fake
