"""What an engine needs of the GPU's memory, reckoned before any of it is taken.

Shape letters: B batch, S new tokens, V vocab_size, W width of the cache.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from runtimes import cuda
from runtimes.bundle import Graph
from runtimes.dtypes import STORAGE
from runtimes.engines import FORMS, Engine, Range
from runtimes.step_tensors import passed_tensors, side_by_side, state_tensors

BUCKET = 256  # rows by which a cache grows: attention reads all of them, a graph is captured anew at each


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

    def check(self) -> None:
        """Raises OutOfDeviceMemory where less is free than needed."""
        missing = self.needed - self.free
        if missing > 0:
            raise cuda.OutOfDeviceMemory(
                f"the engine needs {self}, {cuda.megabytes(self.free)} are free: {cuda.megabytes(missing)} are missing; "
                "lower --max-context or the batch, free what other programs hold, or run with --backend onnxruntime",
                self.needed,
                self.free,
            )


@dataclass(frozen=True)
class CacheLayout:
    """Sizes of a device cache [slots, B, C, W]. row_bytes: of one row; capacities: those every profile takes."""

    row_bytes: int
    capacities: Range

    @staticmethod
    def of(engine: Engine, graph: Graph) -> CacheLayout:
        """Of an engine of this graph."""
        ranges = [profile.capacity for plan in engine.plans for profile in plan.profiles]
        least, most = max(part.min for part in ranges), min(part.max for part in ranges)
        itemsize = np.dtype(STORAGE[engine.cache_dtype]).itemsize
        return CacheLayout(graph.cache_width * itemsize, Range(least, least, most))

    def capacity(self, rows: int, before: int = 0) -> int:
        """Rows to have for so many: whole buckets, and an eighth more than before, so that a long cache is copied seldom."""
        buckets = -(-max(rows, before * 9 // 8, 1) // BUCKET) * BUCKET
        return max(self.capacities.min, min(buckets, self.capacities.max))

    def bytes(self, slots: int, batch: int, capacity: int) -> int:
        """Size of a cache."""
        return slots * batch * capacity * self.row_bytes


def plan_memory(
    engine: Engine, graph: Graph, batch: int, context: int, longest_step: int, workspace: int, free: int
) -> DeviceMemory:
    """What an engine of a graph needs for batch sequences of context tokens at the trained depth. longest_step: S of a prefill
    step; workspace: bytes that the CUDA kernels need; free: bytes free now."""
    layout = CacheLayout.of(engine, graph)
    slots = graph.slots(graph.loops or graph.default_loops)
    rows = min(longest_step, context)
    integers = STORAGE[engine.integers]
    inputs_and_outputs = 4 * batch * graph.vocab_size + 64 * batch * rows
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
        slots * cuda.aligned(layout.bytes(1, batch, rows)) + inputs_and_outputs + state,
        free,
    )
