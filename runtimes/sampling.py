"""Choosing the next token from logits. Defined here once, in terms any language can repeat bit by bit.

Order: repetition penalty, then temperature, top_k, top_p, min_p, then one draw. Candidates stand by falling logit, ties by
rising id; probabilities are float64; the draw u in [0, 1) takes the first candidate whose cumulative probability exceeds
u times the total. Random numbers are SplitMix64 (Steele, Lea, Flood 2014); sequence i of a batch draws from seed + i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.arrays import Float32
from runtimes.errors import BackendError, InputError

NO_NUMBERS = (
    "the model's logits are no numbers, so none can be drawn; export the bundle again, and see what "
    "`mythos-export verify` says of it"
)
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


class SplitMix64:
    """The generator of java.util.SplittableRandom: next() adds a constant, _GAMMA, to the state and mixes it."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def state_after(self, draws: int) -> int:
        """The 64 bits it goes on from after so many more: 0, as it is."""
        return (self._state + draws * _GAMMA) & _MASK

    def next(self) -> int:
        """The next 64 bits."""
        self._state = self.state_after(1)
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        """A float64 in [0, 1) from the upper 53 bits."""
        return (self.next() >> 11) * 2.0**-53


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 is greedy: the largest logit, the lowest id among equals.

    top_k: keep that many candidates, 0 all. top_p: keep the fewest that reach this probability (nucleus sampling, arXiv
    1904.09751), 1 all. min_p: drop those below this share of the most likely one (arXiv 2407.01082), 0 none.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen before (CTRL, arXiv 1909.05858), 1 none.
    Raises InputError where a value makes no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            (
                "temperature",
                self.temperature >= 0 and math.isfinite(self.temperature),
                "a number of at least 0 (0 is greedy)",
            ),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "an integer of at least 0 (0 keeps all)"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1 (1 keeps all)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1 (0 keeps all)"),
            (
                "repetition_penalty",
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "a number above 0 (1 is none)",
            ),
        )
        for name, ok, expected in rules:
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}")

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the largest logit, whatever was seen before."""
        return self.temperature == 0 and self.repetition_penalty == 1.0

    def choose(self, logits: Float32, seen: Sequence[int], random: SplitMix64) -> int:
        """The next token's id from logits [V]; seen: prompt and generated ids so far. Raises BackendError where one is drawn from
        logits that are no numbers."""
        values: NDArray[Any] = logits
        if self.repetition_penalty != 1.0 and seen:
            values = logits.astype(np.float64)
            ids = np.unique(np.asarray(seen, dtype=np.int64))
            picked = values[ids]
            values[ids] = np.where(picked > 0, picked / self.repetition_penalty, picked * self.repetition_penalty)
        if self.temperature == 0:
            return int(values.argmax())
        with np.errstate(over="ignore", invalid="ignore"):  # a tiny temperature sends all but the largest to -inf
            scaled = (values.astype(np.float64) - values.max()) / self.temperature
        if not (scaled <= 0).all():
            raise BackendError(NO_NUMBERS)
        ids, probabilities = self._candidates(scaled)
        cumulative = probabilities.cumsum()
        drawn = int(np.searchsorted(cumulative, random.uniform() * cumulative[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def _candidates(self, scaled: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Ids and probabilities that survive top_k, top_p and min_p, most likely first."""
        ids = np.argsort(-scaled, kind="stable")
        if self.top_k:
            ids = ids[: self.top_k]
        probabilities = np.exp(scaled[ids] - scaled[ids[0]])
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            n = int(np.searchsorted(probabilities.cumsum(), self.top_p, side="left")) + 1
            ids, probabilities = ids[:n], probabilities[:n]
        if self.min_p > 0:
            likely = probabilities >= self.min_p * probabilities[0]
            ids, probabilities = ids[likely], probabilities[likely]
        return ids, probabilities


def log_softmax(logits: Float32) -> NDArray[np.float64]:
    """log p over the last dimension, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
