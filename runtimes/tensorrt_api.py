"""The one place that knows how TensorRT 8.6, 10, 11 and TensorRT-RTX differ.

Imports no TensorRT until find() is called: a machine without it runs everything else.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from runtimes.errors import BackendError

BACKENDS = ("tensorrt", "tensorrt-rtx")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_REMEDIES = {
    "tensorrt": "install JetPack's python3-libnvinfer, or run: pip install 'mythos-export[tensorrt]'",
    "tensorrt-rtx": "run: pip install 'mythos-export[tensorrt-rtx]'",
}
# How plans begin: TensorRT's as NVIDIA's trtexec (open source) checks it, TensorRT-RTX's as version 1.7 writes it.
_PLAN_TAGS = {"tensorrt": b"ftrt", "tensorrt-rtx": b"vtrt"}
_log = logging.getLogger("mythos_export.tensorrt")


class Capabilities(NamedTuple):
    """What a version can do. strongly_typed: networks compute in the types the graph says, as all do here from TensorRT 10 on.
    int64, bfloat16, int4, fp8: types it has. explicit_batch_flag: networks must be created with EXPLICIT_BATCH.
    progress_monitor: IProgressMonitor exists."""

    strongly_typed: bool
    int64: bool
    bfloat16: bool
    int4: bool
    fp8: bool
    explicit_batch_flag: bool
    progress_monitor: bool


def capabilities_of(backend: str, version: str, has_progress_monitor: bool) -> Capabilities:
    """Capabilities of a version "major.minor.patch"; every TensorRT-RTX has what TensorRT 10 has."""
    major = 10 if backend == "tensorrt-rtx" else int(version.partition(".")[0])
    return Capabilities(
        strongly_typed=major >= 10,
        int64=major >= 10,
        bfloat16=major >= 9,
        int4=major >= 10,
        fp8=major >= 10,
        explicit_batch_flag=major < 10,
        progress_monitor=has_progress_monitor,
    )


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT. module: tensorrt or tensorrt_rtx; version: major.minor.patch; logger: of everything made with it."""

    backend: str
    module: Any
    version: str
    capabilities: Capabilities
    logger: Any

    @property
    def last_error(self) -> str:
        """What TensorRT said last, for messages."""
        return self.logger.last_error or "it gives no reason"

    def deserialize(self, plan: bytes) -> DeserializedPlan:
        """A plan ready for contexts; its bytes must have been checked before. Raises BackendError where TensorRT refuses it."""
        runtime = self.module.Runtime(self.logger)
        self.logger.last_error = ""
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{self.backend} {self.version} refuses the plan: {self.last_error}")
        return DeserializedPlan(self, runtime, engine)


class DeserializedPlan:
    """An ICudaEngine and the IRuntime it lives by."""

    def __init__(self, tensorrt: TensorRT, runtime: Any, engine: Any) -> None:
        self._tensorrt, self._runtime, self.engine = tensorrt, runtime, engine

    @property
    def activation_bytes(self) -> int:
        """Device memory that a context needs."""
        if hasattr(self.engine, "device_memory_size_v2"):  # from 10.1 on
            return int(self.engine.device_memory_size_v2)
        return int(self.engine.device_memory_size)

    @property
    def tensor_names(self) -> frozenset[str]:
        """Its inputs and outputs. TensorRT may have dropped inputs that nothing reads."""
        return frozenset(self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors))

    def new_context(self, address: int, size: int, profile: int, stream: int) -> Any:
        """An IExecutionContext for one optimization profile, which it is switched to on a stream. Its activations live at a device
        address (256-byte aligned, size at least activation_bytes). Raises BackendError where TensorRT makes none."""
        context = self._make_context()
        if context is None:
            raise BackendError(f"{self._tensorrt.backend} made no execution context: {self._tensorrt.last_error}")
        if hasattr(context, "set_device_memory"):  # from 10.1 on
            context.set_device_memory(address, size)
        else:
            context.device_memory = address
        try:
            accepted = context.set_optimization_profile_async(profile, stream)
        except RuntimeError:  # what TensorRT 10 raises where 8.6 returns False
            accepted = False
        if not accepted:
            raise BackendError(f"{self._tensorrt.backend} refuses profile {profile}: {self._tensorrt.last_error}")
        return context

    def _make_context(self) -> Any:
        module = self._tensorrt.module
        if hasattr(module, "ExecutionContextAllocationStrategy"):  # from 10.0 on
            return self.engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        return self.engine.create_execution_context_without_device_memory()


@cache
def find(backend: str) -> TensorRT:
    """TensorRT or TensorRT-RTX, imported once. Raises BackendError, with what to install, where it cannot be."""
    name = _MODULES[backend]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        raise BackendError(f"the Python module {name} cannot be imported ({error}); {_REMEDIES[backend]}") from error
    if not hasattr(module, "Runtime"):
        raise BackendError(f"the Python module {name} holds no TensorRT; {_REMEDIES[backend]}")
    version = ".".join(str(module.__version__).split(".")[:3])
    capabilities = capabilities_of(backend, version, hasattr(module, "IProgressMonitor"))
    return TensorRT(backend, module, version, capabilities, _logger(module))


def _logger(module: Any) -> Any:
    """TensorRT's messages in Python's logging, as mythos_export.tensorrt; the last error is kept for exceptions."""
    levels = {
        module.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        module.ILogger.Severity.ERROR: logging.ERROR,
        module.ILogger.Severity.WARNING: logging.INFO,  # nearly all are of no use to who runs a bundle
        module.ILogger.Severity.INFO: logging.DEBUG,
        module.ILogger.Severity.VERBOSE: logging.NOTSET,
    }

    class Logger(module.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)  # pybind11 wants the base by name
            self.last_error = ""

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.last_error = message
                _log.debug("%s", message)  # whoever meets it raises it
            elif level:
                _log.log(level, "%s", message)

    return Logger()


def header_problem(backend: str, plan: bytes) -> str | None:
    """What shows that these bytes are no plan of this backend; None where nothing does."""
    tag = _PLAN_TAGS[backend]
    if not plan.startswith(tag):
        return f"begins with {plan[: len(tag)]!r}, plans of {backend} with {tag!r}: this is none"
    return None
