"""What a model needs of the GPU's memory, reckoned before any of it is taken.

Shape letters: B batch, S new tokens, V vocab_size, W width of the cache.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from runtimes import cuda
from runtimes.bundle import Graph
from runtimes.dtypes import CACHE_STORAGE, STORAGE
from runtimes.engines import FORMS, Engine, Range
from runtimes.errors import MemoryLimitError
from runtimes.memory import gigabytes
from runtimes.step_tensors import passed_tensors, side_by_side, state_tensors

BUCKET = 256  # rows by which a cache grows: attention reads all of them, a graph is captured anew at each


class DeviceRequest(NamedTuple):
    """What is wanted of a GPU. engine: key of the engine to use, None for the best that fits. batch, context: sequences, and tokens
    of each, that device memory is planned for; None: the longest that an engine takes, few on onnxruntime. memory_limit: most bytes
    of that, or of the host's for weights and caches on the CPU; None: no limit. device: "cpu", "cuda", or None for what fits."""

    engine: str | None = None
    batch: int = 1
    context: int | None = None
    memory_limit: int | None = None
    device: str | None = None


_PARTS = ("weights", "plans", "activations", "workspace", "cache", "staging")


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of device memory for batch sequences of context tokens, and what was free before.

    weights: uploaded once; plans: what TensorRT keeps of them, quantized matrices included (the files' sizes); activations: shared
    by all contexts; workspace: of the CUDA kernels, shared by all calls; cache: at its full length; staging: a step's inputs,
    outputs and new cache rows.
    """

    batch: int
    context: int
    weights: int
    plans: int
    activations: int
    workspace: int
    cache: int
    staging: int
    free: int

    @property
    def needed(self) -> int:
        """Of all together."""
        return sum(getattr(self, name) for name in _PARTS)

    def to_dict(self) -> dict[str, int]:
        """For --json."""
        return {**asdict(self), "needed": self.needed}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {cuda.megabytes(getattr(self, name))}" for name in _PARTS if getattr(self, name))
        return f"{cuda.megabytes(self.needed)} of device memory for {self.batch} × {self.context} tokens ({parts})"

    def check(self, limit: int | None = None, *, what: str = "the engine") -> None:
        """Raises OutOfDeviceMemory where less is free than needed, MemoryLimitError beyond a limit. what: is too large."""
        missing = self.needed - self.free
        if missing > 0:
            raise cuda.OutOfDeviceMemory(
                f"{what} needs {self}, {cuda.megabytes(self.free)} are free: {cuda.megabytes(missing)} are missing; "
                "lower --max-context or the batch, free what other programs hold, or run with --backend onnxruntime --device cpu",
                self.needed,
                self.free,
            )
        if limit is not None and self.needed > limit:
            raise MemoryLimitError(
                f"{what} needs {self}, more than the memory_limit of {gigabytes(limit)}; lower the batch or --max-context, or "
                "raise it"
            )


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a device cache [slots, B, C, W], and behind it, of an int8 one, the scales [slots, B, C]. parts: bytes of a row of
    each; capacities: those that can be. The row of position p stands at p mod C."""

    parts: tuple[int, ...]
    capacities: Range

    @staticmethod
    def of_engine(engine: Engine, graph: Graph) -> CacheLayout:
        """Of an engine of this graph: capacities that every profile takes."""
        ranges = [profile.capacity for plan in engine.plans for profile in plan.profiles]
        least, most = max(part.min for part in ranges), min(part.max for part in ranges)
        itemsize = np.dtype(STORAGE[engine.cache_dtype]).itemsize
        return CacheLayout((graph.cache_width * itemsize,), Range(least, least, most))

    @staticmethod
    def of_graph(graph: Graph) -> CacheLayout:
        """Of a graph that takes any capacity: as many rows as there are positions, or as its layers see of them."""
        scale = (np.dtype(np.float32).itemsize,) if graph.cache_dtype == "int8" else ()
        row = graph.cache_width * np.dtype(CACHE_STORAGE[graph.cache_dtype]).itemsize
        return CacheLayout((row, *scale), Range(1, 1, graph.window or graph.max_seq_len))

    def capacity(self, rows: int, before: int = 0) -> int:
        """Rows to have for so many: whole buckets, and an eighth more than before, so that a long cache is copied seldom."""
        buckets = -(-max(rows, before * 9 // 8, 1) // BUCKET) * BUCKET
        return max(self.capacities.min, min(buckets, self.capacities.max))

    def offsets(self, slots: int, batch: int, rows: int) -> list[int]:
        """Where each part of so many rows a sequence begins, and where the last one ends."""
        offsets, end = [], 0
        for row in self.parts:
            offsets.append(cuda.aligned(end))
            end = offsets[-1] + slots * batch * rows * row
        return [*offsets, end]

    def bytes(self, slots: int, batch: int, rows: int) -> int:
        """Size of so many rows a sequence."""
        return self.offsets(slots, batch, rows)[-1]

    def check_free(self, slots: int, batch: int, tokens: int) -> None:
        """Raises OutOfDeviceMemory where a cache of so many tokens would not fit."""
        size, free = self.bytes(slots, batch, self.capacity(tokens)), cuda.free_bytes()
        if size > free:
            raise cuda.OutOfDeviceMemory(
                f"the cache of {batch} × {tokens} tokens needs {cuda.megabytes(size)} of device memory, {cuda.megabytes(free)} are "
                f"free: {cuda.megabytes(size - free)} are missing; run fewer or shorter sequences at once",
                size,
                free,
            )


def plan_memory(
    engine: Engine, graph: Graph, batch: int, context: int, longest_step: int, workspace: int, free: int
) -> DeviceMemory:
    """What an engine of a graph needs for batch sequences of context tokens at the trained depth. longest_step: S of a prefill
    step; workspace: bytes that the CUDA kernels need; free: bytes free now."""
    layout = CacheLayout.of_engine(engine, graph)
    slots = graph.slots(graph.loops or graph.default_loops)
    rows = min(longest_step, context)
    integers = STORAGE[engine.integers]
    state = max(
        side_by_side(
            [*state_tensors(batch, rows, engine.dim, integers), *passed_tensors(parts, batch, rows, integers)]
        )[1]
        for parts in map(engine.of_form, FORMS)
    )
    return DeviceMemory(
        batch,
        context,
        sum(cuda.aligned(weight.device_bytes) for weight in engine.weights),
        sum(plan.size for plan in engine.plans),
        max(plan.activation_bytes for plan in engine.plans),
        workspace,
        layout.bytes(slots, batch, layout.capacity(context)),
        slots * cuda.aligned(layout.bytes(1, batch, rows)) + _inputs_and_outputs(graph, batch, rows) + state,
        free,
    )


def plan_graph_memory(
    graph: Graph, weights: int, batch: int, context: int, longest_step: int, workspace: int, free: int
) -> DeviceMemory:
    """What a graph on onnxruntime needs for batch sequences of context tokens at the trained depth, but for what it computes with,
    which onnxruntime takes as it goes. weights: bytes of them; the rest as for plan_memory."""
    layout, slots = CacheLayout.of_graph(graph), graph.slots(graph.loops or graph.default_loops)
    rows = min(longest_step, context)
    staging = layout.bytes(slots, batch, rows) + _inputs_and_outputs(graph, batch, rows)
    cache = layout.bytes(slots, batch, layout.capacity(context))
    return DeviceMemory(batch, context, weights, 0, 0, workspace, cache, staging, free)


def _inputs_and_outputs(graph: Graph, batch: int, rows: int) -> int:
    """About so many bytes: a row of logits a sequence, and a few integers a token."""
    return 4 * batch * graph.vocab_size + 64 * batch * rows
