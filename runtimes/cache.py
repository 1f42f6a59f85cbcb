"""The key/value cache of a batch: one buffer that grows in blocks, rows appended after each step.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

import numpy as np

from runtimes.backend import Array, Int64

BLOCK = 256  # rows


class Cache:
    """rows [slots, B, C, W] with length [B] valid rows each; the graph reads it, only append writes it."""

    def __init__(self, slots: int, batch: int, width: int, dtype: str) -> None:
        self.length: Int64 = np.zeros(batch, dtype=np.int64)
        self.rows: Array = np.zeros((slots, batch, BLOCK, width), dtype=np.dtype(dtype))

    def append(self, new_rows: Array, counts: Int64) -> None:
        """Adds the first counts[b] of new_rows [slots, B, S, W] to sequence b."""
        self._reserve(int((self.length + counts).max()))
        start, count = int(self.length[0]), int(counts[0])
        if (self.length == start).all() and (counts == count).all():
            self.rows[:, :, start : start + count] = new_rows[:, :, :count]
        else:
            for b, (start_b, count_b) in enumerate(zip(self.length.tolist(), counts.tolist(), strict=True)):
                self.rows[:, b, start_b : start_b + count_b] = new_rows[:, b, :count_b]
        self.length = self.length + counts

    def keep(self, sequences: list[int]) -> None:
        """Drops all sequences but these."""
        self.rows = np.ascontiguousarray(self.rows[:, sequences])
        self.length = self.length[sequences]

    def _reserve(self, needed: int) -> None:
        slots, batch, capacity, width = self.rows.shape
        if needed <= capacity:
            return
        # Half as much again, in whole blocks: a long sequence is copied a few times, not once a block.
        capacity = -(-max(needed, capacity * 3 // 2) // BLOCK) * BLOCK
        grown = np.zeros((slots, batch, capacity, width), dtype=self.rows.dtype)
        longest = int(self.length.max())
        grown[:, :, :longest] = self.rows[:, :, :longest]
        self.rows = grown
