"""Calls of the CUDA kernels on a GPU: torch holds the memory. Whoever imports this skips where the kernels cannot run.

MYTHOS_TEST_QUICK=1 takes few cases, for compute-sanitizer.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
from cuda_header import DTYPES, STRUCTS
from hypothesis import settings

from runtimes.native_library import library_path

if not library_path("mythos_cuda").is_file():  # asked first: importing torch takes seconds
    pytest.skip("needs the CUDA kernels; run: make cuda", allow_module_level=True)
torch = pytest.importorskip("torch", reason="needs torch for memory on the GPU")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU, and torch with CUDA", allow_module_level=True)

DEVICE = "cuda"
QUICK = os.environ.get("MYTHOS_TEST_QUICK", "0") != "0"
FLOATS = ("float32", "float16", "bfloat16")
LIMITS = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}  # of an error, by the dtype of what is multiplied with
RANDOM = settings(max_examples=3 if QUICK else 40, deadline=None, derandomize=True)
_GUARD = 256  # bytes behind what a kernel writes


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def some(cases: Sequence[Any], quick: int = 3) -> Sequence[Any]:
    """All cases, or as many as are to be run with MYTHOS_TEST_QUICK."""
    return cases[:quick] if QUICK else cases


def sizes(names: str, rows: str, quick: int = 3) -> list[Any]:
    """Cases of a test: sizes by the names of a call's fields. rows: parted by commas."""
    cases = [dict(zip(names.split(), map(int, row.split()), strict=True)) for row in rows.split(",")]
    return [pytest.param(case, id="-".join(map(str, case.values()))) for case in some(cases, quick)]


def parse(text: str, separator: str | None = None) -> dict[str, Any]:
    """Fields as "name=value name=value", values numbers or names of dtypes."""
    pairs = (pair.split("=") for pair in text.split(separator))
    return {name: value if value[0].isalpha() else int(value) for name, value in pairs}


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path("mythos_cuda")))
    loaded.mythos_cuda_error.restype = ctypes.c_char_p
    return loaded


class Call:
    """A call of mythos_cuda_<kind>_launch. fields: of its struct, where tensors stand for their addresses (empty ones for null) and
    names for dtypes. Where it needs a workspace and is given none, it gets one full of NaN. Keeps its tensors."""

    def __init__(self, kind: str, **fields: Any) -> None:
        struct = STRUCTS[kind]
        self.names = {name for name, _ in struct._fields_}
        assert fields.keys() <= self.names, f"{kind} has no {fields.keys() - self.names}"
        self.kind, self._kept = kind, [value for value in fields.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.is_contiguous() for tensor in self._kept)
        self.struct = struct(**{"size": ctypes.sizeof(struct)} | {name: _plain(fields[name]) for name in fields})
        if "workspace" in self.names - fields.keys():
            size = self.workspace_bytes()
            assert size > 0, f"{kind} takes no such sizes: {fields}"
            self._kept.append(blank(size, dtype=torch.uint8))
            self.struct.workspace, self.struct.workspace_bytes = self._kept[-1].data_ptr(), size

    def workspace_bytes(self) -> int:
        """0: it takes no such sizes."""
        function = getattr(library(), f"mythos_cuda_{self.kind}_workspace")
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_uint64
        return int(function(ctypes.byref(self.struct)))

    def enqueue(self) -> int:
        """Puts it on torch's current stream; the error."""
        function = getattr(library(), f"mythos_cuda_{self.kind}_launch")
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int32
        return int(function(ctypes.byref(self.struct), torch.cuda.current_stream().cuda_stream))

    def run(self) -> None:
        """Waits for it as well; nothing may be written behind an output."""
        error = self.enqueue()
        assert error == 0, f"{self.kind}: {library().mythos_cuda_error(error)}"
        torch.cuda.synchronize()
        for tensor in self._kept:
            assert bool((getattr(tensor, "guard", tensor[:0]) == 255).all()), (
                f"{self.kind} writes behind {tensor.shape}"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() if value.numel() else None
    return DTYPES[value] if isinstance(value, str) else value


def blank(*shape: int, dtype: Any = torch.float32) -> Any:
    """What a kernel is to fill: NaN, or -1."""
    size = math.prod(shape) * dtype.itemsize
    raw = torch.full((size + _GUARD,), 255, dtype=torch.uint8, device=DEVICE)
    tensor = raw[:size].view(dtype).view(shape)
    tensor.guard = raw[size:]
    return tensor


def normal(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
    return (torch.randn(*shape, device=DEVICE) * scale).to(getattr(torch, dtype))


def norm_weight(dim: int) -> Any:
    return 1 + normal(dim, scale=0.1)


def integers(low: int, high: int, *shape: int) -> Any:
    return torch.randint(low, high, shape, device=DEVICE)


def error(got: Any, want: Any) -> float:
    """Norm of the difference, of the norm of what is wanted."""
    return float((got.double() - want).norm() / want.norm())


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    x = x.double()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight.double()


class Form(NamedTuple):
    """How a matrix is stored. block: numbers that share a scale, 0 where there are none."""

    dtype: str
    scale_dtype: str = "float32"
    block: int = 0

    @property
    def packed(self) -> int:
        """Numbers a byte or item."""
        return 2 if self.dtype == "int4" else 1

    def is_few(self, tokens: int, *columns: int) -> bool:
        """Whether quantized weights stay exact."""
        return tokens <= 4 or any(each % 8 or each // self.packed % 16 for each in columns)

    def weights(self, *shape: int) -> tuple[Any, Any, Any]:
        """Random ones: as stored, their scales (empty where there are none), and what they stand for in float64."""
        *rows, columns = shape
        if not self.block:
            stored = normal(*shape, dtype=self.dtype, scale=columns**-0.5)
            return stored, stored[:0], stored.double()
        if self.dtype == "float8":
            stored, most = (normal(*shape) * 100).clamp(-448, 448).to(torch.float8_e4m3fn), 150.0
            raw, numbers = stored.view(torch.uint8), stored.double()
        else:
            most = 8 if self.dtype == "int4" else 128
            numbers = integers(-most, most, *shape).double()
            raw, most = numbers.to(torch.int8).view(torch.uint8), most / 1.7
        if self.packed == 2:
            raw = raw[..., 0::2] & 15 | (raw[..., 1::2] & 15) << 4
        scales = (torch.rand(*rows, -(-columns // self.block), device=DEVICE) + 0.5) * columns**-0.5 / most
        scales = scales.to(getattr(torch, self.scale_dtype))
        return raw.contiguous(), scales, numbers * scales.double().repeat_interleave(self.block, -1)[..., :columns]


_QUANTIZED = [
    Form(dtype, scale_dtype, block)
    for dtype, scale_dtype, block in (
        ("int4", "float16", 32),
        ("int8", "float32", 32),
        ("float8", "float16", 64),
        ("int4", "float32", 64),
        ("int8", "float16", 128),
    )
]
_OTHERS = [
    Form(dtype, scale_dtype, block)
    for dtype in ("int4", "int8", "float8")
    for block in (32, 64, 128)
    for scale_dtype in ("float16", "float32")
    if Form(dtype, scale_dtype, block) not in _QUANTIZED
]
FORMS = [*map(Form, FLOATS), *some([*_QUANTIZED, *_OTHERS])]
