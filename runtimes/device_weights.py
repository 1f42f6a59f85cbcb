"""An engine's weights in device memory: read from the bundle once, in the dtypes the engine wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtimes import cuda
from runtimes.dtypes import STORAGE, convert
from runtimes.engines import Weight

_PIECE = 16 * 2**20  # numbers converted and copied at a time


class DeviceWeights:
    """All weights in one device buffer. addresses: of each, by name. Raises OutOfDeviceMemory."""

    def __init__(self, folder: Path, weights: tuple[Weight, ...], stream: cuda.Stream) -> None:
        offsets, size = {}, 0
        for weight in weights:
            offsets[weight.name] = size
            size += cuda.aligned(weight.device_bytes)
        self._buffer = cuda.DeviceBuffer(size, "the weights")
        self.addresses = {name: self._buffer.address + offset for name, offset in offsets.items()}
        for weight in weights:
            _upload(folder, weight, self.addresses[weight.name], stream)

    def close(self) -> None:
        """Frees them; may be called again."""
        self._buffer.close()


def _upload(folder: Path, weight: Weight, address: int, stream: cuda.Stream) -> None:
    stored, wanted = np.dtype(STORAGE[weight.stored]), np.dtype(STORAGE[weight.dtype])
    if not weight.elements:
        return
    numbers = np.memmap(folder / weight.file, stored, "r", weight.offset, (weight.elements,))
    for start in range(0, weight.elements, _PIECE):
        piece = convert(np.asarray(numbers[start : start + _PIECE]), weight.stored, weight.dtype)
        stream.upload(address + start * wanted.itemsize, piece)
