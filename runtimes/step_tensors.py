"""What a step of an engine reads and writes beside weights and cache, and how it lies in memory.

Shape letters: B batch, S new tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from runtimes import cuda
from runtimes.engines import STATE, ExpertsCall, Plan


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


def state_shapes(batch: int, seq: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Of e and of each of STATE."""
    return {name: (batch, seq, 1 if name in ("halted_mass", "exit_loop") else dim) for name in ("e", *STATE)}


def state_tensors(batch: int, seq: int, dim: int, integers: Any) -> list[Tensor]:
    """What stages hand on: e, and two sets of STATE that loops read and write in turn. Of the first set, all but h begin at zero
    and lie side by side."""
    shapes = state_shapes(batch, seq, dim)
    tensors = [Tensor("e", np.float32, shapes["e"])]
    for turn in (0, 1):
        for name in STATE:
            tensors.append(Tensor(f"{name}.{turn}", integers if name == "exit_loop" else np.float32, shapes[name]))
    return tensors


def passed_tensors(parts: Iterable[Plan | ExpertsCall], batch: int, seq: int, integers: Any) -> list[Tensor]:
    """What parts hand on within their stages, each named STAGE/NAME."""
    sizes = {"batch": batch, "seq": seq, "tokens": batch * seq}
    return [
        Tensor(
            f"{part.stage}/{passed.name}",
            integers if passed.integer else np.float32,
            tuple(sizes[dim] if isinstance(dim, str) else dim for dim in passed.shape),
        )
        for part in parts
        for passed in part.passes
    ]
