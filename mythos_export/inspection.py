"""What a bundle holds, and what this environment can do."""

from __future__ import annotations

import importlib.util
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from mythos_export import __version__, footprint
from mythos_export.config import ModelConfig
from mythos_export.environment import cpu_name
from runtimes import cuda, cuda_kernels, native_operators, tensorrt_api
from runtimes.bundle import open_bundle
from runtimes.engine_folder import engine_summaries
from runtimes.errors import BackendError
from runtimes.native_library import library_path


def inspect_bundle(bundle: str | Path) -> dict[str, Any]:
    """Checks a bundle and describes it. Raises BundleError for a damaged one."""
    import msgspec

    folder, manifest = open_bundle(bundle)
    config = ModelConfig.from_dict(manifest.model)
    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    graph = manifest.graphs[0]
    loops = graph.loops if graph.loops is not None else graph.default_loops
    per_token = footprint.cache_bytes(config, loops, 1, graph.cache_dtype)
    return {
        "bundle": str(folder),
        "parameters": footprint.parameters(config),
        "weights_read_per_token": int(footprint.weight_bytes_read(config, loops, storage=footprint.Storage(1, 1))),
        "cache_bytes_per_token": per_token,
        "cache_bytes": per_token * min(config.max_seq_len, graph.window or config.max_seq_len),
        "loops": loops,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "engines": engine_summaries(folder, manifest),
        **plain,
    }


def list_families() -> list[dict[str, Any]]:
    """The families of checkpoints: what their config.json names, and the random variants."""
    from mythos_export.families import FAMILIES  # needs torch; a bundle is inspected without

    return [
        {"name": family.name, "architectures": list(family.architectures), "variants": list(family.variants)}
        for family in FAMILIES
    ]


_NEEDS = {
    "run": ["numpy", "onnxruntime", "tokenizers", "msgspec"],
    "export": ["torch", "onnx", "onnxscript", "onnx-ir", "safetensors"],
    "generate in transformers": ["torch", "transformers"],
    "compare with the reference": ["open-mythos"],
    "power and kernels of a GPU in bench": ["nvidia-ml-py", "cupti-python"],
}
_ON_CUDA = "run on an NVIDIA GPU with onnxruntime"


def doctor() -> dict[str, Any]:
    """What is installed, what that allows, and what is missing for the rest."""
    packages = {name: _version(name) for names in _NEEDS.values() for name in names}
    can = {task: all(packages[name] for name in names) for task, names in _NEEDS.items()}
    can["compare with the reference"] &= can["export"]
    providers: list[str] = []
    problem: str | None = "onnxruntime is missing"
    no_cuda: str | None = problem
    if packages["onnxruntime"]:
        import onnxruntime

        from runtimes.onnxruntime_backend import native_problem
        from runtimes.onnxruntime_cuda import cuda_problem

        providers = onnxruntime.get_available_providers()
        problem, no_cuda = native_problem(), cuda_problem()
    fixes = {
        "run": "pip install mythos-export",
        "export": "pip install 'mythos-export[export]'",
        "generate in transformers": "pip install 'mythos-export[transformers]'",
        "compare with the reference": "pip install 'mythos-export[export]' and pip install --no-deps open-mythos==0.5.0",
        "power and kernels of a GPU in bench": "pip install 'mythos-export[profile]'",
    }
    no_kernels, cuda_operators = cuda_kernels.problem(), library_path("mythos_ops_cuda")
    on_gpu = {_ON_CUDA: no_cuda} | {
        f"run engines of {backend}": _engine_problem(backend) for backend in tensorrt_api.BACKENDS
    }
    return {
        "mythos_export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "packages": packages,
        "onnxruntime_providers": providers,
        "native_operators": None if problem else native_operators.instruction_set(),
        "native_library": None if problem else str(native_operators.LIBRARY),
        "cuda_kernels": None if no_kernels else str(cuda_kernels.LIBRARY),
        "cuda_operators": str(cuda_operators) if cuda_operators.is_file() else None,
        "can": can | {task: found is None for task, found in on_gpu.items()},
        "missing": {task: fixes[task] for task, ok in can.items() if not ok}
        | ({"native operators": problem} if problem else {})
        | ({"CUDA kernels": no_kernels} if no_kernels else {})
        | {task: found for task, found in on_gpu.items() if found},
    }


def _engine_problem(backend: str) -> str | None:
    """Why engines of a library cannot run here; None where they can."""
    try:
        tensorrt_api.find(backend)
        cuda.device()
    except BackendError as error:
        return str(error)
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "found" if importlib.util.find_spec(package.replace("-", "_")) else None
