"""What a backend is to the Runner: something that evaluates one step of a bundle's decoder graph.

Shape letters: B batch, S new tokens, K positions with logits, V vocab_size, C capacity and W width of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtimes.bundle import Graph

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Array = NDArray[Any]


class StepInput(NamedTuple):
    """input_ids [B, S], past_len [B], past_kv [slots, B, C, W] in the cache's dtype, logit_positions [B, K], n_loops [B] (unused by
    a fixed graph), past_scale [slots, B, C] of an int8 cache, else None."""

    input_ids: Int64
    past_len: Int64
    past_kv: Array
    logit_positions: Int64
    n_loops: Int64
    past_scale: Float32 | None = None


class StepOutput(NamedTuple):
    """logits [B, K, V]; new_kv [slots, B, S, W] in the cache's dtype; exit_loop [B, S]; new_scale [slots, B, S] of an int8 cache,
    else None."""

    logits: Float32
    new_kv: Array
    exit_loop: Int64
    new_scale: Float32 | None = None


class Cancelled(Exception):
    """A step was stopped because the caller asked for it: no error, and it never leaves a Generation."""


class Backend(Protocol):
    """One step of the graph, any batch, any number of new tokens."""

    name: str
    graph: Graph
    native: bool  # whether the native operators run, not their portable bodies

    def run(self, step: StepInput, stop: StopSignal) -> StepOutput:
        """Evaluates the graph. Raises Cancelled when stop is set before or during the step, BackendError when it fails."""
        ...


class StopSignal:
    """Set from any thread to stop a generation, a running step included."""

    def __init__(self) -> None:
        self.is_set = False
        self._stop_step: Callable[[], None] | None = None

    def set(self) -> None:
        self.is_set = True
        if self._stop_step is not None:
            self._stop_step()

    def on_set(self, stop_step: Callable[[], None]) -> None:
        """What stops the step about to run, in place of the last one's; called at once if the signal is set already."""
        self._stop_step = stop_step
        if self.is_set:
            stop_step()
