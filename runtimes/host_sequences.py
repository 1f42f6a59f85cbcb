"""Sequences whose cache lies in the host's memory, for backends that compute there."""

from __future__ import annotations

import numpy as np

from runtimes.backend import Backend, Int64, Likeliest, Logits, NewTokens, StepInput, StopSignal
from runtimes.cache import Cache
from runtimes.memory import MemoryBudget
from runtimes.sampling import log_softmax


class HostSequences:
    """Runs steps through Backend.run, the cache given and the new rows appended here. Made by a backend's start()."""

    def __init__(self, backend: Backend, batch: int, slots: int, tokens: int, budget: MemoryBudget) -> None:
        self._backend, graph = backend, backend.graph
        self._cache = Cache(
            slots, batch, graph.cache_width, graph.cache_dtype, window=graph.window, tokens=tokens, budget=budget
        )

    @property
    def length(self) -> Int64:
        """Tokens of each in the cache, [B]."""
        return self._cache.length

    def step(self, new: NewTokens, stop: StopSignal) -> Logits:
        """Adds tokens; see Sequences."""
        cache = self._cache
        step = StepInput(new.ids, cache.length, cache.rows, new.positions, new.n_loops, cache.scales)
        out = self._backend.run(step, stop)
        cache.append(out.new_kv, out.new_scale, new.counts)
        return Logits(out.logits, out.exit_loop)

    def step_greedy(self, new: NewTokens, stop: StopSignal) -> Likeliest:
        """Adds tokens; the likeliest next ones are found here, from the logits."""
        logits, exit_loop = self.step(new, stop)
        tokens = logits.argmax(-1)
        logprobs = np.take_along_axis(log_softmax(logits), tokens[..., None], -1)[..., 0]
        return Likeliest(tokens, logprobs, exit_loop)

    def reserve(self, tokens: int) -> None:
        """Makes room for sequences of so many tokens; see Sequences."""
        self._cache.reserve(tokens)

    def keep(self, rows: list[int]) -> None:
        """Drops all sequences but these."""
        self._cache.keep(rows)

    def close(self) -> None:
        """The cache goes with the last reference to it."""
