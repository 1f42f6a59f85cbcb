"""The one place that knows how TensorRT 8.6, 10, 11 and TensorRT-RTX differ.

Imports no TensorRT until find() is called: a machine without it runs everything else.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_ARITHMETIC = ("ELEMENTWISE", "UNARY", "REDUCE", "SOFTMAX", "ACTIVATION")
# How the message of a builder on the layers of an engine begins.
_LAYER_REPORT = ("Layers:\n", "Engine Layer Information:\n")
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

    @property
    def network_flags(self) -> int:
        """For create_network: strongly typed where that exists, explicit batch where it must be said."""
        flags = self.module.NetworkDefinitionCreationFlag
        if self.capabilities.explicit_batch_flag:
            return 1 << int(flags.EXPLICIT_BATCH)
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def set_precision(self, config: Any, network: Any) -> None:
        """Lets TensorRT compute in the types of the parsed network and in no others: no TF32 for float32; before strong typing,
        what is not a matrix product is held to the type of its results."""
        module, flags = self.module, self.module.BuilderFlag
        if self.capabilities.strongly_typed:
            config.clear_flag(flags.TF32)
            return
        config.set_tactic_sources(0)  # no kernels of cuBLAS or cuDNN, so that neither need be there
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        # What only moves numbers is left alone: constraints there contradict each other.
        arithmetic = {getattr(module.LayerType, name) for name in _ARITHMETIC}
        for layer in layers:
            if layer.type in arithmetic:
                self._hold_types(layer, [layer.get_output(index) for index in range(layer.num_outputs)])
        # Matrix products of float16 graphs are all float16 (the others are written as sums), yet 8.6 finds no kernels without TF32.
        if any(layer.get_output(0).dtype == module.DataType.HALF for layer in layers if layer.num_outputs):
            config.set_flag(flags.FP16)
        else:
            config.clear_flag(flags.TF32)
        if any(layer.type == module.LayerType.QUANTIZE for layer in layers):
            config.set_flag(flags.INT8)

    def _hold_types(self, layer: Any, outputs: list[Any]) -> None:
        """A layer computes in the type of its results, and keeps them in it."""
        floats = (self.module.DataType.FLOAT, self.module.DataType.HALF)
        if any(output is None or output.dtype not in floats for output in outputs):
            return
        layer.precision = outputs[0].dtype
        for index, output in enumerate(outputs):
            layer.set_output_type(index, output.dtype)

    @property
    def n_ways(self) -> int:
        """How many ways there are to build a plan; see choose_way."""
        return 1 if self.capabilities.strongly_typed else 2

    def choose_way(self, config: Any, way: int) -> None:
        """TensorRT 8.6 finds no kernels for some graphs with its preview feature FASTER_DYNAMIC_SHAPES, which is on by default:
        way 1 is without."""
        if way:
            config.set_preview_feature(self.module.PreviewFeature.FASTER_DYNAMIC_SHAPES_0805, False)

    def set_compute_capabilities(self, config: Any, wanted: tuple[str, ...]) -> None:
        """Builds for GPUs that need not be here, like "8.9". Raises BackendError for one that this library does not build for."""
        kinds = getattr(self.module, "ComputeCapability", None)
        if kinds is None:
            raise BackendError(
                f"{self.backend} {self.version} builds for the GPU at hand only; leave --compute-capability out, or use "
                "--backend tensorrt-rtx"
            )
        known = {f"{name[2:-1]}.{name[-1]}": kind for name, kind in kinds.__members__.items() if name.startswith("SM")}
        unknown = [text for text in wanted if text not in known]
        if unknown:
            raise BackendError(
                f"{self.backend} {self.version} does not build for compute capability {', '.join(unknown)}; "
                f"expected any of {', '.join(known)}"
            )
        config.num_compute_capabilities = len(wanted)
        for index, text in enumerate(wanted):
            config.set_compute_capability(known[text], index)

    def set_timing_cache(self, config: Any, data: bytes) -> Any:
        """A timing cache that begins as an earlier build left it (bytes of no use are ignored by TensorRT); None where this library
        has none."""
        if self.backend == "tensorrt-rtx":
            return None  # it tunes where it runs
        cache = config.create_timing_cache(data) or config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        return cache

    def set_progress(self, config: Any, progress: Callable[[str, int, int], None]) -> Callable[[], None]:
        """Reports phases of a build (their name, steps done, steps in all), where the library tells them. What `progress` raises
        ends the build, and so does an interrupt; the function that is returned raises it again afterwards."""
        if not self.capabilities.progress_monitor:
            return lambda: None
        config.progress_monitor = monitor = _monitor(self.module, progress)
        return monitor.raise_error  # type: ignore[no-any-return]


def _monitor(module: Any, progress: Callable[[str, int, int], None]) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._error: BaseException | None = None

        def _tell(self, name: str, done: int) -> None:
            try:
                progress(name, done, self._steps[name])
            except BaseException as error:  # noqa: BLE001 (lost in the library; raise_error raises it)
                self._error = error

        def phase_start(self, name: str, parent: str | None, n_steps: int) -> None:
            self._steps[name] = n_steps
            if parent is None:
                self._tell(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            self._tell(name, step + 1)
            return self._error is None

        def phase_finish(self, name: str) -> None:
            self._steps.pop(name, None)

        def raise_error(self) -> None:
            if self._error is not None:
                raise self._error

    return Monitor()


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
            self._report: list[str] | None = None

        @contextmanager
        def layers_reported(self) -> Iterator[list[str]]:
            """Collects the lines, one a layer, in which a builder says what an engine is made of."""
            self._report = []
            try:
                yield self._report
            finally:
                self._report = None

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if self._report is not None and message.startswith(_LAYER_REPORT):
                self._report += message.splitlines()[1:]
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
