"""A lowered graph to a TensorRT plan: parsing, optimization profiles, precision, progress, layer report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mythos_export.build.isolation import isolated
from mythos_export.build.lower import Lowered
from mythos_export.build.options import Options
from runtimes import tensorrt_api
from runtimes.engines import Profile
from runtimes.errors import BackendError
from runtimes.tensorrt_api import TensorRT

_log = logging.getLogger("mythos_export")
Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True)
class BuiltPlan:
    """plan: the serialized engine. layers: what the engine inspector says of it. activation_bytes: of a context, 0 where unknown.
    timing_cache: to be given to the next build."""

    plan: bytes
    layers: dict[str, Any]
    activation_bytes: int
    timing_cache: bytes


def build_plan(
    tensorrt: TensorRT,
    lowered: Lowered,
    folder: Path,
    profiles: tuple[Profile, ...],
    options: Options,
    first_way: int = 0,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> BuiltPlan:
    """Builds the plan of a stage, whose constants lie in folder, the first of tensorrt.n_ways that works from first_way on.

    Raises BackendError, with TensorRT's words, where it refuses the graph, finds no way to compute it or crashes.
    """
    model = ir.to_proto(lowered.model).SerializeToString()
    request = _Request(model, folder, tuple(_shapes(lowered, profile) for profile in profiles), options, timing_cache)
    for way in range(first_way, tensorrt.n_ways - 1):
        try:
            return _build(tensorrt, request, way, progress)
        except BackendError as error:
            _log.info("%s; another way is tried", error)
    return _build(tensorrt, request, tensorrt.n_ways - 1, progress)


@dataclass(frozen=True)
class _Request:
    """model: serialized ONNX, whose external data lies in folder. shapes: of each profile, the least, likeliest and largest of each
    input but the weights."""

    model: bytes
    folder: Path
    shapes: tuple[dict[str, list[list[int]]], ...]
    options: Options
    timing_cache: bytes


def _shapes(lowered: Lowered, profile: Profile) -> dict[str, list[list[int]]]:
    """From the names of dimensions; weights have fixed shapes."""
    return {
        value.name or "": [
            [
                getattr(getattr(profile, str(dim.value)), end) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in value.shape or ()
            ]
            for end in ("min", "opt", "max")
        ]
        for value in lowered.model.graph.inputs
        if value.name not in lowered.weights
    }


def _build(tensorrt: TensorRT, request: _Request, way: int, progress: Progress | None) -> BuiltPlan:
    """One way. Before TensorRT 10 in a process of its own: 8.6's compiler was seen to crash."""
    if tensorrt.capabilities.strongly_typed:
        return _build_here(tensorrt, request, way, progress)
    return isolated(_build_apart, tensorrt.backend, request, way)


def _build_apart(backend: str, request: _Request, way: int) -> BuiltPlan:
    return _build_here(tensorrt_api.find(backend), request, way, None)


def _build_here(tensorrt: TensorRT, request: _Request, way: int, progress: Progress | None) -> BuiltPlan:
    builder, network = _network(tensorrt, request.model, request.folder)
    config = builder.create_builder_config()
    cache = _configure(tensorrt, config, network, request.options, request.timing_cache)
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    for shapes in request.shapes:
        profile = builder.create_optimization_profile()
        for name in inputs & set(shapes):
            profile.set_shape(name, *shapes[name])
        config.add_optimization_profile(profile)
    raise_error = tensorrt.set_progress(config, progress) if progress is not None else None
    tensorrt.choose_way(config, way)
    with tensorrt.logger.layers_reported() as report:
        plan = builder.build_serialized_network(network, config)
    if raise_error is not None:
        raise_error()
    if plan is None:
        raise BackendError(f"{tensorrt.backend} {tensorrt.version} built no engine: {tensorrt.last_error}")
    layers, activation_bytes = _inspect(tensorrt, bytes(plan), report)
    return BuiltPlan(bytes(plan), layers, activation_bytes, b"" if cache is None else bytes(cache.serialize()))


def _configure(tensorrt: TensorRT, config: Any, network: Any, options: Options, timing_cache: bytes) -> Any:
    """Sets everything but profiles; returns the timing cache, None where there is none."""
    module = tensorrt.module
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    tensorrt.set_precision(config, network)
    if options.compute_capabilities:
        tensorrt.set_compute_capabilities(config, options.compute_capabilities)
    return tensorrt.set_timing_cache(config, timing_cache)


def _network(tensorrt: TensorRT, model: bytes, folder: Path) -> tuple[Any, Any]:
    module = tensorrt.module
    builder = module.Builder(tensorrt.logger)
    network = builder.create_network(tensorrt.network_flags)
    parser = module.OnnxParser(network, tensorrt.logger)
    if not parser.parse(model, str(folder / "lowered.onnx")):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        text = "; ".join(f"{error.desc()} (node {error.node()})" for error in errors)
        raise BackendError(
            f"{tensorrt.backend} {tensorrt.version} cannot parse the graph: {text or tensorrt.last_error}"
        )
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    shape_tensors = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
    if shape_tensors:
        raise BackendError(
            f"{tensorrt.backend} {tensorrt.version} wants the values of {shape_tensors} to know its shapes"
        )
    return builder, network


def _inspect(tensorrt: TensorRT, plan: bytes, report: list[str]) -> tuple[dict[str, Any], int]:
    """The layer report and the bytes of a context's activations: from the engine; or, where that is for a GPU that is not here,
    what the builder reported, and 0."""
    try:
        deserialized = tensorrt.deserialize(plan)
    except BackendError:
        return {"Layers": report}, 0
    information = tensorrt.module.LayerInformationFormat.JSON
    text = deserialized.engine.create_engine_inspector().get_engine_information(information)
    layers = json.loads(text, strict=False)  # 8.6 writes names with control characters
    return layers, deserialized.activation_bytes
