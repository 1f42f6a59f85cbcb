"""Sequences whose cache lies in device memory: read there by the model, its new rows appended on the device.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtimes import cuda
from runtimes.backend import Array, Int64, Likeliest, Logits, NewTokens, StepInput, StepOutput, StopSignal
from runtimes.device_step import Arrays, DeviceExecutor, NewRows, Then
from runtimes.dtypes import CACHE_STORAGE, convert
from runtimes.errors import BackendError
from runtimes.step_tensors import StepShape


class DeviceSequences:
    """A cache as CacheLayout says, whose capacity grows by buckets. Rows that hold no token are zero or of tokens dropped since:
    always finite numbers. rows: to make room for at once. capacity: rows there are instead of what the layout says. Made by a
    backend's start(). Raises OutOfDeviceMemory, and MemoryLimitError beyond the executor's budget, here and as it grows."""

    def __init__(
        self, executor: DeviceExecutor[Any], batch: int, slots: int, rows: int = 0, capacity: int | None = None
    ) -> None:
        self._executor, self._layout, self._slots, self._rows = executor, executor.layout, slots, rows
        self._share = executor.budget.share()
        self._length: Int64 = np.zeros(batch, dtype=np.int64)
        self._capacity = capacity or self._layout.capacity(rows)
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

    def fill(self, parts: Sequence[Array], length: Int64) -> None:
        """Replaces the cache by rows [slots, B, rows, W], and scales [slots, B, rows] of an int8 one, of which sequence b has
        length[b]; the sequences' length stays as it is."""
        slots, batch, count = parts[0].shape[:3]
        dead = np.arange(count) >= length[:, None]
        for part, offset in zip(parts, self._layout.offsets(slots, batch, self._capacity), strict=False):
            padded = np.zeros((slots, batch, self._capacity, *part.shape[3:]), dtype=part.dtype)
            padded[:, :, :count] = part
            padded[:, :, :count][:, dead] = 0
            self._executor.stream.upload(self.address + offset, padded)

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
        executor, longest = self._executor, int((self._length + new.counts).max())
        with executor.lock:
            then = None if executor.appends else self._appending(seq, new.counts, longest)
            if executor.appends:
                self._reserve(longest)
            k, loops = new.positions.shape[1], int(new.n_loops.max())
            shape = StepShape(batch, seq, self._capacity, k, self._slots, loops)
            values = {
                "input_ids": new.ids,
                "past_len": self._length,
                "logit_positions": new.positions,
                "n_loops": new.n_loops,
                "counts": new.counts,
            }
            out = executor.run(shape, self.address, values, greedy=greedy, stop=stop, then=then)
            self._length = self._length + new.counts
            return out

    def _appending(self, seq: int, counts: Int64, longest: int) -> Then:
        """Room is made while the step runs: a longer cache would be read whole."""

        def append(new_rows: list[NewRows]) -> None:
            self._reserve(longest)
            places = self._places(self.address, len(counts), self._capacity)
            for rows, (target, row) in zip(new_rows, places, strict=True):
                self._append(rows, target, row, seq, counts)

        return append

    def _append(self, new_rows: NewRows, target: int, row: int, seq: int, counts: Int64) -> None:
        """Copies the first counts[b] of each slot's new rows [B, S] behind sequence b's, on the stream. row: bytes."""
        stream, batch, capacity, slots = self._executor.stream, len(counts), self._capacity, self._slots
        length, count = self._length.tolist(), counts.tolist()
        if new_rows.slot_stride == batch * seq * row and len(set(length)) == len(set(count)) == 1:
            # One copy for all: from sequence to sequence and from slot to slot it is equally far.
            to, width = target + length[0] * row, count[0] * row
            stream.copy_rows(to, capacity * row, new_rows.address, seq * row, width, slots * batch)
            return
        for b in range(batch):
            to, source = target + (b * capacity + length[b]) * row, new_rows.address + b * seq * row
            stream.copy_rows(to, batch * capacity * row, source, new_rows.slot_stride, count[b] * row, slots)

    def reserve(self, tokens: int) -> None:
        """Nothing yet: rows come with the tokens, from memory planned before."""

    def keep(self, rows: list[int]) -> None:
        """Goes on with these sequences; see Sequences."""
        with self._executor.lock:
            length = self._length[rows]
            capacity = self._layout.capacity(max(int(length.max()), self._rows))
            self._lay_out(rows, capacity)
            self._length = length

    def _reserve(self, needed: int) -> None:
        if min(needed, self._layout.capacities.max) > self._capacity:
            batch = len(self._length)
            self._lay_out(list(range(batch)), self._layout.capacity(needed, self._capacity))

    def _lay_out(self, sequences: list[int], capacity: int) -> None:
        """Moves these sequences to a new buffer of that capacity."""
        before, batch, count = self._open_buffer(), len(self._length), len(sequences)
        live = np.minimum(self._length, self._capacity).tolist()
        after = self._new_buffer(count, capacity)
        places = zip(
            self._places(after.address, count, capacity),
            self._places(before.address, batch, self._capacity),
            strict=True,
        )
        for (target, row), (source, _) in places:
            for i, b in enumerate(sequences):
                self._executor.stream.copy_rows(
                    target + i * capacity * row,
                    count * capacity * row,
                    source + b * self._capacity * row,
                    batch * self._capacity * row,
                    live[b] * row,
                    self._slots,
                )
        before.close()
        self._buffer, self._capacity = after, capacity

    def _places(self, address: int, batch: int, capacity: int) -> list[tuple[int, int]]:
        """Where the parts of a cache lie, and bytes of a row of each."""
        offsets = self._layout.offsets(self._slots, batch, capacity)
        return [(address + offset, row) for offset, row in zip(offsets, self._layout.parts, strict=False)]

    def _new_buffer(self, batch: int, capacity: int) -> cuda.DeviceBuffer:
        size, what = self._layout.bytes(self._slots, batch, capacity), f"the cache of {batch} × {capacity} tokens"
        with self._share.allocating(size, what):
            buffer = cuda.DeviceBuffer(size, what)
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
                self._share.resize(0, "nothing")


