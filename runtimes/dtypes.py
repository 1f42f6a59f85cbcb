"""Numbers as numpy holds them: float32 and float16 as themselves, bfloat16, which it lacks, as the uint16 of its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtimes.errors import BackendError

STORAGE: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int32": np.int32,
    "int64": np.int64,
}
CACHE_STORAGE = {**STORAGE, "int8": np.int8}  # of cache rows


def convert(array: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """An array of one floating dtype as another, rounded to nearest, ties to even. Raises BackendError where a number is too large
    for float16."""
    if source == target:
        return array
    wide = _widened(array) if source == "bfloat16" else array.astype(np.float32)
    if target == "bfloat16":
        return _narrowed(wide)
    if target == "float32":
        return wide
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if np.isinf(narrow).any() and not np.isinf(wide).any():
        raise BackendError("a number of the weights is too large for float16; build the engine with --dtype bfloat16")
    return narrow


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)
