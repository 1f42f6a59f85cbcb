"""Choosing the next tokens of several sequences, wherever their logits lie: on the host, and what a device is told.

Shape letters: B batch, N sequences of it, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtimes.arrays import Float32, Int64
from runtimes.sampling import Sampling, SplitMix64, log_softmax

Rows = NDArray[np.intp]  # which sequences of a batch
_WORD = 32  # tokens a word of seen_bits


class Chosen(NamedTuple):
    """tokens [B]; logprobs [B]: their natural log-probabilities under the model, before temperature and filters; exit_loop [B, S]
    of a step, [B] of a session."""

    tokens: Int64
    logprobs: NDArray[np.float64]
    exit_loop: Int64


@dataclass(frozen=True)
class Chooser:
    """How the next tokens of a batch are chosen. seen: prompt and generated ids so far, a list a sequence; random: the random
    numbers of each, of which a drawn token takes one."""

    sampling: Sampling
    seen: Sequence[Sequence[int]]
    random: Sequence[SplitMix64]

    @classmethod
    def greedy(cls, batch: int) -> Chooser:
        """The likeliest tokens."""
        return cls(Sampling(), [()] * batch, [SplitMix64(0)] * batch)

    def choose(self, logits: Float32, rows: Rows) -> tuple[Int64, NDArray[np.float64]]:
        """Tokens [N] and their log-probabilities [N] from logits [N, V] of sequences `rows`. Raises BackendError where one is drawn
        from logits that are no numbers."""
        if self.sampling.is_argmax:
            tokens = logits.argmax(-1)
        else:
            choices = [
                self.sampling.choose(values, self.seen[row], self.random[row])
                for values, row in zip(logits, rows, strict=True)
            ]
            tokens = np.array(choices, dtype=np.int64)
        return tokens, np.take_along_axis(log_softmax(logits), tokens[:, None], -1)[:, 0]

    def random_states(self, draws: int = 0) -> NDArray[np.uint64]:
        """Of the random numbers [B], after so many more."""
        return np.array([random.state_after(draws) for random in self.random], dtype=np.uint64)

    def drawn(self, rows: Rows) -> None:
        """Goes on with the random numbers of sequences whose tokens were drawn elsewhere."""
        if self.sampling.temperature > 0:
            for row in rows:
                self.random[row].next()

    def seen_bits(self, vocab_size: int) -> NDArray[np.uint32]:
        """Which tokens a repetition penalty changes: bit v % 32 of word v / 32 of each sequence's [B, ceil(V / 32)]."""
        marked = np.zeros((len(self.seen), seen_words(vocab_size) * _WORD), dtype=np.uint8)
        for row, ids in zip(marked, self.seen, strict=True):
            row[np.asarray(ids, dtype=np.int64)] = 1
        return np.packbits(marked, axis=-1, bitorder="little").view(np.uint32)


def seen_words(vocab_size: int) -> int:
    """32-bit words a sequence of seen_bits."""
    return -(-vocab_size // _WORD)
