"""The key/value cache of a batch: buffers that grow in blocks, rows appended after each step.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

import numpy as np

from runtimes.backend import Array, Float32, Int64

BLOCK = 256  # rows
CACHE_DTYPES = ("float32", "float16", "int8")  # what numpy can hold of what the graphs take: it has no bfloat16


class Cache:
    """Rows with length [B] valid ones for each sequence; the graph reads them, only append writes them. dtype: one of
    CACHE_DTYPES."""

    def __init__(self, slots: int, batch: int, width: int, dtype: str) -> None:
        self.length: Int64 = np.zeros(batch, dtype=np.int64)
        self._buffers: list[Array] = [np.zeros((slots, batch, BLOCK, width), dtype=np.dtype(dtype))]
        if dtype == "int8":
            self._buffers.append(np.zeros((slots, batch, BLOCK), dtype=np.float32))

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
        self._reserve(int((self.length + counts).max()))
        start, count = int(self.length[0]), int(counts[0])
        new_parts = [new_rows] if new_scales is None else [new_rows, new_scales]
        for buffer, new in zip(self._buffers, new_parts, strict=True):
            if (self.length == start).all() and (counts == count).all():
                buffer[:, :, start : start + count] = new[:, :, :count]
                continue
            for b, (start_b, count_b) in enumerate(zip(self.length.tolist(), counts.tolist(), strict=True)):
                buffer[:, b, start_b : start_b + count_b] = new[:, b, :count_b]
        self.length = self.length + counts

    def keep(self, sequences: list[int]) -> None:
        """Goes on with these sequences, in this order; one may be named more than once."""
        self._buffers = [np.ascontiguousarray(buffer[:, sequences]) for buffer in self._buffers]
        self.length = self.length[sequences]

    def _reserve(self, needed: int) -> None:
        capacity = self.rows.shape[2]
        if needed <= capacity:
            return
        # Half as much again, in whole blocks: a long sequence is copied a few times, not once a block.
        capacity = -(-max(needed, capacity * 3 // 2) // BLOCK) * BLOCK
        longest = int(self.length.max())
        for index, buffer in enumerate(self._buffers):
            slots, batch, _, *width = buffer.shape
            grown = np.zeros((slots, batch, capacity, *width), dtype=buffer.dtype)
            grown[:, :, :longest] = buffer[:, :, :longest]
            self._buffers[index] = grown
