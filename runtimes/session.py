"""A batch of sequences and their cache: prefill in chunks, decode step by step, each row at its own depth.

Shape letters: B batch, S new tokens, K positions with logits, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtimes.arrays import Float32, Int64
from runtimes.backend import Backend, NewTokens, StopSignal
from runtimes.bundle import Graph
from runtimes.choosing import Chooser, Chosen
from runtimes.errors import InputError


class Chunk(NamedTuple):
    """Logits [K, V] of row `row`, of its tokens start..start+K of this call; exit_loop [K]."""

    row: int
    start: int
    logits: Float32
    exit_loop: Int64


class Session:
    """Sequences that grow together. For those who bring their own sampler; `Runner.generate` is built on it.

    n_loops: depth of all rows or of each; a row may run fewer loops later, never more: the deeper loops' cache rows of earlier
    tokens would be missing. chunk: tokens a step at most, None for what suits the backend; fewer where it takes fewer. tokens: how
    long the sequences are expected to become, for backends that plan memory; 0 where nobody knows. Raises InputError for a depth
    the graph cannot run or a batch the backend cannot take, MemoryLimitError where the cache exceeds the runner's memory_limit,
    here and as it grows.
    """

    def __init__(
        self,
        backend: Backend,
        batch: int,
        n_loops: int | Sequence[int] | None = None,
        chunk: int | None = None,
        tokens: int = 0,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch is {batch}; expected at least 1")
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}; expected at least 1 token")
        graph = backend.graph
        self.stop = StopSignal()
        self.n_loops = check_n_loops(graph, n_loops, batch)
        self._backend, self._graph, self._chunk = backend, graph, chunk or backend.prefill_chunk
        self._sequences = backend.start(batch, graph.slots(int(self.n_loops.max())), tokens)

    @property
    def past_len(self) -> Int64:
        """Tokens of each row in the cache, [B]."""
        return self._sequences.length

    def lower_n_loops(self, n_loops: int | Sequence[int]) -> None:
        """Sets the depth from here on, per row; raises InputError where a row would go deeper than before."""
        wanted = check_n_loops(self._graph, n_loops, len(self.past_len))
        deeper = np.flatnonzero(wanted > self.n_loops)
        if len(deeper):
            row = int(deeper[0])
            raise InputError(
                f"n_loops of sequence {row} would rise from {self.n_loops[row]} to {wanted[row]}: its earlier tokens left no cache "
                "rows at the deeper loops; start a new sequence at the depth it needs"
            )
        self.n_loops = wanted

    def advance(self, ids: Sequence[Sequence[int]]) -> tuple[Float32, Int64]:
        """Feeds each row its next tokens (at least one, rows may differ) and returns the logits [B, V] and exit_loop [B] after
        the last one of each. Raises InputError for ids out of range or beyond the model's positions."""
        logits = np.empty((len(ids), self._graph.vocab_size), dtype=np.float32)
        exit_loop = np.empty(len(ids), dtype=np.int64)
        for _, new, ending in self._chunks(ids, every_position=False):
            out = self._sequences.step(new, self.stop)
            logits[ending] = out.logits[ending, 0]
            exit_loop[ending] = out.exit_loop[ending, new.positions[ending, 0]]
        return logits, exit_loop

    def advance_choosing(self, ids: Sequence[Sequence[int]], chooser: Chooser, *, more: bool = False) -> Chosen:
        """As advance, where the next tokens are wanted: tokens, logprobs and exit_loop, each [B]. Backends with a memory of their
        own leave the logits there where they can. more: these tokens, one a row, are what will be fed next; a backend may begin
        with that before the caller has seen them. Raises BackendError where a token is drawn from logits that are no numbers."""
        tokens = np.empty(len(ids), dtype=np.int64)
        logprobs = np.empty(len(ids), dtype=np.float64)
        exit_loop = np.empty(len(ids), dtype=np.int64)
        for _, new, ending in self._chunks(ids, every_position=False):
            out = self._sequences.step_choosing(new, chooser, ending, self.stop, more=more)
            tokens[ending], logprobs[ending] = out.tokens[ending], out.logprobs[ending]
            exit_loop[ending] = out.exit_loop[ending, new.positions[ending, 0]]
        return Chosen(tokens, logprobs, exit_loop)

    def advance_scored(self, ids: Sequence[Sequence[int]]) -> Iterator[Chunk]:
        """As advance, with the logits of every position, a chunk and row at a time."""
        for start, new, _ in self._chunks(ids, every_position=True):
            out = self._sequences.step(new, self.stop)
            for b, count in enumerate(new.counts.tolist()):
                if count:
                    yield Chunk(b, start, out.logits[b, :count], out.exit_loop[b, :count])

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows, in this order; a row may go on more than once, as in beam search."""
        if rows == list(range(len(self.past_len))):
            return
        self._sequences.keep(rows)
        self.n_loops = self.n_loops[rows]

    def close(self) -> None:
        """Frees the cache; the session is of no use afterwards. May be called again."""
        self._sequences.close()

    def _chunks(
        self, ids: Sequence[Sequence[int]], every_position: bool
    ) -> Iterator[tuple[int, NewTokens, NDArray[np.intp]]]:
        """Steps for these ids: where each starts in its row, its input, and the rows that end in it."""
        self._check_ids(ids)
        lengths = np.array([len(row) for row in ids])
        chunk = min(self._chunk, self._backend.longest_step(len(ids), every_position) or self._chunk)
        for start in range(0, int(lengths.max()), chunk):
            parts = [row[start : start + chunk] for row in ids]
            counts = np.array([len(part) for part in parts], dtype=np.int64)
            tokens = np.zeros((len(ids), int(counts.max())), dtype=np.int64)
            for b, part in enumerate(parts):
                tokens[b, : len(part)] = part
            last = np.maximum(counts - 1, 0)
            positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if every_position else last[:, None]
            ending = np.flatnonzero((lengths > start) & (lengths <= start + chunk))
            yield start, NewTokens(tokens, counts, np.ascontiguousarray(positions), self.n_loops), ending

    def _check_ids(self, ids: Sequence[Sequence[int]]) -> None:
        if len(ids) != len(self.past_len):
            raise InputError(f"{len(ids)} rows of ids for a session of {len(self.past_len)} sequences")
        for b, row in enumerate(ids):
            check_ids(row, self._graph, f"sequence {b}", int(self.past_len[b]))
        longest = max(past + len(row) for past, row in zip(self.past_len.tolist(), ids, strict=True))
        self._backend.check(len(ids), longest)
        self._sequences.reserve(longest)


def check_n_loops(graph: Graph, n_loops: int | Sequence[int] | None, batch: int) -> Int64:
    """n_loops of each row [B]. None is the trained depth. Raises InputError for a depth the graph cannot run."""
    default = graph.default_loops if graph.loops is None else graph.loops
    if isinstance(n_loops, (Sequence, np.ndarray)):
        if len(n_loops) != batch:
            raise InputError(
                f"n_loops has {len(n_loops)} values for {batch} sequences; expected one number or one a sequence"
            )
        values = list(n_loops)
    else:
        values = [default if n_loops is None else n_loops] * batch
    for value in values:
        if graph.loops == 0 and value:
            raise InputError(f"n_loops is {value}, but the model has no loop; leave it out")
        if graph.loops is not None and value != graph.loops:
            raise InputError(
                f"n_loops is {value}, but the bundle was exported for exactly {graph.loops}; export it with --loops dynamic or "
                f"--loops {value}"
            )
        if graph.loops is None and not 1 <= value <= graph.max_loops:
            raise InputError(
                f"n_loops is {value}; expected 1 to {graph.max_loops}, the bundle's max_loops (export with --max-loops for more)"
            )
    return np.array(values, dtype=np.int64)


def check_ids(ids: Sequence[int], graph: Graph, what: str, past: int = 0) -> None:
    """Raises InputError unless ids is a non-empty list of token ids that fit the model after `past` tokens."""
    if not len(ids):
        raise InputError(f"{what} is empty; give at least one token")
    low, high = min(ids), max(ids)
    if low < 0 or high >= graph.vocab_size:
        raise InputError(
            f"{what} holds token id {low if low < 0 else high}; expected ids from 0 to {graph.vocab_size - 1} (is this the model's "
            "tokenizer?)"
        )
    if past + len(ids) > graph.max_seq_len:
        raise InputError(
            f"{what} has {past + len(ids)} tokens, more than the model's max_seq_len of {graph.max_seq_len}; shorten it"
        )
