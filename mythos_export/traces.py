"""Where the times of a profile come from: CUPTI on NVIDIA's GPUs (cupti-python), onnxruntime's own profiler on a CPU.

CUPTI sees every kernel of the process, whoever launched it: a TensorRT plan, onnxruntime, a CUDA graph.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from mythos_export.profiling import Activity
from runtimes.errors import BackendError

_REMEDY = "pip install 'mythos-export[profile]'"
_BUFFER = 8 * 2**20  # bytes of records at a time


class Span(NamedTuple):
    """Something that ran, in nanoseconds of some clock."""

    name: str
    start: int
    end: int


class Trace(Protocol):
    """Collects what runs in its with block, which is used once. source: who does."""

    source: str

    def __enter__(self) -> Trace: ...

    def __exit__(self, *_: object) -> None: ...

    def activities(self) -> list[Activity]:
        """What ran in the block; all it started must be done when it ends."""
        ...

    def close(self) -> None:
        """Ends it; may be called again."""
        ...


class CuptiTrace:
    """Kernels, copies and fills of this process on the GPU. What is traced has to be captured and instantiated after this was made.

    Raises BackendError where cupti-python is missing or CUPTI refuses, as where its version is newer than the driver's CUDA.
    """

    source = "CUPTI"

    def __init__(self) -> None:
        try:
            self._cupti = importlib.import_module("cupti.cupti")
        except (ImportError, OSError) as error:
            raise BackendError(f"the Python module cupti cannot be imported ({error}); {_REMEDY}") from error
        kinds = self._cupti.ActivityKind
        self._kinds = [kinds.CONCURRENT_KERNEL, kinds.MEMCPY, kinds.MEMSET]
        self._spans: list[Span] = []
        self._is_on = False
        try:
            self._cupti.activity_register_callbacks(lambda: (_BUFFER, 0), self._take)
            for kind in self._kinds:
                self._cupti.activity_enable(kind)
        except (self._cupti.cuptiError, RuntimeError) as error:
            raise BackendError(
                f"CUPTI cannot trace the GPU: {error}; it needs a driver of its own CUDA version or newer (install the version of "
                "cupti-python that nvidia-smi shows), and no other profiler at work"
            ) from error
        self._is_on = True

    def _take(self, records: list[Any]) -> None:
        for record in records:
            self._spans.append(Span(self._name(record), record.start, record.end))

    def _name(self, record: Any) -> str:
        if record.kind == self._cupti.ActivityKind.MEMCPY:
            kind = self._cupti.ActivityMemcpyKind(record.copy_kind).name
            return f"copy {kind.lower()}"
        if record.kind == self._cupti.ActivityKind.MEMSET:
            return "fill"
        return short_name(record.name or "a kernel without a name")

    def __enter__(self) -> CuptiTrace:
        self._cupti.activity_flush_all(1)
        self._spans.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._cupti.activity_flush_all(1)

    def activities(self) -> list[Activity]:
        """What the GPU did in the block."""
        return one_after_the_other(self._spans)

    def close(self) -> None:
        """Ends tracing; may be called again."""
        if self._is_on:
            self._is_on = False
            for kind in self._kinds:
                self._cupti.activity_disable(kind)


class OnnxRuntimeTrace:
    """Operators of one onnxruntime session whose profiler is on. end: ends the profiler and gives what it wrote; start: the clock's
    nanoseconds (of time.time_ns) at the zero of that."""

    source = "onnxruntime's profiler"

    def __init__(self, start: int, end: Callable[[], str]) -> None:
        self._start, self._end = start, end
        self._is_on = True

    def __enter__(self) -> OnnxRuntimeTrace:
        self._began = time.time_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.time_ns()

    def activities(self) -> list[Activity]:
        """What the session did in the block; once only, as the file is written when the profiler ends."""
        self._is_on = False
        spans = operator_spans(json.loads(self._end()))
        return without_what_is_inside(
            [
                span
                for span in spans
                if self._began <= self._start + span.start and self._start + span.end <= self._ended
            ]
        )

    def close(self) -> None:
        """Drops what was not collected; may be called again."""
        if self._is_on:
            self._is_on = False
            self._end()


def operator_spans(events: list[dict[str, Any]]) -> list[Span]:
    """Runs of operators in onnxruntime's file."""
    return [
        Span(event["args"]["op_name"], int(event["ts"] * 1000), int((event["ts"] + event["dur"]) * 1000))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def one_after_the_other(spans: list[Span]) -> list[Activity]:
    """Kernels may begin, to wait, while the one before them ends: that time is the earlier one's."""
    found, latest = [], 0
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        found.append(Activity(span.name, max(0, span.end - max(span.start, latest)) / 1e3))
        latest = max(latest, span.end)
    return found


def without_what_is_inside(spans: list[Span]) -> list[Activity]:
    """Operators of a loop's body run inside of the loop's own span: that time is theirs."""
    found: list[list[Any]] = []
    around: list[tuple[int, int]] = []  # end and place in found of the spans that one stands in
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while around and around[-1][0] < span.end:
            around.pop()
        if around:
            found[around[-1][1]][1] -= span.end - span.start
        around.append((span.end, len(found)))
        found.append([span.name, span.end - span.start])
    return [Activity(name, nanoseconds / 1e3) for name, nanoseconds in found]


def short_name(name: str) -> str:
    """A kernel's name without what its template was made with and what it is called with."""
    text = _without_brackets(_demangled(name).replace("(anonymous namespace)::", ""))
    return text.rpartition(" ")[2] or name


def _without_brackets(text: str) -> str:
    """Text up to the parameters, without what stands in <>."""
    while (shorter := re.sub(r"<[^<>]*>", "", text)) != text:
        text = shorter
    return text.partition("(")[0].strip()


def _demangled(name: str) -> str:
    if not name.startswith("_Z"):
        return name
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value or not text:
        return name
    plain = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return plain
