"""mythos/runtime.h through ctypes: what a program in any language sees of the library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

OK, CANCELLED, INPUT, BUNDLE, BACKEND, MEMORY = range(6)
FINISH = ("none", "length", "eos", "stop", "context", "cancelled")


class Options(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("threads", c_int32),
        ("native", c_int32),
        ("operators_library", c_char_p),
        ("memory_limit", c_uint64),
        ("prefill_chunk", c_int64),
    )


class Info(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        *(
            (name, c_int64)
            for name in ("vocab_size", "max_seq_len", "loops", "max_loops", "default_loops", "cache_bytes_per_token")
        ),
        ("weight_bytes", c_uint64),
        ("native", c_int32),
        ("backend", c_char_p),
        ("has_text", c_int32),
        ("window", c_int64),
    )


class Token(ctypes.Structure):
    _fields_ = (
        ("id", c_int64),
        ("logprob", c_double),
        ("index", c_int64),
        ("text", c_void_p),
        ("text_size", c_size_t),
    )

    @property
    def utf8(self) -> bytes:
        return ctypes.string_at(self.text, self.text_size)


class Request(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("max_new_tokens", c_int64),
        ("temperature", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
        ("repetition_penalty", c_double),
        ("seed", c_uint64),
        ("stop_ids", POINTER(c_int64)),
        ("n_stop_ids", c_size_t),
        ("ignore_eos", c_int32),
        ("n_loops", POINTER(c_int64)),
        ("stop_texts", POINTER(c_char_p)),
        ("n_stop_texts", c_size_t),
    )


class Stats(ctypes.Structure):
    _fields_ = (
        ("size", c_size_t),
        ("prompt_tokens", c_int64),
        ("new_tokens", c_int64),
        ("prefill_seconds", c_double),
        ("decode_seconds", c_double),
        ("decode_tokens", c_int64),
        ("mean_exit_loop", c_double),
    )


CALLBACK = ctypes.CFUNCTYPE(c_int32, POINTER(Token), c_void_p)


class CError(Exception):
    """A call that did not return MYTHOS_OK."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def ints(values: Sequence[int]) -> Any:
    return (c_int64 * len(values))(*values)


def rows_of(rows: Sequence[Sequence[int]]) -> tuple[Any, Any, list[Any]]:
    """Pointers, lengths, and what the pointers live by."""
    held = [ints(row) for row in rows]
    return (c_void_p * len(rows))(*map(ctypes.addressof, held)), (c_size_t * len(rows))(*map(len, rows)), held


