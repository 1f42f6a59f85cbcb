"""Meters of energy: a GPU's through NVML (nvidia-ml-py), a Jetson's through tegrastats; which one a machine has.

Where a GPU counts its energy itself, that count is read; elsewhere its power is sampled and summed.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

from mythos_export import tegrastats
from mythos_export.power import Integral, Meter
from runtimes import cuda
from runtimes.errors import BackendError

_INTERVAL = 0.02  # seconds between samples
_REMEDY = "pip install 'mythos-export[profile]'"


class NvmlMeter:
    """The GPU that CUDA uses, whole: other programs' work on it counts as well. Raises BackendError where NVML or its Python module
    is missing, or the GPU tells neither its energy nor its power."""

    def __init__(self) -> None:
        self._nvml = _nvml()
        self._done = threading.Event()
        self._integral: Integral | None = None
        try:
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByPciBusId(cuda.pci_bus_id().encode())
            self._count = self._counter()
        except self._nvml.NVMLError as error:
            raise BackendError(f"NVML tells nothing of this GPU's power: {error}") from error

    def _counter(self) -> Callable[[], float]:
        nvml = self._nvml
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)
        except nvml.NVMLError_NotSupported:
            self.source = "NVML, the GPU's power sampled"
            self._integral = Integral()
            self._integral.add(nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000)  # raises where that is unknown as well
            self._thread = threading.Thread(target=self._sample, args=(self._integral,), name="NVML", daemon=True)
            self._thread.start()
            return self._integral.joules
        self.source = "NVML, the GPU's energy counter"
        return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1000

    def _sample(self, integral: Integral) -> None:
        while not self._done.is_set():
            integral.add(self._nvml.nvmlDeviceGetPowerUsage(self._gpu) / 1000)
            self._done.wait(_INTERVAL)

    def joules(self) -> float:
        """Since some moment before."""
        return self._count()

    def about(self) -> dict[str, float]:
        """Nothing else."""
        return {}

    def close(self) -> None:
        """Lets go of NVML; may be called again."""
        if self._done.is_set():
            return
        self._done.set()
        if self._integral is not None:
            self._thread.join()
        self._nvml.nvmlShutdown()


def _nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise BackendError(f"the Python module pynvml cannot be imported ({error}); {_REMEDY}") from error


def find_meter(on_device: bool) -> tuple[Meter | None, str | None]:
    """The meter of this machine for what runs on its GPU (on_device) or its CPU, or why there is none: tegrastats on a Jetson,
    which measures the whole board; NVML for any other GPU; nothing for any other CPU."""
    try:
        if tegrastats.is_available():
            return tegrastats.TegrastatsMeter(), None
        if on_device:
            return NvmlMeter(), None
    except BackendError as error:
        return None, str(error)
    return None, "power is measured of GPUs and of Jetsons, not of this CPU"
