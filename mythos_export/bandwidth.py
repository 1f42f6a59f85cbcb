"""How fast memory is here: what speeds of memory-bound work are held against."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from runtimes import cuda

_BYTES = 512 * 2**20  # well beyond any last-level cache


class Bandwidth(ABC):
    """GB/s of some memory. On a shared machine it changes by the second, so it is probed before and after every measurement, and
    shares are of the better of those two probes. probes: all of them."""

    def __init__(self) -> None:
        self.probes: list[float] = []

    @abstractmethod
    def _once(self) -> float:
        """GB/s of one pass."""

    def probe(self, passes: int = 4) -> float:
        """The best of some passes."""
        self.probes.append(max(self._once() for _ in range(passes)))
        return self.probes[-1]

    def beside(self, test: Callable[[], float]) -> tuple[float, float]:
        """Runs a test; returns its seconds and the bandwidth around it."""
        before = self.probe()
        seconds = test()
        return seconds, max(before, self.probe())


class ReadBandwidth(Bandwidth):
    """What this machine reads with so many threads, over 512 MB."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._parts = np.array_split(np.ones(_BYTES // 8, dtype=np.int64), threads * 8)
        self._pool = ThreadPoolExecutor(threads)

    def _once(self) -> float:
        began = time.perf_counter()
        list(self._pool.map(np.minimum.reduce, self._parts))
        return _BYTES / (time.perf_counter() - began) / 1e9


class DeviceBandwidth(Bandwidth):
    """What the GPU reads and writes, together, when it copies 256 MB."""

    def __init__(self) -> None:
        super().__init__()
        self._stream = cuda.Stream()
        self._halves = [cuda.DeviceBuffer(_BYTES // 2, "the bandwidth's probe") for _ in range(2)]

    def _once(self) -> float:
        (source, target), size, copies = self._halves, _BYTES // 2, 8
        self._stream.synchronize()
        began = time.perf_counter()
        for _ in range(copies):
            self._stream.copy_rows(target.address, size, source.address, size, size, 1)
        self._stream.synchronize()
        return 2 * size * copies / (time.perf_counter() - began) / 1e9
