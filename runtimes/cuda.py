"""CUDA through cuda-python (cuda.bindings.runtime, 12.9 or 13), as little of it as the backends need.

Every call is checked: what fails raises BackendError with the call and CUDA's reason, a failed allocation OutOfDeviceMemory. The
first device is used; CUDA_VISIBLE_DEVICES chooses another. Sizes and pitches are bytes, addresses are integers.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtimes.errors import BackendError

ALIGNMENT = 256  # of every address TensorRT and the kernels are given
_PITCH_LIMIT = 2**31 - 1  # cudaDeviceProp.memPitch of all devices so far
_MODULE = "cuda.bindings.runtime"
_REMEDY = "pip install cuda-bindings"


class OutOfDeviceMemory(BackendError):
    """Device memory that is not there. needed, free: bytes."""

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class Device(NamedTuple):
    """The GPU. compute_capability: like "9.0". total_bytes: its memory. integrated: it shares the host's memory (Jetson)."""

    name: str
    compute_capability: str
    total_bytes: int
    integrated: bool


@cache
def _runtime() -> Any:
    """cuda.bindings.runtime. Raises BackendError, with what to install, where it cannot be imported."""
    try:
        return importlib.import_module(_MODULE)
    except (ImportError, OSError) as error:
        raise BackendError(f"the Python module {_MODULE} cannot be imported ({error}); {_REMEDY}") from error


def _call(name: str, *args: Any) -> Any:
    """Calls a function of the CUDA runtime and returns its result, if it has one."""
    runtime = _runtime()
    error, *results = getattr(runtime, name)(*args)
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendError(f"{name} failed: {_reason(error)}")
    return results[0] if len(results) == 1 else tuple(results)


def _reason(error: Any) -> str:
    text = _runtime().cudaGetErrorString(error)[1]
    return f"{text.decode() if isinstance(text, bytes) else text} ({error.name})"


def device() -> Device:
    """The GPU in use. Raises BackendError where there is none: no driver, too old a one, no device."""
    try:
        _call("cudaGetDeviceCount")
        properties = _call("cudaGetDeviceProperties", 0)
    except BackendError as error:
        raise BackendError(f"no GPU can be used: {error}; install or update the NVIDIA driver") from error
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(
        name.rstrip("\0"),
        f"{properties.major}.{properties.minor}",
        int(properties.totalGlobalMem),
        bool(properties.integrated),
    )


def pci_bus_id() -> str:
    """Where the GPU in use sits, which is how other tools of NVIDIA's name it: "0000:01:00.0"."""
    found = _call("cudaDeviceGetPCIBusId", 32, 0)
    return (found.decode() if isinstance(found, bytes) else str(found)).rstrip("\0")


def free_bytes() -> int:
    """Device memory that can be allocated. Where host and device share it, what the system can free for it counts as well."""
    free, _ = _call("cudaMemGetInfo")
    if not device().integrated:
        return int(free)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return max(int(free), int(line.split()[1]) * 1024)
    return int(free)


class _Owned:
    """Something of CUDA's that close() gives back; so does the garbage collector."""

    def __init__(self, give_back: Callable[..., Any], *args: Any) -> None:
        self._finalizer = weakref.finalize(self, give_back, *args)

    def close(self) -> None:
        """Gives it back; may be called again."""
        self._finalizer()


class DeviceBuffer(_Owned):
    """Device memory of size bytes at address, 256-byte aligned. what: for the error message. Freeing it waits for all work on the
    device. Raises OutOfDeviceMemory."""

    def __init__(self, size: int, what: str) -> None:
        runtime = _runtime()
        error, address = runtime.cudaMalloc(max(size, 1))
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # else the next launch reports it again
            free = free_bytes()
            raise OutOfDeviceMemory(
                f"device memory: {what} needs {megabytes(size)}, {megabytes(free)} are free", size, free
            )
        if error != runtime.cudaError_t.cudaSuccess:
            raise BackendError(f"cudaMalloc of {size} bytes failed: {_reason(error)}")
        self.address, self.size = int(address), size
        super().__init__(runtime.cudaFree, self.address)


