"""A graph on onnxruntime's CUDA provider: what must be there, the session, tensors bound where they lie.

Shape letters: B batch, S new tokens, K positions with logits, C capacity and W width of the cache, V vocab_size.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime

from runtimes import cuda
from runtimes.backend import say_once
from runtimes.cuda_kernels import build_remedy
from runtimes.errors import BackendError
from runtimes.native_library import library_path
from runtimes.onnxruntime_backend import FAILURES, session_options

LIBRARY = library_path("mythos_ops_cuda")
_PROVIDER, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_OF_SHAPES = frozenset(("Add", "Concat", "Mul", "Reshape", "Shape", "Squeeze", "Sub", "Unsqueeze"))
_NOTHING: Mapping[str, str] = {}


class Bound(NamedTuple):
    """A tensor of a step. element_type: a numpy dtype, or the number of ONNX's data type where numpy has none."""

    name: str
    element_type: Any
    shape: tuple[int, ...]
    address: int
    on_host: bool = False


def check_installed() -> None:
    """Raises BackendError, with what to install or build, unless onnxruntime has the CUDA provider and its operators are built."""
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} has no {_PROVIDER}; run: pip uninstall onnxruntime, then: "
            "pip install --force-reinstall --no-deps onnxruntime-gpu (the same module, with the GPU)"
        )
    if not LIBRARY.is_file():
        raise BackendError(f"the operators for CUDA are missing: {LIBRARY} is not built; {build_remedy()}")


class CudaSession:
    """A session whose work goes onto one stream and which waits for nothing after a run. host_inputs, host_outputs: those that the
    graph reads and makes on the host. capture: whether runs are to be captured in a CUDA graph; obstacle: why they must not be,
    None where they may. Raises BackendError where onnxruntime refuses the file, the operators or the provider."""

    def __init__(self, path: Path, stream: cuda.Stream, threads: int | None, *, capture: bool) -> None:
        opened = _open_to_capture(path, stream, threads) if capture else (_open(path, stream, threads), None)
        self._session: Any = opened[0]
        self.obstacle: str | None = opened[1]
        self._stream = stream  # outlives the session, which comes first
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4  # what goes wrong is raised
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._options.add_run_config_entry(
            "gpu_graph_id", "-1"
        )  # it captures nothing itself: what follows a run is captured too
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs, self.outputs = ([value.name for value in values] for values in (inputs, outputs))
        self.host_inputs = _on_host(self.inputs, self._session.get_input_memory_infos())
        self.host_outputs = _on_host(self.outputs, self._session.get_output_memory_infos())
        _tell_what_fell_back(path, self._session)

    @property
    def session(self) -> Any:
        """onnxruntime's own."""
        return self._session

    def bind(self, inputs: list[Bound], outputs: list[Bound]) -> Any:
        """For run: where each tensor lies."""
        binding = self._session.io_binding()
        for bound in inputs:
            where = ("cpu" if bound.on_host else "cuda", 0)
            binding.bind_input(bound.name, *where, bound.element_type, list(bound.shape), bound.address)
        for bound in outputs:
            binding.bind_output(bound.name, "cuda", 0, bound.element_type, list(bound.shape), bound.address)
        return binding

    def run(self, binding: Any) -> None:
        """Puts the graph's work on the stream. Raises BackendError where it fails."""
        try:
            self._session.run_with_iobinding(binding, self._options)
        except FAILURES as error:
            raise BackendError(f"onnxruntime could not run a step on the GPU: {error}") from error


def _open_to_capture(path: Path, stream: cuda.Stream, threads: int | None) -> tuple[Any, str | None]:
    """A session whose runs can be captured; or one that works, and why they cannot be. Asked to capture, onnxruntime refuses graphs
    that copy from the host's memory, which is gone at a replay, and keeps what it would free while it is being captured."""
    try:
        return _open(path, stream, threads, {"enable_cuda_graph": "1"}), None
    except BackendError as error:
        return _open(path, stream, threads), str(error)


def _open(path: Path, stream: cuda.Stream, threads: int | None, more: Mapping[str, str] = _NOTHING) -> Any:
    options = session_options(threads or 1, native=False)
    # Else weights would come from the arena, which rounds and keeps what loading took.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    provider = {
        "device_id": "0",
        "user_compute_stream": str(stream.handle),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",
        **more,
    }
    preloading = io.StringIO()
    with contextlib.redirect_stdout(
        preloading
    ):  # it prints what it does not find, which only matters if the session fails
        onnxruntime.preload_dlls()
    try:
        options.register_custom_ops_library(str(LIBRARY))
        providers = [(_PROVIDER, provider), _CPU]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except FAILURES as error:
        raise BackendError(f"{path}: onnxruntime {onnxruntime.__version__} refuses it on the GPU: {error}") from error
    if _PROVIDER not in session.get_providers():
        found = " ".join(preloading.getvalue().split())
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} cannot load its {_PROVIDER}: {found or 'a library of CUDA is missing'}; "
            "run: pip install 'onnxruntime-gpu[cuda,cudnn]', or put CUDA's and cuDNN's lib folders on LD_LIBRARY_PATH"
        )
    return session


def _on_host(names: list[str], memory: Any) -> frozenset[str]:
    return frozenset(name for name, info in zip(names, memory, strict=True) if info.name != "Cuda")


def _tell_what_fell_back(path: Path, session: Any) -> None:
    """Says once which nodes do not run on the GPU, but for what shapes and loop numbers are computed with: that is the CPU's."""
    nodes = [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    fallen = Counter(op_type for provider, op_type in nodes if provider == _CPU and op_type not in _OF_SHAPES)
    if fallen:
        names = ", ".join(f"{count} {name}" for name, count in fallen.most_common())
        say_once(f"{path}: {fallen.total()} of {len(nodes)} nodes run on the CPU, not on the GPU: {names}")