def run_once(
    executor: DeviceExecutor[Any], cache_dtype: str, step: StepInput, stop: StopSignal, *, exact: bool = False
) -> StepOutput:
    """One step over a cache that is given, in the host's memory: for comparing. exact: with the capacity that it has there. past_kv
    is float32 where the cache is bfloat16, and so is new_kv. Raises what the executor's run does."""
    slots, batch, rows, width = step.past_kv.shape
    seq, k = step.input_ids.shape[1], step.logit_positions.shape[1]
    given = "float32" if cache_dtype == "bfloat16" else cache_dtype
    shapes = [((slots, batch, seq, width), CACHE_STORAGE[cache_dtype]), ((slots, batch, seq), np.float32)]
    new_parts = [np.empty(*shape_and_dtype) for shape_and_dtype in shapes[: len(executor.layout.parts)]]

    def download(new_rows: list[NewRows]) -> None:
        for part, (address, slot_stride) in zip(new_parts, new_rows, strict=True):
            padded = executor.stream.download(address, np.uint8, (slots, slot_stride))
            part[...] = padded[:, : part[0].nbytes].copy().view(part.dtype).reshape(part.shape)

    with executor.lock:
        sequences = DeviceSequences(executor, batch, slots, rows, max(rows, 1) if exact else None)
        try:
            past = [step.past_kv if cache_dtype == given else convert(step.past_kv, given, cache_dtype)]
            sequences.fill([*past, step.past_scale] if step.past_scale is not None else past, step.past_len)
            shape = StepShape(batch, seq, sequences.capacity, k, slots, int(step.n_loops.max()))
            names = ("input_ids", "past_len", "logit_positions", "n_loops")
            values = {name: getattr(step, name) for name in names} | {"counts": np.zeros(batch, np.int64)}
            out = executor.run(shape, sequences.address, values, greedy=False, stop=stop, then=download)
        finally:
            sequences.close()
    new_kv = new_parts[0] if cache_dtype == given else convert(new_parts[0], cache_dtype, given)
    exit_loop = out["exit_loop"].astype(np.int64, copy=False)
    return StepOutput(out["logits"], new_kv, exit_loop, new_parts[1] if len(new_parts) > 1 else None)
