"""What a step of an engine reads and writes beside weights and cache, and how it lies in memory.

Shape letters: B batch, S new tokens, D dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtimes import cuda
from runtimes.engines import STATE


class Tensor(NamedTuple):
    """An input or output of a step."""

    name: str
    dtype: Any
    shape: tuple[int, ...]


def side_by_side(tensors: list[Tensor]) -> tuple[dict[str, int], int]:
    """Offset of each, aligned, and the bytes of all."""
    offsets, size = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = size
        size += cuda.aligned(int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize)
    return offsets, size


def state_tensors(batch: int, seq: int, dim: int, integers: Any) -> list[Tensor]:
    """What stages hand on: e, and two sets of STATE that loops read and write in turn. Of the first set, all but h begin at zero
    and lie side by side."""
    widths = {"h": dim, "result": dim, "halted_mass": 1, "exit_loop": 1}
    tensors = [Tensor("e", np.float32, (batch, seq, dim))]
    for turn in (0, 1):
        for name in STATE:
            dtype = integers if name == "exit_loop" else np.float32
            tensors.append(Tensor(f"{name}.{turn}", dtype, (batch, seq, widths[name])))
    return tensors
