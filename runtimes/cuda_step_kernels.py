"""The CUDA kernels that end a step on onnxruntime: new rows into the cache, the likeliest tokens out of the logits.

Shape letters: B batch, S new tokens, C capacity of the cache, N rows of logits, V vocab_size.
"""

from __future__ import annotations

import ctypes

from runtimes import cuda_kernels
from runtimes.errors import BackendError


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


class StepKernels:
    """Those of the loaded library. append, likeliest: put a call on a stream, and raise BackendError where CUDA refuses it; they
    neither allocate nor wait. Raises BackendError, with what to do, where the library is missing or older than they are."""

    def __init__(self) -> None:
        kernels = cuda_kernels.find()
        try:
            self.append = kernels.launch_function("append", Append, "the cache's new rows")
            self.likeliest = kernels.launch_function("likeliest", Likeliest, "the choice of tokens")
            self._likeliest_workspace = kernels.workspace_function("likeliest", Likeliest)
        except AttributeError as error:
            raise BackendError(f"the CUDA kernels cannot be used: {error}; {cuda_kernels.build_remedy()}") from error

    def likeliest_workspace(self, rows: int, vocab: int) -> int:
        """Bytes of device memory that the choice needs."""
        return self._likeliest_workspace(likeliest_call(rows, vocab))


def append_call(slots: int, batch: int, seq: int, capacity: int, row_bytes: int, **addresses: int) -> Append:
    """addresses: of new_rows, rows, past_len and counts."""
    return Append(ctypes.sizeof(Append), slots, batch, seq, capacity, row_bytes, **addresses)


def likeliest_call(rows: int, vocab: int, **addresses: int) -> Likeliest:
    """addresses: of logits, tokens, logprobs and workspace, and workspace_bytes."""
    return Likeliest(ctypes.sizeof(Likeliest), rows, vocab, **addresses)
