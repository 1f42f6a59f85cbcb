"""The TensorRT plugins of the operators: a library of our own (runtimes/native/tensorrt) over the CUDA kernels, for TensorRT 10 and
later. Plans that were built with them can be read only where they are loaded."""

from __future__ import annotations

from functools import cache

from runtimes import cuda_kernels
from runtimes.errors import BackendError
from runtimes.native_library import library_path
from runtimes.tensorrt_api import TensorRT

NAME = "mythos_plugins"  # as engine.json says it
LIBRARY = library_path(NAME)


def problem(tensorrt: TensorRT) -> str | None:
    """Why a TensorRT cannot use the plugins here, and what to do; None where it can."""
    if tensorrt.backend != "tensorrt" or not tensorrt.capabilities.strongly_typed:
        return f"{tensorrt.backend} {tensorrt.version} takes none; plugins are for TensorRT 10 and later"
    if not LIBRARY.is_file():
        return (
            f"{LIBRARY} is not built; run, in mythos-export's source: make cuda TENSORRT_ROOT=... (needs nvcc, and the headers of "
            "TensorRT 10 or later)"
        )
    return cuda_kernels.problem()


@cache
def load(tensorrt: TensorRT) -> None:
    """Makes the plugins known to TensorRT, once. Raises BackendError where they cannot be used."""
    found = problem(tensorrt)
    if found is not None:
        raise BackendError(f"the TensorRT plugins cannot be used: {found}")
    tensorrt.logger.last_error = ""
    if tensorrt.module.get_plugin_registry().load_library(str(LIBRARY)) is None:
        raise BackendError(f"{tensorrt.backend} {tensorrt.version} refuses {LIBRARY}: {tensorrt.last_error}")
