"""What a figure must be read with: the machine, versions, the model, number formats."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import onnxruntime

from mythos_export import __version__, footprint
from mythos_export.config import ModelConfig
from runtimes import cuda, native_operators
from runtimes.runner import Runner


def environment(runner: Runner, threads: int) -> dict[str, Any]:
    """What a figure must be read with: machine, versions, model, number formats."""
    graph = runner.graph
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "backend": runner.backend,
        "operators": _operators(runner),
        "engine": runner.engine,
        "device": cuda.device().name if runner.device == "cuda" else None,
        "device_memory": runner.memory,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "mythos_export": __version__,
        "parameters": footprint.parameters(ModelConfig.from_dict(runner.manifest.model)),
        "weight_dtype": graph.weight_dtype,
        "compute_dtype": graph.dtype,
        "cache_dtype": graph.cache_dtype,
    }


def _operators(runner: Runner) -> str | None:
    """Instruction set of the native kernels, "cuda" or "portable"; None where an engine runs."""
    if runner.engine is not None:
        return None
    if runner.device == "cuda":
        return "cuda"
    return native_operators.instruction_set() if runner.native else "portable"


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
