"""A CUDA made of host memory, for tests of what runs on a GPU where there is none.

Stricter than a GPU would show: work on a stream runs only when the host waits for it, memory is NaN when it comes and when it
goes, and every address is checked against what is allocated.
"""

from __future__ import annotations

import ctypes
import threading
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

ALIGNMENT = 256


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(Enum):
    cudaStreamCaptureModeRelaxed = 2


class IllegalAccess(Exception):
    """Work that touches memory which is not there."""


@dataclass
class Block:
    """An allocation. raw keeps the bytes alive."""

    address: int
    size: int
    raw: Any


@dataclass
class Marker:
    """An event's place in a stream's work."""

    event: int


@dataclass
class FakeStream:
    work: list[Callable[[], None] | Marker] = field(default_factory=list)
    recording: list[Callable[[], None] | Marker] | None = None


class FakeCuda(types.ModuleType):
    """Takes the place of cuda.bindings.runtime. total: device memory in bytes. calls, moved: calls by name, bytes by direction."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2

    def __init__(self, name: str = "Fake GPU", capability: tuple[int, int] = (9, 0), total: int = 2**30) -> None:
        super().__init__("cuda.bindings.runtime")
        self.device_name, self.capability, self.total = name, capability, total
        self.problem = cudaError_t.cudaSuccess  # what cudaGetDeviceCount says
        self.device: dict[int, Block] = {}
        self.host: dict[int, Block] = {}
        self.streams: dict[int, FakeStream] = {}
        self.graphs: dict[int, list[Any]] = {}
        self.calls: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.failing: set[str] = set()  # names of calls that fail
        self.allocations_left: int | None = None  # cudaMalloc fails after so many
        self.lock = threading.RLock()  # of all streams' work
        self._next = 1

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):
            self.calls[name] += 1
            if name in self.failing:
                return lambda *_: (cudaError_t.cudaErrorInvalidValue, None)
        return value

    @property
    def allocated(self) -> int:
        """Bytes of device memory in use."""
        return sum(block.size for block in list(self.device.values()))

    @property
    def waits(self) -> int:
        """How often the host waited for the device."""
        return sum(self.calls[f"cuda{name}Synchronize"] for name in ("Stream", "Event", "Device"))

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def _allocate(self, size: int, where: dict[int, Block]) -> int:
        raw = (ctypes.c_uint8 * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        ctypes.memset(address, 0xFF, size)
        where[address] = Block(address, size, raw)
        return address

    def check(self, address: int, size: int, where: str) -> None:
        """Raises IllegalAccess unless these bytes belong to one allocation."""
        for block in list((self.device if where == "device" else self.host).values()):
            if block.address <= address and address + size <= block.address + block.size:
                return
        raise IllegalAccess(f"{size} bytes at {address:#x} are not allocated on the {where}")

    # Devices and memory

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return self.problem, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        major, minor = self.capability
        name = self.device_name.encode() + b"\0\0"
        return cudaError_t.cudaSuccess, types.SimpleNamespace(
            name=name, major=major, minor=minor, totalGlobalMem=self.total, integrated=0
        )

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:
        return cudaError_t.cudaSuccess, error.name.encode()

    def cudaGetLastError(self) -> tuple[Any]:
        return (cudaError_t.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return cudaError_t.cudaSuccess, self.total - self.allocated, self.total

    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:
        if self.allocations_left is not None:
            self.allocations_left -= 1
        if self.allocated + size > self.total or (self.allocations_left is not None and self.allocations_left < 0):
            return cudaError_t.cudaErrorMemoryAllocation, None
        return cudaError_t.cudaSuccess, self._allocate(size, self.device)

    def cudaFree(self, address: int) -> tuple[Any]:
        with self.lock:
            for stream in list(self.streams.values()):  # as the real one waits for the device
                self._run(stream)
        block = self.device.pop(address)
        ctypes.memset(block.address, 0xFF, block.size)
        return (cudaError_t.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[Any, int]:
        return cudaError_t.cudaSuccess, self._allocate(size, self.host)

    def cudaFreeHost(self, address: int) -> tuple[Any]:
        del self.host[address]
        return (cudaError_t.cudaSuccess,)

    # Streams, copies, events

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        handle = self._handle()
        self.streams[handle] = FakeStream()
        return cudaError_t.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        self._run(self.streams.pop(stream))
        return (cudaError_t.cudaSuccess,)

    def put(self, stream: int, work: Callable[[], None] | Marker) -> None:
        """Work for a stream, or for the graph being captured on it."""
        queue = self.streams[stream]
        (queue.work if queue.recording is None else queue.recording).append(work)

    def _run(self, stream: FakeStream, until: int | None = None) -> None:
        with self.lock:
            while stream.work:
                work = stream.work.pop(0)
                if not isinstance(work, Marker):
                    work()
                elif work.event == until:
                    return

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any]:
        return self._copy(target, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self, target: int, to_pitch: int, source: int, pitch: int, width: int, rows: int, kind: Any, stream: int
    ) -> tuple[Any]:
        if width > min(to_pitch, pitch) or max(to_pitch, pitch) > 2**31 - 1:
            return (cudaError_t.cudaErrorInvalidValue,)
        return self._copy(target, to_pitch, source, pitch, width, rows, kind, stream)

    def _copy(
        self, target: int, to_pitch: int, source: int, pitch: int, width: int, rows: int, kind: Any, stream: int
    ) -> tuple[Any]:
        kinds = cudaMemcpyKind

        def copy() -> None:
            if kind is not kinds.cudaMemcpyHostToDevice:
                self.check(source, (rows - 1) * pitch + width, "device")
            if kind is not kinds.cudaMemcpyDeviceToHost:
                self.check(target, (rows - 1) * to_pitch + width, "device")
            for row in range(rows):
                ctypes.memmove(target + row * to_pitch, source + row * pitch, width)
            self.moved[kind.name] += width * rows

        self.put(stream, copy)
        return (cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> tuple[Any]:
        def fill() -> None:
            self.check(target, size, "device")
            ctypes.memset(target, value, size)

        self.put(stream, fill)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        self._run(self.streams[stream])
        return (cudaError_t.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return cudaError_t.cudaSuccess, self._handle()

    def cudaEventDestroy(self, event: int) -> tuple[Any]:
        return (cudaError_t.cudaSuccess,)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:
        queue = self.streams[stream].work
        queue[:] = [work for work in queue if work != Marker(event)]  # the last record is waited for
        self.put(stream, Marker(event))
        return (cudaError_t.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple[Any]:
        with self.lock:
            for stream in list(self.streams.values()):
                if Marker(event) in stream.work:
                    self._run(stream, until=event)
        return (cudaError_t.cudaSuccess,)

    # Graphs

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        self.streams[stream].recording = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, int | None]:
        queue = self.streams[stream]
        graph = self._handle()
        self.graphs[graph], queue.recording = queue.recording or [], None
        return cudaError_t.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        executable = self._handle()
        self.graphs[executable] = self.graphs[graph]
        return cudaError_t.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self.graphs[graph]
        return (cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Any]:
        for work in self.graphs[executable]:
            self.put(stream, work)
        return (cudaError_t.cudaSuccess,)
