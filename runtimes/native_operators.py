"""The native kernels of the ai.mythos operators: a custom-operator library for onnxruntime, used where it has been built."""

from __future__ import annotations

import ctypes
from functools import cache

from runtimes.native_library import is_checkout, library_path

LIBRARY = library_path("mythos_ops")


@cache
def _library() -> ctypes.CDLL | None:
    if not LIBRARY.is_file():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    library.mythos_instruction_set.restype = ctypes.c_char_p
    library.mythos_use_instruction_set.argtypes = [ctypes.c_char_p]
    return library


def is_available() -> bool:
    """Whether the library has been built for this installation."""
    return LIBRARY.is_file()


def remedy() -> str:
    """What to do where the library is missing or does not fit."""
    if is_checkout():
        return "run: make native"
    return (
        "with a C++17 compiler at hand, run in the source of mythos-export: "
        "pip install --verbose --force-reinstall --no-deps . (it builds the library, or says what is missing)"
    )


def instruction_set() -> str | None:
    """What the kernels use on this processor: "avx512", "avx2", "neon" or "scalar"; None without the library."""
    library = _library()
    return library.mythos_instruction_set().decode() if library else None


def use_instruction_set(name: str) -> bool:
    """Uses another one in the whole process, for tests; False where the processor lacks it or there is no library."""
    library = _library()
    return bool(library and library.mythos_use_instruction_set(name.encode()))
