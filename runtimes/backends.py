"""Which backend runs a bundle, and where: an engine that fits this machine, else onnxruntime, saying why."""

from __future__ import annotations

import logging
from pathlib import Path

from runtimes import cuda, tensorrt_api
from runtimes.backend import Backend, say_once
from runtimes.bundle import Manifest
from runtimes.device_memory import DeviceRequest
from runtimes.engine_folder import FOLDER, list_engines
from runtimes.engines import Engine, fits
from runtimes.errors import BackendError, BundleError, InputError, MythosError
from runtimes.tensorrt_backend import TensorRTBackend

BACKENDS = ("auto", "onnxruntime", *tensorrt_api.BACKENDS)
DEVICES = ("cpu", "cuda")
_SPEED = ("float16", "bfloat16", "float32")  # fastest first
_log = logging.getLogger("mythos_export")


def open_backend(
    name: str, folder: Path, manifest: Manifest, threads: int | None, native: bool | None, request: DeviceRequest
) -> Backend:
    """The backend of that name, ready to run the bundle in a folder. "auto" takes an engine that fits, else onnxruntime, and says
    once why no engine of the bundle could be used; a bundle without engines is run there silently. An engine or a device that is
    named is never replaced by anything else; without one, onnxruntime runs on the CPU.

    Raises BackendError for an unknown or failing backend or device, BundleError for a damaged engine, InputError for a request that
    the engine cannot serve, MemoryLimitError for weights beyond a limit.
    """
    if name not in BACKENDS:
        raise BackendError(f'backend is "{name}"; expected one of {", ".join(BACKENDS)}')
    device = request.device
    if device is not None and device not in DEVICES:
        raise BackendError(f'device is "{device}"; expected one of {", ".join(DEVICES)}')
    if name == "onnxruntime" or (name == "auto" and device == "cpu"):
        if request.engine is not None:
            asked = "backend onnxruntime" if name == "onnxruntime" else "device cpu"
            raise InputError(f"engine {request.engine} is TensorRT's, {asked} uses none; leave one of them out")
        return _on_onnxruntime(folder, manifest, threads, native, request)
    if device == "cpu":
        raise InputError(f"backend {name} runs on a GPU, device is cpu; leave one of them out")
    kinds = tensorrt_api.BACKENDS if name == "auto" else (name,)
    if name != "auto" or request.engine is not None:
        return _open_engine(kinds, folder, manifest, request)
    try:
        if list_engines(folder):
            return _open_engine(kinds, folder, manifest, request)
    except MythosError as error:
        say_once(f"no engine of the bundle is used, onnxruntime runs instead: {error}")
    return _on_onnxruntime(folder, manifest, threads, native, request)


def _on_onnxruntime(
    folder: Path, manifest: Manifest, threads: int | None, native: bool | None, request: DeviceRequest
) -> Backend:
    # Imported here: a device that runs engines alone needs no onnxruntime.
    if request.device != "cuda":
        from runtimes.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(folder, manifest, threads, native, request.memory_limit)
    if native is False:
        raise InputError("native is False, but on CUDA there are no portable bodies; leave it out, or use device cpu")
    from runtimes.onnxruntime_cuda import OnnxRuntimeCudaBackend

    return OnnxRuntimeCudaBackend(folder, manifest, threads, request)


def _open_engine(kinds: tuple[str, ...], folder: Path, manifest: Manifest, request: DeviceRequest) -> TensorRTBackend:
    """The best engine of these kinds that can be used here; where none can, the error says why, engine by engine."""
    wanted = _candidates(kinds, folder, request.engine)
    device = cuda.device()
    order = sorted(wanted, key=lambda pair: _preference(pair[1], manifest))
    errors: list[MythosError] = []
    for path, engine in order:
        try:
            if isinstance(engine, BundleError):
                raise engine
            library = tensorrt_api.find(engine.backend)
            misfit = fits(engine, library.version, device.compute_capability, device.name)
            if misfit is not None:
                raise BackendError(f"{path}: {misfit}; build one here with `mythos-export build {folder}`")
            backend = TensorRTBackend(library, folder, path, engine, manifest, request)
        except MythosError as error:
            errors.append(error)
            continue
        _log.info("engine %s runs%s", backend.engine, f" (of {len(wanted)})" if len(wanted) > 1 else "")
        return backend
    if len(errors) == 1:
        raise errors[0]
    raise BackendError("; ".join(str(error) for error in errors))


def _candidates(kinds: tuple[str, ...], folder: Path, key: str | None) -> list[tuple[Path, Engine | BundleError]]:
    engines = [
        (path, engine)
        for path, engine in list_engines(folder)
        if isinstance(engine, BundleError) or engine.backend in kinds
    ]
    if not engines:
        option = " --backend tensorrt-rtx" if kinds == ("tensorrt-rtx",) else ""
        raise BackendError(
            f"{folder}: holds no engine for {' or '.join(kinds)}; build one with `mythos-export build {folder}{option}`"
        )
    if key is None:
        return engines
    named = [(path, engine) for path, engine in engines if path.name == key]
    if not named:
        names = ", ".join(path.name for path, _ in engines)
        raise BackendError(f"{folder / FOLDER}: holds no engine {key!r}; it holds {names}")
    return named


def _preference(engine: Engine | BundleError, manifest: Manifest) -> tuple[bool, bool, int, bool]:
    """Sound ones first; then the dtype the bundle was exported for, the fastest of the others, plain TensorRT."""
    if isinstance(engine, BundleError):
        return True, True, 0, True
    own = manifest.graphs[0].dtype
    return False, engine.dtype != own, _SPEED.index(engine.dtype), engine.backend != "tensorrt"
