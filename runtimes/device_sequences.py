"""Sequences whose cache lies in device memory: read there by the model, its new rows appended on the device.

Shape letters: B batch, S new tokens, C capacity and W width of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtimes import cuda
from runtimes.arrays import Array, Int64
from runtimes.backend import Logits, NewTokens, StepInput, StepOutput, StopSignal, chosen_of
from runtimes.choosing import Chooser, Chosen, Rows
from runtimes.device_step import Arrays, Choice, DeviceExecutor, NewRows, Step, Then
from runtimes.dtypes import CACHE_STORAGE, convert
from runtimes.errors import BackendError
from runtimes.sampling import NO_NUMBERS
from runtimes.step_tensors import StepShape


class _Ahead(NamedTuple):
    """A step put on the stream before it is asked for. ids [B, 1]: what it is fed; n_loops [B]; random [B]: states of the random
    numbers that its tokens are drawn with."""

    step: Step
    ids: Int64
    n_loops: Int64
    random: NDArray[np.uint64]

    def is_for(self, new: NewTokens, chooser: Chooser) -> bool:
        """Whether it is the step that adds `new`."""
        choice = self.step.choice
        if choice is None or choice.sampling != chooser.sampling or not np.array_equal(new.n_loops, self.n_loops):
            return False
        is_fed = np.array_equal(new.ids, self.ids) and bool((new.counts == 1).all())
        draws = chooser.sampling.temperature > 0
        return is_fed and not (draws and (chooser.random_states() != self.random).any())


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
        self._ahead: _Ahead | None = None
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
        out = self._step(new, None, stop)
        return Logits(out["logits"], out["exit_loop"].astype(np.int64, copy=False))

    def step_choosing(self, new: NewTokens, chooser: Chooser, rows: Rows, stop: StopSignal, *, more: bool) -> Chosen:
        """Adds tokens; the next ones are chosen on the device where it can, and the logits stay there."""
        if not self._executor.chooses(chooser.sampling):
            return chosen_of(self.step(new, stop), chooser, rows)
        out = self._step(new, chooser, stop, more=more)
        tokens, exit_loop = (out[name].astype(np.int64, copy=False) for name in ("next_token", "exit_loop"))
        if (tokens[rows, 0] < 0).any():
            raise BackendError(NO_NUMBERS)
        chooser.drawn(rows)
        return Chosen(tokens[:, 0], out["next_logprob"][:, 0].astype(np.float64), exit_loop)

    def _step(self, new: NewTokens, chooser: Chooser | None, stop: StopSignal, *, more: bool = False) -> Arrays:
        with self._executor.lock:
            step = self._taken_ahead(new, chooser, stop) or self._start(new, chooser, stop)
            following = self._follow(step, new) if more and chooser is not None else None
            out = self._executor.finish(step)
            self._length = self._length + new.counts
            if following is not None and chooser is not None:
                self._ahead = _Ahead(following, out["next_token"], new.n_loops, chooser.random_states(draws=1))
            return out

    def _start(self, new: NewTokens, chooser: Chooser | None, stop: StopSignal) -> Step:
        self._drop_ahead()
        executor, longest = self._executor, int((self._length + new.counts).max())
        then = None if executor.appends else self._appending(new.ids.shape[1], new.counts, longest)
        if executor.appends:
            self._reserve(longest)
        (batch, seq), k, loops = new.ids.shape, new.positions.shape[1], int(new.n_loops.max())
        shape = StepShape(batch, seq, self._capacity, k, self._slots, loops)
        values = {
            "input_ids": new.ids,
            "past_len": self._length,
            "logit_positions": new.positions,
            "n_loops": new.n_loops,
            "counts": new.counts,
        }
        choice = None
        if chooser is not None:
            is_penalized = chooser.sampling.repetition_penalty != 1
            seen = chooser.seen_bits(executor.vocab_size) if is_penalized else None
            choice = Choice(chooser.sampling, chooser.random_states(), seen)
        return executor.start(shape, self.address, values, choice, stop, then)

    def _follow(self, step: Step, new: NewTokens) -> Step | None:
        """The step after one of a token a sequence, where there is room for its rows."""
        longest = int(self._length.max()) + 2
        if new.ids.shape[1] != 1 or (new.counts != 1).any() or self._must_grow(longest):
            return None
        return self._executor.follow(step)

    def _taken_ahead(self, new: NewTokens, chooser: Chooser | None, stop: StopSignal) -> Step | None:
        """The step put on the stream before, where it is the one wanted now."""
        ahead = self._ahead
        if ahead is None or chooser is None or stop.is_set or not ahead.is_for(new, chooser):
            return None
        self._ahead = None
        return ahead.step

    def _drop_ahead(self) -> None:
        """The row that it adds is one that holds no token."""
        if self._ahead is not None:
            self._executor.drop(self._ahead.step)
            self._ahead = None

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
            self._drop_ahead()
            length = self._length[rows]
            capacity = self._layout.capacity(max(int(length.max()), self._rows))
            self._lay_out(rows, capacity)
            self._length = length

    def _must_grow(self, needed: int) -> bool:
        return min(needed, self._layout.capacities.max) > self._capacity

    def _reserve(self, needed: int) -> None:
        if self._must_grow(needed):
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
            self._drop_ahead()
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
            out = executor.finish(executor.start(shape, sequences.address, values, None, stop, download))
        finally:
            sequences.close()
    new_kv = new_parts[0] if cache_dtype == given else convert(new_parts[0], cache_dtype, given)
    exit_loop = out["exit_loop"].astype(np.int64, copy=False)
    return StepOutput(out["logits"], new_kv, exit_loop, new_parts[1] if len(new_parts) > 1 else None)
