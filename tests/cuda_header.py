"""The structs of the CUDA kernels' C interface for ctypes, read from the header itself."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

HEADER = Path(__file__).parent.parent / "runtimes" / "native" / "cuda" / "mythos_cuda.h"
_TYPES = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def _fields(body: str) -> list[tuple[str, type]]:
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind = ctypes.c_void_p if "*" in declaration else _TYPES[declaration.split()[0]]
        fields += [(re.findall(r"\w+", name)[-1], kind) for name in declaration.split(",")]
    return fields


_TEXT = re.sub(r"//.*", "", HEADER.read_text())
# Of mythos_cuda_linear and so on, by what follows mythos_cuda_.
STRUCTS: dict[str, type[ctypes.Structure]] = {
    name: type(name, (ctypes.Structure,), {"_fields_": _fields(body)})
    for name, body in re.findall(r"typedef struct mythos_cuda_(\w+) \{(.*?)\}", _TEXT, re.DOTALL)
}
# Numbers of dtypes, by their names.
DTYPES = {name.lower(): int(number) for name, number in re.findall(r"#define MYTHOS_CUDA_(B?[A-Z]+\d+) (\d)", _TEXT)}