class Library:
    """libmythos_runtime, its statuses turned into CError."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.mythos_last_error.restype = self.c.mythos_version.restype = c_char_p
        self.c.mythos_abi_version.restype = c_uint32
        self.c.mythos_stats_json.restype = c_size_t
        for name in (
            "mythos_runner_close",
            "mythos_session_close",
            "mythos_session_cancel",
            "mythos_text_stream_close",
        ):
            getattr(self.c, name).argtypes = [c_void_p]
            getattr(self.c, name).restype = None

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self.c, name)(*args)
        if status != OK:
            raise CError(status, self.c.mythos_last_error().decode())

    def open(self, bundle: Path | str, **options: Any) -> CRunner:
        wanted = Options()
        self.c.mythos_options_init(byref(wanted))
        for name, value in options.items():
            setattr(wanted, name, value)
        handle = c_void_p()
        self.call("mythos_runner_open", str(bundle).encode(), byref(wanted), byref(handle))
        return CRunner(self, handle)


class CRunner:
    def __init__(self, library: Library, handle: c_void_p) -> None:
        self.library, self.handle = library, handle
        self.info = Info(size=ctypes.sizeof(Info))
        library.call("mythos_runner_info", handle, byref(self.info))

    def close(self) -> None:
        self.library.c.mythos_runner_close(self.handle)

    def generate(
        self, prompts: Sequence[Sequence[int]], tell: Callable[[Token], int | None] = lambda token: 0, **request: Any
    ) -> tuple[int, list[list[int]], list[str], Stats]:
        """Status, ids and finish of each, and statistics."""
        wanted = Request()
        self.library.c.mythos_request_init(byref(wanted))
        if "stop_ids" in request:
            wanted.n_stop_ids = len(request["stop_ids"])
        if "stop_texts" in request:
            texts = [text.encode() for text in request.pop("stop_texts")]
            wanted.stop_texts, wanted.n_stop_texts = (c_char_p * len(texts))(*texts), len(texts)
        for name, value in request.items():
            setattr(wanted, name, ints(value) if name in ("stop_ids", "n_loops") else value)
        ids: list[list[int]] = [[] for _ in prompts]

        def heard(token: Any, user: Any) -> int:
            ids[token[0].index].append(token[0].id)
            return tell(token[0]) or 0

        pointers, lengths, _held = rows_of(prompts)
        finish, stats = (c_int32 * len(prompts))(), Stats(size=ctypes.sizeof(Stats))
        status = self.library.c.mythos_generate(
            self.handle,
            pointers,
            lengths,
            c_int64(len(prompts)),
            byref(wanted),
            CALLBACK(heard),
            None,
            finish,
            byref(stats),
        )
        if status not in (OK, CANCELLED):
            raise CError(status, self.library.c.mythos_last_error().decode())
        return status, ids, [FINISH[reason] for reason in finish], stats

    def score(self, ids: Sequence[int], n_loops: int = 0) -> np.ndarray:
        logprobs = (c_double * max(len(ids) - 1, 1))()
        self.library.call("mythos_score", self.handle, ints(ids), c_size_t(len(ids)), c_int64(n_loops), logprobs)
        return np.array(logprobs)

    def step_bytes(self, batch: int, tokens: int, past_len: float, n_loops: int = 0) -> float:
        n_bytes = c_double()
        arguments = (c_int64(batch), c_int64(tokens), c_double(past_len), c_int64(n_loops))
        self.library.call("mythos_step_bytes", self.handle, *arguments, byref(n_bytes))
        return n_bytes.value

    def encode(self, text: bytes) -> list[int]:
        n, room = c_size_t(), len(text) + 1
        ids = (c_int64 * room)()
        self.library.call("mythos_encode", self.handle, text, c_size_t(len(text)), ids, c_size_t(room), byref(n))
        return ids[: n.value]

    def decode(self, ids: Sequence[int]) -> str:
        size, given = c_size_t(), (self.handle, ints(ids), c_size_t(len(ids)))
        self.library.call("mythos_decode", *given, None, c_size_t(0), byref(size))
        text = ctypes.create_string_buffer(size.value)
        self.library.call("mythos_decode", *given, text, size, byref(size))
        return text.raw.decode()

    def stream(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text."""
        stream, text, size = c_void_p(), c_void_p(), c_size_t()
        self.library.call("mythos_text_stream_open", self.handle, byref(stream))
        added = []
        for i, token in enumerate(ids):
            last = c_int32(i == len(ids) - 1)
            self.library.call("mythos_text_stream_add", stream, c_int64(token), last, byref(text), byref(size))
            added.append(ctypes.string_at(text, size.value).decode())
        self.library.c.mythos_text_stream_close(stream)
        return added

    def session(self, batch: int = 1, n_loops: Sequence[int] | None = None) -> CSession:
        handle = c_void_p()
        depths = None if n_loops is None else ints(n_loops)
        self.library.call("mythos_session_open", self.handle, c_int64(batch), depths, byref(handle))
        return CSession(self, handle, batch)


class CSession:
    def __init__(self, runner: CRunner, handle: c_void_p, batch: int) -> None:
        self.runner, self.handle, self.batch = runner, handle, batch

    def _call(self, name: str, *args: Any) -> None:
        self.runner.library.call(f"mythos_session_{name}", self.handle, *args)

    def advance(self, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        logits = np.empty((self.batch, self.runner.info.vocab_size), np.float32)
        exit_loop = np.empty(self.batch, np.int64)
        pointers, lengths, _held = rows_of(ids)
        self._call(
            "advance",
            pointers,
            lengths,
            logits.ctypes.data_as(POINTER(c_float)),
            exit_loop.ctypes.data_as(POINTER(c_int64)),
        )
        return logits, exit_loop

    @property
    def past_len(self) -> list[int]:
        length = (c_int64 * self.batch)()
        self._call("past_len", length)
        return list(length)

    def lower_n_loops(self, n_loops: Sequence[int]) -> None:
        self._call("lower_n_loops", ints(n_loops))

    def keep(self, rows: Sequence[int]) -> None:
        self._call("keep", ints(rows), c_size_t(len(rows)))
        self.batch = len(rows)

    def cancel(self) -> None:
        self.runner.library.c.mythos_session_cancel(self.handle)

    def resume(self) -> None:
        self._call("resume")

    def close(self) -> None:
        self.runner.library.c.mythos_session_close(self.handle)
