"""The CUDA kernels' library in numpy, on fake_cuda: C functions that read their arguments as the header lays them out.

Shape letters: T tokens, D dim, K top_k, E routed and s shared experts, F expert_dim; B batch, S new tokens, C capacity, N rows of
logits, V vocab_size.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cuda_header import STRUCTS
from fake_cuda import ALIGNMENT, FakeCuda

from runtimes import cuda_kernels
from runtimes.dtypes import STORAGE, convert
from runtimes.errors import BackendError
from runtimes.sampling import Sampling, SplitMix64, log_softmax

VERSION = 3
DTYPES = ("float32", "float16", "bfloat16")
_LAYOUT = struct.Struct("@Ii8i12Pf3PQ")  # of mythos_cuda_experts
_APPEND, _LIKELIEST = struct.Struct("@I4iq4P"), struct.Struct("@I2i4PQ")
_REFUSED = 999


class Call(NamedTuple):
    """mythos_cuda_experts."""

    size: int
    dtype: int
    tokens: int
    dim: int
    expert_dim: int
    top_k: int
    routed: int
    shared: int
    scale_dtype: int
    block: int
    normed: int
    chosen: int
    weight: int
    gate_up_routed: int
    down_routed: int
    gate_up_shared: int
    down_shared: int
    gate_up_routed_scales: int
    down_routed_scales: int
    gate_up_shared_scales: int
    down_shared_scales: int
    norm: int
    epsilon: float
    residual: int
    mixed: int
    workspace: int
    workspace_bytes: int


def mixed(
    normed: np.ndarray,
    chosen: np.ndarray,
    weight: np.ndarray,
    routed: tuple[np.ndarray, np.ndarray],
    shared: tuple[np.ndarray, np.ndarray] | None,
) -> np.ndarray:
    """Of normed [T, D], chosen and weight [T, K], the stacks gate_up [E, 2F, D] and down [E, D, F] of each kind: [T, D] float32."""
    out = np.zeros(normed.shape, np.float64)
    for token, x in enumerate(normed.astype(np.float64)):
        for expert, share in zip(chosen[token], weight[token], strict=True):
            out[token] += share * _expert(x, routed[0][expert], routed[1][expert])
        for gate_up, down in zip(*(shared or ((), ())), strict=True):
            out[token] += _expert(x, gate_up, down)
    return out.astype(np.float32)


def _expert(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up.astype(np.float64) @ x, 2)
    return down.astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up)


class AppendCall(NamedTuple):
    """mythos_cuda_append."""

    size: int
    slots: int
    batch: int
    seq: int
    capacity: int
    row_bytes: int
    new_rows: int
    rows: int
    past_len: int
    counts: int


class LikeliestCall(NamedTuple):
    """mythos_cuda_likeliest."""

    size: int
    rows: int
    vocab: int
    logits: int
    tokens: int
    logprobs: int
    workspace: int
    workspace_bytes: int


class FakeCudaKernels:
    """Takes the place of the loaded library. calls: launches so far, those that a CUDA graph recorded once. refuses: makes launches
    fail."""

    def __init__(self, cuda: FakeCuda, version: int = VERSION) -> None:
        self.cuda, self.calls, self.refuses = cuda, list[Call](), False
        function, address = ctypes.CFUNCTYPE, ctypes.c_void_p
        self.mythos_cuda_version = function(ctypes.c_uint32)(lambda: version)
        self.mythos_cuda_experts_workspace = function(ctypes.c_uint64, address)(lambda at: _bytes(_read(at)))
        self.mythos_cuda_experts_launch = function(ctypes.c_int32, address, address)(self._launch)
        self.mythos_cuda_append_launch = function(ctypes.c_int32, address, address)(self._launch_append)
        self.mythos_cuda_likeliest_workspace = function(ctypes.c_uint64, address)(
            lambda at: _likeliest_bytes(_read_as(LikeliestCall, _LIKELIEST, at))
        )
        self.mythos_cuda_likeliest_launch = function(ctypes.c_int32, address, address)(self._launch_likeliest)
        self.mythos_cuda_choose_workspace = function(ctypes.c_uint64, address)(
            lambda at: _draw_bytes(STRUCTS["choose"].from_address(at))
        )
        self.mythos_cuda_choose_launch = function(ctypes.c_int32, address, address)(self._launch_draw)
        self.mythos_cuda_advance_launch = function(ctypes.c_int32, address, address)(self._launch_advance)
        self._text = ctypes.create_string_buffer(b"no kernel image is available")
        self.mythos_cuda_error = function(address, ctypes.c_int32)(lambda _: ctypes.addressof(self._text))

    def _launch(self, at: int, stream: int) -> int:
        call = _read(at)
        self.calls.append(call)
        aligned = all(getattr(call, name) % ALIGNMENT == 0 for name in _ADDRESSES)
        if self.refuses or not aligned or call.tokens < 1 or call.workspace_bytes < _bytes(call):
            return _REFUSED
        self.cuda.put(stream, lambda: self._run(call))
        return 0

    def _run(self, call: Call) -> None:
        self.cuda.check(call.workspace, _bytes(call), "device")
        pairs = (call.tokens, call.top_k)
        result = mixed(
            self._array(call.normed, (call.tokens, call.dim)),
            self._array(call.chosen, pairs, "int32"),
            self._array(call.weight, pairs),
            self._stacks(call, call.gate_up_routed, call.down_routed, call.routed),
            self._stacks(call, call.gate_up_shared, call.down_shared, call.shared) if call.shared else None,
        )
        self._array(call.mixed, result.shape)[...] = result

    def _launch_append(self, at: int, stream: int) -> int:
        call = _read_as(AppendCall, _APPEND, at)
        if self.refuses:
            return _REFUSED
        self.cuda.put(stream, lambda: self._append(call))
        return 0

    def _append(self, call: AppendCall) -> None:
        """Of more rows than there is room for, the last ones."""
        row = (call.row_bytes,)
        new = self._array(call.new_rows, (call.slots, call.batch, call.seq, *row), "uint8")
        rows = self._array(call.rows, (call.slots, call.batch, call.capacity, *row), "uint8")
        past, counts = (self._array(at, (call.batch,), "int64").tolist() for at in (call.past_len, call.counts))
        for b, count in enumerate(counts):
            for i in range(max(0, count - call.capacity), count):
                rows[:, b, (past[b] + i) % call.capacity] = new[:, b, i]

    def _launch_likeliest(self, at: int, stream: int) -> int:
        call = _read_as(LikeliestCall, _LIKELIEST, at)
        if self.refuses or call.workspace_bytes < _likeliest_bytes(call):
            return _REFUSED
        self.cuda.put(stream, lambda: self._likeliest(call))
        return 0

    def _likeliest(self, call: LikeliestCall) -> None:
        self.cuda.check(call.workspace, _likeliest_bytes(call), "device")
        logits = self._array(call.logits, (call.rows, call.vocab)).astype(np.float64)
        tokens = logits.argmax(-1)
        top = logits.max(-1)
        self._array(call.tokens, (call.rows,), "int64")[...] = tokens
        self._array(call.logprobs, (call.rows,))[...] = -np.log(np.exp(logits - top[:, None]).sum(-1))

    def _launch_draw(self, at: int, stream: int) -> int:
        call = STRUCTS["choose"].from_buffer_copy(STRUCTS["choose"].from_address(at))
        if self.refuses or not 0 < _draw_bytes(call) <= call.workspace_bytes:
            return _REFUSED
        self.cuda.put(stream, lambda: self._draw(call))
        return 0

    def _draw(self, call: Any) -> None:
        self.cuda.check(call.workspace, _draw_bytes(call), "device")
        sampling = Sampling(call.temperature, call.top_k, call.top_p, call.min_p, call.repetition_penalty)
        logits, rows = self._array(call.logits, (call.rows, call.vocab)), (call.rows,)
        marked = np.zeros((call.rows, 0), np.uint8)
        if call.seen:
            words = self._array(call.seen, (call.rows, -(-call.vocab // 32)), "uint32")
            marked = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        random, tokens = self._array(call.random, rows, "uint64"), self._array(call.tokens, rows, "int64")
        logprobs = self._array(call.logprobs, rows)
        for row, values in enumerate(logits):
            numbers = SplitMix64(int(random[row]))
            try:
                token = sampling.choose(values, np.flatnonzero(marked[row]).tolist(), numbers)
            except BackendError:
                token = -1
            tokens[row], random[row], logprobs[row] = token, numbers.state_after(0), log_softmax(values)[token]

    def _launch_advance(self, at: int, stream: int) -> int:
        call = STRUCTS["advance"].from_buffer_copy(STRUCTS["advance"].from_address(at))
        if self.refuses:
            return _REFUSED
        self.cuda.put(stream, lambda: self._advance(call))
        return 0

    def _advance(self, call: Any) -> None:
        rows = (call.batch,)
        self._array(call.past_len, rows, "int64")[...] += self._array(call.counts, rows, "int64")
        self._array(call.input_ids, rows, "int64")[...] = self._array(call.tokens, rows, "int64")

    def _stacks(self, call: Call, gate_up: int, down: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
        dtype, shape = DTYPES[call.dtype], (experts, call.dim, call.expert_dim)
        turned = (experts, 2 * call.expert_dim, call.dim)
        first, second = self._array(gate_up, turned, dtype), self._array(down, shape, dtype)
        return convert(first, dtype, "float32"), convert(second, dtype, "float32")

    def _array(self, address: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        kind = np.dtype(STORAGE.get(dtype, dtype))
        size = int(np.prod(shape)) * kind.itemsize
        self.cuda.check(address, size, "device")
        raw = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(raw).view(kind).reshape(shape)


_ADDRESSES = (
    "normed",
    "chosen",
    "weight",
    "gate_up_routed",
    "down_routed",
    "gate_up_shared",
    "down_shared",
    "mixed",
    "workspace",
)


def _read(at: int) -> Call:
    return _read_as(Call, _LAYOUT, at)


def _read_as(kind: Any, layout: struct.Struct, at: int) -> Any:
    call = kind(*layout.unpack(ctypes.string_at(at, layout.size)))
    assert call.size == layout.size
    return call


def _likeliest_bytes(call: LikeliestCall) -> int:
    return 16 * call.rows


def _draw_bytes(call: Any) -> int:
    return 8 * call.rows * call.vocab if call.vocab <= 2**20 else 0


def _bytes(call: Call) -> int:
    """What the fake asks for: the activated rows of every token's experts."""
    return 4 * call.tokens * (call.top_k + call.shared) * call.expert_dim


def install_kernels(monkeypatch: Any, cuda: FakeCuda, version: int = VERSION) -> FakeCudaKernels:
    """Puts a fake library where the real one is loaded."""
    fake = FakeCudaKernels(cuda, version)
    monkeypatch.setattr(cuda_kernels, "_open", lambda _: fake)
    monkeypatch.setattr(cuda_kernels, "LIBRARY", Path(__file__))  # a file that is there
    cuda_kernels.find.cache_clear()
    return fake
