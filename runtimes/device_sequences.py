"""Sequences whose cache lies in device memory: read there by the engine, its new rows appended by copies on the device.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

import numpy as np

from runtimes import cuda
from runtimes.backend import Array, Int64, Likeliest, Logits, NewTokens, StopSignal
from runtimes.errors import BackendError
from runtimes.tensorrt_stages import StepShape
from runtimes.tensorrt_step import Arrays, Executor


class DeviceSequences:
    """A cache [slots, B, C, W] whose capacity grows by buckets. Rows that hold no token are zero or of tokens dropped since: always
    finite numbers. Made by a backend's start(). Raises OutOfDeviceMemory."""

    def __init__(self, executor: Executor, batch: int, slots: int, rows: int = 0) -> None:
        self._executor, self._layout, self._slots = executor, executor.layout, slots
        self._length: Int64 = np.zeros(batch, dtype=np.int64)
        self._capacity = self._layout.capacity(rows)
        with executor.lock:
            self._buffer: cuda.DeviceBuffer | None = self._new_buffer(batch, self._capacity)

    @property
    def length(self) -> Int64:
        """Tokens of each in the cache, [B]."""
        return self._length

    @property
    def capacity(self) -> int:
        """C: rows there is room for."""
        return self._capacity

    @property
    def address(self) -> int:
        """Of the cache, in device memory. Raises BackendError once closed."""
        return self._open_buffer().address

    def fill(self, rows: Array, length: Int64) -> None:
        """Replaces the cache by the first length[b] of rows [slots, B, rows, W]; the sequences' length stays as it is."""
        slots, batch, count, width = rows.shape
        padded = np.zeros((slots, batch, self._capacity, width), dtype=rows.dtype)
        live = np.arange(count) < length[:, None]
        padded[:, :, :count] = np.where(live[..., None], rows, np.zeros((), rows.dtype))
        self._executor.stream.upload(self.address, padded)

    def step(self, new: NewTokens, stop: StopSignal) -> Logits:
        """Adds tokens; see Sequences."""
        out = self._step(new, stop, greedy=False)
        return Logits(out["logits"], out["exit_loop"].astype(np.int64, copy=False))

    def step_greedy(self, new: NewTokens, stop: StopSignal) -> Likeliest:
        """Adds tokens; the likeliest next ones are found on the device, the logits stay there."""
        out = self._step(new, stop, greedy=True)
        tokens, exit_loop = (out[name].astype(np.int64, copy=False) for name in ("next_token", "exit_loop"))
        return Likeliest(tokens, out["next_logprob"].astype(np.float64), exit_loop)

    def _step(self, new: NewTokens, stop: StopSignal, *, greedy: bool) -> Arrays:
        batch, seq = new.ids.shape
        with self._executor.lock:
            k, loops = new.positions.shape[1], int(new.n_loops.max())
            shape = StepShape(batch, seq, self._capacity, k, self._slots, loops)
            values = {
                "input_ids": new.ids,
                "past_len": self._length,
                "logit_positions": new.positions,
                "n_loops": new.n_loops,
            }

            def append(new_rows: int, slot_stride: int) -> None:
                self._append(new_rows, slot_stride, seq, new.counts)

            address = self.address
            out = self._executor.run(shape, address, values, greedy=greedy, stop=stop, then=append)
            self._length = self._length + new.counts
            return out

    def _append(self, new_rows: int, slot_stride: int, seq: int, counts: Int64) -> None:
        """Copies the first counts[b] of each slot's new rows [B, S, W] behind sequence b's, on the stream."""
        self._reserve(int((self._length + counts).max()))
        target, row, stream = self.address, self._layout.row_bytes, self._executor.stream
        batch, capacity, slots = len(counts), self._capacity, self._slots
        length, count = self._length.tolist(), counts.tolist()
        if slot_stride == batch * seq * row and len(set(length)) == len(set(count)) == 1:
            # One copy for all: from sequence to sequence and from slot to slot it is equally far.
            to, width = target + length[0] * row, count[0] * row
            stream.copy_rows(to, capacity * row, new_rows, seq * row, width, slots * batch)
            return
        for b in range(batch):
            to, source = target + (b * capacity + length[b]) * row, new_rows + b * seq * row
            stream.copy_rows(to, batch * capacity * row, source, slot_stride, count[b] * row, slots)

    def reserve(self, tokens: int) -> None:
        """Nothing yet: attention reads all rows there are, so they come with the tokens, from memory planned at load."""

    def keep(self, rows: list[int]) -> None:
        """Goes on with these sequences; see Sequences."""
        with self._executor.lock:
            before, length = self._open_buffer(), self._length[rows]
            capacity = self._layout.capacity(int(length.max()))
            kept = self._new_buffer(len(rows), capacity)
            row, batch = self._layout.row_bytes, len(self._length)
            for i, b in enumerate(rows):
                self._executor.stream.copy_rows(
                    kept.address + i * capacity * row,
                    len(rows) * capacity * row,
                    before.address + b * self._capacity * row,
                    batch * self._capacity * row,
                    int(length[i]) * row,
                    self._slots,
                )
            before.close()
            self._buffer, self._capacity, self._length = kept, capacity, length

    def _reserve(self, needed: int) -> None:
        if needed <= self._capacity:
            return
        before, capacity = self._open_buffer(), self._layout.capacity(needed, self._capacity)
        batch, row = len(self._length), self._layout.row_bytes
        grown = self._new_buffer(batch, capacity)
        self._executor.stream.copy_rows(
            grown.address,
            capacity * row,
            before.address,
            self._capacity * row,
            int(self._length.max()) * row,
            self._slots * batch,
        )
        before.close()
        self._buffer, self._capacity = grown, capacity

    def _new_buffer(self, batch: int, capacity: int) -> cuda.DeviceBuffer:
        size = self._layout.bytes(self._slots, batch, capacity)
        buffer = cuda.DeviceBuffer(size, f"the cache of {batch} × {capacity} tokens")
        self._executor.stream.fill_zero(buffer.address, size)
        return buffer

    def _open_buffer(self) -> cuda.DeviceBuffer:
        if self._buffer is None:
            raise BackendError("the sequences are closed; start new ones")
        return self._buffer

    def close(self) -> None:
        """Frees the cache; may be called again."""
        with self._executor.lock:
            if self._buffer is not None:
                self._buffer.close()
                self._buffer = None