class PinnedBuffer(_Owned):
    """Page-locked host memory of size bytes: what asynchronous copies need."""

    def __init__(self, size: int) -> None:
        self.address, self.size = int(_call("cudaMallocHost", max(size, 1))), size
        super().__init__(_runtime().cudaFreeHost, self.address)

    def array(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """A view of it, valid until it is closed."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.address + offset)
        view: NDArray[Any] = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
        return view


class Stream(_Owned):
    """Work in order, asynchronous to the host; handle: what TensorRT and onnxruntime take."""

    def __init__(self) -> None:
        runtime = _runtime()
        self._stream = _call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        self._to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._on_device = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        super().__init__(runtime.cudaStreamDestroy, self._stream)

    def copy_to_device(self, target: int, source: int, size: int) -> None:
        """Copies from host memory, which must not change before it is done."""
        _call("cudaMemcpyAsync", target, source, size, self._to_device, self._stream)

    def copy_to_host(self, target: int, source: int, size: int) -> None:
        """Copies to host memory; asynchronous to the host where that is pinned."""
        _call("cudaMemcpyAsync", target, source, size, self._to_host, self._stream)

    def upload(self, target: int, array: NDArray[Any]) -> None:
        """Copies an array's bytes from any host memory, and waits for all work so far."""
        array = np.ascontiguousarray(array)
        self.copy_to_device(target, array.ctypes.data, array.nbytes)
        self.synchronize()

    def download(self, source: int, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array of the device's bytes, after all work so far."""
        array = np.empty(shape, dtype=dtype)
        self.copy_to_host(array.ctypes.data, source, array.nbytes)
        self.synchronize()
        return array

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies rows of width bytes, on the device, each a pitch after the one before."""
        if width == 0 or rows == 0:
            return
        if max(target_pitch, source_pitch) <= _PITCH_LIMIT:
            kind = self._on_device
            _call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self._stream)
            return
        for row in range(rows):
            at = target + row * target_pitch, source + row * source_pitch
            _call("cudaMemcpyAsync", *at, width, self._on_device, self._stream)

    def fill_zero(self, target: int, size: int) -> None:
        """Zeros device memory."""
        _call("cudaMemsetAsync", target, 0, size, self._stream)

    def synchronize(self) -> None:
        """Waits until all work so far is done."""
        _call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records the work that a function puts on this stream, without running it. Raises BackendError where that cannot be."""
        # Relaxed: a buffer that the garbage collector frees meanwhile must not spoil it.
        _call("cudaStreamBeginCapture", self._stream, _runtime().cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            work()
        except BaseException:
            error, graph = _runtime().cudaStreamEndCapture(self._stream)  # the stream is of no use before
            if error == _runtime().cudaError_t.cudaSuccess and graph is not None:
                _call("cudaGraphDestroy", graph)
            _runtime().cudaGetLastError()
            raise
        return Graph(_call("cudaStreamEndCapture", self._stream), self._stream)


class Graph(_Owned):
    """Recorded work of a stream, launched as one."""

    def __init__(self, graph: Any, stream: Any) -> None:
        runtime = _runtime()
        try:
            self._executable = _call("cudaGraphInstantiate", graph, 0)
        finally:
            _call("cudaGraphDestroy", graph)
        self._stream = stream
        super().__init__(runtime.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Puts the work on its stream."""
        _call("cudaGraphLaunch", self._executable, self._stream)


class Event(_Owned):
    """A point in a stream that the host can wait for."""

    def __init__(self) -> None:
        runtime = _runtime()
        self._event = _call("cudaEventCreateWithFlags", runtime.cudaEventDisableTiming)
        super().__init__(runtime.cudaEventDestroy, self._event)

    def record(self, stream: Stream) -> None:
        """Puts it after all work of the stream so far."""
        _call("cudaEventRecord", self._event, stream._stream)

    def wait(self) -> None:
        """Waits until the stream has come to it."""
        _call("cudaEventSynchronize", self._event)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def megabytes(size: int) -> str:
    """Bytes for messages."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size / 1e3:.1f} kB"
