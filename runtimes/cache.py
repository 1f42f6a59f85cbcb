"""The key/value cache of a batch: buffers that grow where they lie, rows appended after each step.

The row of position p stands at p mod C. Where every layer has a window, C never exceeds the largest one, and later rows take the
place of those that no layer sees any more.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from runtimes.arrays import Array, Float32, Int64
from runtimes.memory import MemoryBudget, MemoryShare

BLOCK = 256  # rows
CACHE_DTYPES = ("float32", "float16", "int8")  # what numpy can hold of what the graphs take: it has no bfloat16


class Cache:
    """Rows with length [B] valid ones for each sequence; the graph reads them, only append writes them. dtype: one of
    CACHE_DTYPES. window: positions that the layers see, 0 for all. tokens: how long the sequences are expected to become; what is
    not written yet takes address space only. Raises MemoryLimitError, here and as it grows, where the budget does not allow it."""

    def __init__(
        self,
        slots: int,
        batch: int,
        width: int,
        dtype: str,
        *,
        window: int = 0,
        tokens: int = 0,
        budget: MemoryBudget | None = None,
    ) -> None:
        self.length: Int64 = np.zeros(batch, dtype=np.int64)
        self._window = window
        self._share: MemoryShare = (budget or MemoryBudget(None, 0)).share()
        self._row_bytes = slots * (width * np.dtype(dtype).itemsize + (4 if dtype == "int8" else 0))
        capacity = self._capacity(tokens)
        with self._share.allocating(*self._size(batch, capacity)):
            self._buffers: list[Array] = [np.zeros((slots, batch, capacity, width), dtype=np.dtype(dtype))]
            if dtype == "int8":
                self._buffers.append(np.zeros((slots, batch, capacity), dtype=np.float32))

    @property
    def rows(self) -> Array:
        """[slots, B, C, W] in the cache's dtype."""
        return self._buffers[0]

    @property
    def scales(self) -> Float32 | None:
        """[slots, B, C]: of int8 rows, else None."""
        return self._buffers[1] if len(self._buffers) == 2 else None

    def append(self, new_rows: Array, new_scales: Float32 | None, counts: Int64) -> None:
        """Adds the first counts[b] of new_rows [slots, B, S, W] to sequence b, of an int8 cache with new_scales [slots, B, S]."""
        self.reserve(int((self.length + counts).max()))
        capacity, starts, numbers = self.rows.shape[2], self.length.tolist(), counts.tolist()
        new_parts = [new_rows] if new_scales is None else [new_rows, new_scales]
        for buffer, new in zip(self._buffers, new_parts, strict=True):
            if len(set(starts)) == len(set(numbers)) == 1:
                for to, source, count in _runs(starts[0], numbers[0], capacity):
                    buffer[:, :, to : to + count] = new[:, :, source : source + count]
                continue
            for b, (start, number) in enumerate(zip(starts, numbers, strict=True)):
                for to, source, count in _runs(start, number, capacity):
                    buffer[:, b, to : to + count] = new[:, b, source : source + count]
        self.length = self.length + counts

    def keep(self, sequences: list[int]) -> None:
        """Goes on with these sequences, in this order; one may be named more than once."""
        capacity = self.rows.shape[2]
        with self._share.allocating(*self._size(len(sequences), capacity)):
            self._lay_out(sequences, capacity)
        self.length = self.length[sequences]

    def reserve(self, tokens: int) -> None:
        """Makes room for sequences of so many tokens."""
        batch, before = self.rows.shape[1:3]
        if tokens <= before or before == self._window:
            return
        # An eighth more than before, in whole blocks: a long sequence is moved a few times, not once a block.
        capacity = self._capacity(max(tokens, before * 9 // 8))
        with self._share.allocating(*self._size(batch, capacity)):
            self._lay_out(range(batch), capacity)

    def _capacity(self, tokens: int) -> int:
        rows = -(-max(tokens, 1) // BLOCK) * BLOCK
        return min(rows, self._window) if self._window else rows

    def _size(self, batch: int, capacity: int) -> tuple[int, str]:
        """Bytes of such a cache, and what to call it."""
        return batch * capacity * self._row_bytes, f"a cache of {batch} × {capacity} tokens"

    def _lay_out(self, sequences: Sequence[int], capacity: int) -> None:
        """Moves the rows of these sequences, in place, to where they stand in buffers of that capacity; one slot is held twice."""
        slots, batch, old_capacity, _ = self.rows.shape
        live = min(int(self.length.max()), old_capacity)
        shapes = [([batch, *part.shape[2:]], [len(sequences), capacity, *part.shape[3:]]) for part in self._buffers]
        if len(sequences) * capacity > batch * old_capacity:
            try:
                for buffer, (_, after) in zip(self._buffers, shapes, strict=True):
                    buffer.resize((slots, *after), refcheck=False)  # no view of it is left from any step
            except MemoryError:
                for buffer, (before, _) in zip(self._buffers, shapes, strict=True):
                    buffer.resize((slots, *before), refcheck=False)
                raise
        for buffer, (before, after) in zip(self._buffers, shapes, strict=True):
            size, new_size = math.prod(before), math.prod(after)
            flat = buffer.reshape(-1)
            for slot in reversed(range(slots)) if new_size > size else range(slots):
                rows = flat[slot * size : (slot + 1) * size].reshape(before)[list(sequences), :live]
                flat[slot * new_size : (slot + 1) * new_size].reshape(after)[:, :live] = rows
            del flat
            if new_size < size:
                buffer.resize((slots, *after), refcheck=False)


def _runs(start: int, count: int, capacity: int) -> Iterator[tuple[int, int, int]]:
    """Where `count` rows from position `start` on go, of those that there is room for: to, from, how many."""
    skipped = max(0, count - capacity)
    at, left = (start + skipped) % capacity, count - skipped
    first = min(left, capacity - at)
    yield at, skipped, first
    if left > first:
        yield 0, skipped + first, left - first
