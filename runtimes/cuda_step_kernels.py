"""The CUDA kernels around a step on onnxruntime: new rows into the cache, tokens out of the logits, and into the next step.

Shape letters: B batch, S new tokens, C capacity of the cache, N rows of logits, V vocab_size.
"""

from __future__ import annotations

import ctypes

from runtimes import cuda_kernels
from runtimes.errors import BackendError
from runtimes.sampling import Sampling


class Append(ctypes.Structure):
    """mythos_cuda_append of the library: the first counts[b] of new_rows [slots, B, S] into rows [slots, B, C], from past_len[b]
    on, modulo C (of more than C, the last); all of them rows of row_bytes. past_len, counts: [B] int64."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("slots", "batch", "seq", "capacity")),
        ("row_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("new_rows", "rows", "past_len", "counts")),
    )


class Likeliest(ctypes.Structure):
    """mythos_cuda_likeliest of the library: of logits [N, V] float32 the largest of each row, the lowest among equals: tokens [N]
    int64, and logprobs [N] float32, its natural log-probability."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("rows", "vocab")),
        *((name, ctypes.c_void_p) for name in ("logits", "tokens", "logprobs", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
    )


class Choose(ctypes.Structure):
    """mythos_cuda_choose of the library: from logits [N, V] float32, by the settings of Sampling, tokens [N] int64, -1 where one is
    drawn from what is no number, and logprobs [N] float32 of the logits as they are. seen [N, ceil(V / 32)]: bits of the tokens
    under a penalty, or null. random [N]: states of SplitMix64, which go on."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("rows", "vocab", "top_k")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
        *((name, ctypes.c_void_p) for name in ("logits", "seen", "random", "tokens", "logprobs", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
    )


class Advance(ctypes.Structure):
    """mythos_cuda_advance of the library: past_len [B] += counts [B], and input_ids [B] = tokens [B], all int64."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("batch", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("past_len", "counts", "tokens", "input_ids")),
    )


class StepKernels:
    """Those of the loaded library. append, likeliest, choose, advance: put a call on a stream, and raise BackendError where CUDA
    refuses it; they neither allocate nor wait. Raises BackendError, with what to do, where the library is missing or older than
    they are."""

    def __init__(self) -> None:
        kernels = cuda_kernels.find()
        try:
            self.append = kernels.launch_function("append", Append, "the cache's new rows")
            self.likeliest = kernels.launch_function("likeliest", Likeliest, "the choice of tokens")
            self.choose = kernels.launch_function("choose", Choose, "the choice of tokens")
            self.advance = kernels.launch_function("advance", Advance, "what the next step reads")
            self._likeliest_workspace = kernels.workspace_function("likeliest", Likeliest)
            self._choose_workspace = kernels.workspace_function("choose", Choose)
        except AttributeError as error:
            raise BackendError(f"the CUDA kernels cannot be used: {error}; {cuda_kernels.build_remedy()}") from error

    def choice_workspace(self, rows: int, vocab: int) -> int:
        """Bytes of device memory that either choice needs."""
        return max(
            self._likeliest_workspace(likeliest_call(rows, vocab)), self._choose_workspace(choose_call(rows, vocab))
        )

    def draws_from(self, vocab: int) -> bool:
        """Whether tokens of so large a vocabulary can be drawn."""
        return self._choose_workspace(choose_call(1, vocab)) > 0


def append_call(slots: int, batch: int, seq: int, capacity: int, row_bytes: int, **addresses: int) -> Append:
    """addresses: of new_rows, rows, past_len and counts."""
    return Append(ctypes.sizeof(Append), slots, batch, seq, capacity, row_bytes, **addresses)


def likeliest_call(rows: int, vocab: int, **addresses: int) -> Likeliest:
    """addresses: of logits, tokens, logprobs and workspace, and workspace_bytes."""
    return Likeliest(ctypes.sizeof(Likeliest), rows, vocab, **addresses)


def choose_call(rows: int, vocab: int, sampling: Sampling = Sampling(), **addresses: int) -> Choose:
    """addresses: of logits, seen (with a repetition penalty alone), random, tokens, logprobs and workspace, and workspace_bytes."""
    settings = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    return Choose(ctypes.sizeof(Choose), rows, vocab, min(sampling.top_k, vocab), *settings, **addresses)


def advance_call(batch: int, **addresses: int) -> Advance:
    """addresses: of past_len, counts, tokens and input_ids."""
    return Advance(ctypes.sizeof(Advance), batch, **addresses)
