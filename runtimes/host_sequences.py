"""Sequences whose cache lies in the host's memory, for backends that compute there."""

from __future__ import annotations

from runtimes.arrays import Int64
from runtimes.backend import Backend, Logits, NewTokens, StepInput, StopSignal, chosen_of
from runtimes.cache import Cache
from runtimes.choosing import Chooser, Chosen, Rows
from runtimes.errors import BackendError
from runtimes.memory import MemoryBudget


class HostSequences:
    """Runs steps through Backend.run, the cache given and the new rows appended here. Made by a backend's start()."""

    def __init__(self, backend: Backend, batch: int, slots: int, tokens: int, budget: MemoryBudget) -> None:
        self._backend, graph = backend, backend.graph
        self._cache: Cache | None = Cache(
            slots, batch, graph.cache_width, graph.cache_dtype, window=graph.window, tokens=tokens, budget=budget
        )
        self._length = self._cache.length

    @property
    def length(self) -> Int64:
        """Tokens of each in the cache, [B]."""
        return self._length

    def step(self, new: NewTokens, stop: StopSignal) -> Logits:
        """Adds tokens; see Sequences."""
        cache = self._open_cache()
        step = StepInput(new.ids, cache.length, cache.rows, new.positions, new.n_loops, cache.scales)
        out = self._backend.run(step, stop)
        cache.append(out.new_kv, out.new_scale, new.counts)
        self._length = cache.length
        return Logits(out.logits, out.exit_loop)

    def step_choosing(self, new: NewTokens, chooser: Chooser, rows: Rows, stop: StopSignal, *, more: bool) -> Chosen:
        """Adds tokens; the next ones are chosen here, from the logits."""
        return chosen_of(self.step(new, stop), chooser, rows)

    def reserve(self, tokens: int) -> None:
        """Makes room for sequences of so many tokens; see Sequences."""
        self._open_cache().reserve(tokens)

    def keep(self, rows: list[int]) -> None:
        """Goes on with these sequences; see Sequences."""
        cache = self._open_cache()
        cache.keep(rows)
        self._length = cache.length

    def close(self) -> None:
        """Frees the cache; may be called again."""
        self._cache = None

    def _open_cache(self) -> Cache:
        if self._cache is None:
            raise BackendError("the sequences are closed; start new ones")
        return self._cache
