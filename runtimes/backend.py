"""What a backend is to the Runner: something that evaluates one step of a bundle's decoder graph.

Shape letters: B batch, S new tokens, K positions with logits, V vocab_size, C capacity and W width of the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from runtimes.arrays import Array, Float32, Int64
from runtimes.bundle import Graph
from runtimes.choosing import Chooser, Chosen, Rows

if TYPE_CHECKING:
    from runtimes.device_memory import DeviceMemory

_log = logging.getLogger("mythos_export")
_said: set[str] = set()


def say_once(message: str) -> None:
    """Warns, the first time in this process only."""
    if message not in _said:
        _said.add(message)
        _log.warning(message)


class StepInput(NamedTuple):
    """input_ids [B, S], past_len [B], past_kv [slots, B, C, W] in the cache's dtype (the row of position p at p mod C),
    logit_positions [B, K], n_loops [B] (unused by a fixed graph), past_scale [slots, B, C] of an int8 cache, else None."""

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


class NewTokens(NamedTuple):
    """What a step adds to sequences: ids [B, S], of which the first counts[b] [B] are row b's; positions [B, K], those of the S
    that get logits; n_loops [B], each row's depth."""

    ids: Int64
    counts: Int64
    positions: Int64
    n_loops: Int64


class Logits(NamedTuple):
    """logits [B, K, V]; exit_loop [B, S]."""

    logits: Float32
    exit_loop: Int64


class Sequences(Protocol):
    """Sequences that grow together and their cache, which lives where the backend computes. After an error they are as before."""

    @property
    def length(self) -> Int64:
        """Tokens of each in the cache, [B]."""
        ...

    def step(self, new: NewTokens, stop: StopSignal) -> Logits:
        """Adds tokens. Raises Cancelled when stop is set before or during the step, BackendError when it fails."""
        ...

    def step_choosing(self, new: NewTokens, chooser: Chooser, rows: Rows, stop: StopSignal, *, more: bool) -> Chosen:
        """As step, where a token after the one position of each of `rows` is wanted; the other rows' are arbitrary. more: the next
        step will be fed these tokens, one a sequence; whoever can may begin it. Raises BackendError, the tokens added, where one
        cannot be drawn."""
        ...

    def reserve(self, tokens: int) -> None:
        """Makes room for sequences of so many tokens. Raises MemoryLimitError where a limit does not allow it."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Goes on with these sequences in this order, each with a cache of its own where one is named more than once."""
        ...

    def close(self) -> None:
        """Frees the cache; may be called again."""
        ...


def chosen_of(out: Logits, chooser: Chooser, rows: Rows) -> Chosen:
    """What step_choosing returns, chosen on the host; K is 1."""
    tokens = np.zeros(len(out.logits), dtype=np.int64)
    logprobs = np.zeros(len(out.logits), dtype=np.float64)
    tokens[rows], logprobs[rows] = chooser.choose(out.logits[rows, 0], rows)
    return Chosen(tokens, logprobs, out.exit_loop)


PREFILL_CHUNK = 512  # tokens a step: bounds the memory of scores and expert inputs, long enough to use the cores
_FEW_WEIGHTS = 2**30  # bytes, beside which a step's tensors of so many tokens are more than a few percent


def prefill_chunk_beside(weights: int) -> int:
    """Tokens of a prefill step on a CPU, where the caller names none, by bytes of weights: the C++ Runner's too, as steps of other
    lengths round otherwise."""
    return PREFILL_CHUNK if weights >= _FEW_WEIGHTS else PREFILL_CHUNK // 2


class Backend(Protocol):
    """Runs a bundle's graph: any batch, any number of new tokens within its limits."""

    name: str
    prefill_chunk: int  # tokens of a prefill step where the caller names none
    graph: Graph  # as it runs here: dtype and cache_dtype may differ from the bundle's
    device: str  # "cpu" or "cuda": where it computes
    native: bool  # whether the native operators run, not their portable bodies
    max_context: int  # tokens a sequence can have

    @property
    def engine(self) -> str | None:
        """Key of the engine in use, of a backend that has some."""
        ...

    @property
    def memory(self) -> DeviceMemory | None:
        """What was planned of a device's memory, of a backend that has its own."""
        ...

    def run(self, step: StepInput, stop: StopSignal) -> StepOutput:
        """Evaluates the graph. Raises Cancelled when stop is set before or during the step, BackendError when it fails."""
        ...

    def start(self, batch: int, slots: int, tokens: int = 0) -> Sequences:
        """New, empty sequences with so many cache slots. tokens: how long they are expected to become, 0 where nobody knows; a
        backend that plans memory refuses early what will not fit. Raises InputError beyond its limits, BackendError where memory is
        short, MemoryLimitError where a limit does not allow it."""
        ...

    def check(self, batch: int, tokens: int) -> None:
        """Raises InputError, naming the limit and how to raise it, for sequences that it cannot take."""
        ...

    def longest_step(self, batch: int, every_position: bool) -> int | None:
        """Most new tokens of a step of so many sequences, with logits of the last position or of all; None: no limit."""
        ...

    def close(self) -> None:
        """Frees what it holds; nothing runs afterwards. May be called again."""
        ...


class StopSignal:
    """Set from any thread to stop a generation, and a running step where the backend can."""

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
