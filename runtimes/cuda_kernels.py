"""The CUDA kernels: a library of our own (runtimes/native/cuda), launched on a step's stream. Here those between TensorRT's plans.

Before TensorRT 10, float16 and bfloat16 experts are theirs: TensorRT 8.6 widens such stacks to float32 in memory. A launch
allocates nothing and waits for nothing, so that it is captured in a CUDA graph with the plans around it.

Shape letters: T tokens, D dim, K top_k, E routed and s shared experts, F expert_dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from runtimes import cuda
from runtimes.engines import Engine, ExpertsCall
from runtimes.errors import BackendError
from runtimes.native_library import is_checkout, library_path

LIBRARY = library_path("mythos_cuda")
_VERSION = 3  # of the library's interface
_DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_ADDRESSES = ("normed", "chosen", "weight", "gate_up_routed", "down_routed", "gate_up_shared", "down_shared", "mixed")
_SCALES = ("gate_up_routed_scales", "down_routed_scales", "gate_up_shared_scales", "down_shared_scales")
_open = ctypes.CDLL


class _Experts(ctypes.Structure):
    """mythos_cuda_experts of the library: normed [T, D] and weight [T, K] float32, chosen [T, K] int32, gate_up_routed [E, 2F, D],
    down_routed [E, D, F], gate_up_shared [s, 2F, D], down_shared [s, D, F] in dtype, mixed [T, D] float32. norm and residual, which
    a call between plans has none of, and the scales of quantized stacks stay null."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("tokens", "dim", "expert_dim", "top_k", "routed", "shared")),
        *((name, ctypes.c_int32) for name in ("scale_dtype", "block")),
        *((name, ctypes.c_void_p) for name in (*_ADDRESSES[:-1], *_SCALES, "norm")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("residual", "mixed", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
    )


def _of_call(call: ExpertsCall, tokens: int) -> _Experts:
    """A call without addresses."""
    sizes = {name: getattr(call, name) for name in ("dim", "expert_dim", "top_k", "routed", "shared")}
    return _Experts(size=ctypes.sizeof(_Experts), dtype=_DTYPES[call.dtype], tokens=tokens, **sizes)


class CudaKernels:
    """The loaded library."""

    def __init__(self, library: Any) -> None:
        self._library, self._error = library, library.mythos_cuda_error
        self._error.argtypes, self._error.restype = [ctypes.c_int32], ctypes.c_char_p
        self._experts_workspace = self.workspace_function("experts", _Experts)
        self._experts_launch = self.launch_function("experts", _Experts, "the experts")

    def workspace_function(self, name: str, kind: type[ctypes.Structure]) -> Callable[[Any], int]:
        """The one that says how many bytes of workspace a call of that struct needs; 0: it takes no such sizes. Raises
        AttributeError where the library lacks it."""
        function = getattr(self._library, f"mythos_cuda_{name}_workspace")
        function.argtypes, function.restype = [ctypes.POINTER(kind)], ctypes.c_uint64
        return lambda call: int(function(ctypes.byref(call)))

    def launch_function(self, name: str, kind: type[ctypes.Structure], what: str) -> Callable[[Any, cuda.Stream], None]:
        """The one that puts a call of that struct on a stream; it raises BackendError where CUDA refuses it. Raises AttributeError
        where the library lacks it."""
        function = getattr(self._library, f"mythos_cuda_{name}_launch")
        function.argtypes, function.restype = [ctypes.POINTER(kind), ctypes.c_void_p], ctypes.c_int32

        def launch(call: Any, stream: cuda.Stream) -> None:
            error = function(ctypes.byref(call), stream.handle)
            if error:
                raise BackendError(f"the CUDA kernels cannot run {what}: {self._error(error).decode()} (error {error})")

        return launch

    def workspace_bytes(self, engine: Engine) -> int:
        """Device memory that the engine's calls need for the largest steps of its profiles, one call at a time. Raises BackendError
        for sizes that the kernels do not take."""
        return max((self._bytes(call, _most_tokens(engine, call.form)) for call in engine.experts), default=0)

    def _bytes(self, call: ExpertsCall, tokens: int) -> int:
        size = self._experts_workspace(_of_call(call, tokens))
        if not size:
            raise BackendError(
                f"the CUDA kernels take no step of {tokens} tokens, {call.top_k} of {call.routed} and {call.shared} shared experts "
                "each; build the engine with a smaller --max-batch or --max-seq, or with --dtype float32"
            )
        return size

    def launch(self, experts: _Experts, stream: cuda.Stream) -> None:
        """Puts a call on a stream. Raises BackendError where CUDA refuses it."""
        self._experts_launch(experts, stream)


def _most_tokens(engine: Engine, form: str) -> int:
    plans = [plan for plan in engine.plans if plan.form == form]
    most = max(profile.tokens.max for plan in plans for profile in plan.profiles)
    return min([most, *(plan.max_tokens for plan in plans if plan.max_tokens is not None)])


class ExpertsPart:
    """A call as a part of a stage, to be set up and run as a plan's execution context is. workspace: device memory shared by all
    calls, as large as workspace_bytes says."""

    caches: tuple[int, ...] = ()  # it reads none

    def __init__(self, kernels: CudaKernels, call: ExpertsCall, workspace: cuda.DeviceBuffer) -> None:
        self._kernels, self.record = kernels, call
        self.file = f"the experts of {call.form}.{call.stage}.{call.part}"
        self._experts = _of_call(call, tokens=0)
        self._experts.workspace, self._experts.workspace_bytes = workspace.address, workspace.size
        self._fields = {getattr(call, field): field for field in _ADDRESSES if getattr(call, field) is not None}
        self.names = frozenset(self._fields)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Of an input, for launches to come: the tokens follow from it."""
        if name == self.record.normed:
            self._experts.tokens = shape[0]

    def set_address(self, name: str, address: int) -> None:
        """Of an input, output or weight, for launches to come; other names are ignored."""
        if name in self._fields:
            setattr(self._experts, self._fields[name], address)

    def enqueue(self, stream: cuda.Stream) -> None:
        """Puts the call on a stream."""
        self._kernels.launch(self._experts, stream)


@cache
def find() -> CudaKernels:
    """The library, loaded once. Raises BackendError, with what to do, where it is missing, cannot be loaded or has another
    version."""
    if not LIBRARY.is_file():
        raise BackendError(f"the CUDA kernels are missing: {LIBRARY} is not built; {remedy()}")
    try:
        library = _open(str(LIBRARY))
        library.mythos_cuda_version.restype = ctypes.c_uint32
        version = library.mythos_cuda_version()
        kernels = CudaKernels(library) if version == _VERSION else None
    except (OSError, AttributeError) as error:  # AttributeError: a function that it lacks
        raise BackendError(f"the CUDA kernels cannot be loaded: {error}; {remedy()}") from error
    if kernels is None:
        raise BackendError(
            f"the CUDA kernels in {LIBRARY} are of version {version}, this release uses {_VERSION}; {remedy()}"
        )
    return kernels


def problem() -> str | None:
    """Why the kernels cannot be used here, and what to do; None where they can."""
    try:
        find()
    except BackendError as error:
        return str(error)
    return None


def remedy() -> str:
    """How to get the library, or to do without."""
    return f"{build_remedy()}; or build engines of TensorRT before 10 with --dtype float32"


def build_remedy() -> str:
    """How to get the libraries for CUDA."""
    how = "run" if is_checkout() else "run mythos-export from its source, after"
    return f"{how}: make cuda (needs nvcc, of the CUDA toolkit)"
