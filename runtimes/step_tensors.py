"""What a step reads and writes beside weights and cache, and how it lies in memory.

Shape letters: B batch, S new tokens, K positions with logits, C capacity of the cache, D dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from runtimes import cuda
from runtimes.choosing import seen_words
from runtimes.engines import STATE, ExpertsCall, Plan

REDUCED = ("next_token", "next_logprob", "exit_loop")  # outputs of a greedy step, in front of the block copied back


class StepShape(NamedTuple):
    """B, S, C and K of a step, slots of its cache, and loops it runs."""

    batch: int
    seq: int
    capacity: int
    k: int
    slots: int
    loops: int

    @property
    def of_profile(self) -> dict[str, int]:
        """The sizes that an engine's profiles limit."""
        return {"batch": self.batch, "seq": self.seq, "capacity": self.capacity, "k": self.k}


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


def step_inputs_and_outputs(
    shape: StepShape, vocab_size: int, integers: Any, *, draws: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of a step but for weights and cache, the logits last. draws: whether new rows are kept and tokens drawn on
    the device, which takes more inputs, the seen tokens last."""
    batch, seq, k = shape.batch, shape.seq, shape.k
    inputs = [
        Tensor("input_ids", integers, (batch, seq)),
        Tensor("past_len", integers, (batch,)),
        Tensor("logit_positions", integers, (batch, k)),
        Tensor("n_loops", integers, (batch,)),
    ]
    if draws:
        inputs.append(Tensor("counts", integers, (batch,)))
        inputs.append(Tensor("random", np.uint64, (batch,)))
        inputs.append(Tensor("seen", np.uint32, (batch, seen_words(vocab_size))))
    outputs = [
        Tensor("next_token", integers, (batch, k)),
        Tensor("next_logprob", np.float32, (batch, k)),
        Tensor("exit_loop", integers, (batch, seq)),
        Tensor("logits", np.float32, (batch, k, vocab_size)),
    ]
    return inputs, outputs


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
