"""A lowered graph to a TensorRT plan: parsing, optimization profiles, precision, progress, layer report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mythos_export.build.lower import Lowered
from mythos_export.build.options import Options
from runtimes.engines import Profile
from runtimes.errors import BackendError
from runtimes.tensorrt_api import TensorRT

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

    Raises BackendError, with TensorRT's words, where it refuses the graph or finds no way to compute it.
    """
    model = ir.to_proto(lowered.model).SerializeToString()
    for way in range(first_way, tensorrt.n_ways):
        builder, network = _network(tensorrt, model, folder)
        config = builder.create_builder_config()
        cache = _configure(tensorrt, config, network, options, timing_cache)
        for profile in profiles:
            config.add_optimization_profile(_optimization_profile(builder, network, lowered, profile))
        raise_error = tensorrt.set_progress(config, progress) if progress is not None else None
        tensorrt.choose_way(config, way)
        with tensorrt.logger.layers_reported() as report:
            plan = builder.build_serialized_network(network, config)
        if raise_error is not None:
            raise_error()
        if plan is not None:
            layers, activation_bytes = _inspect(tensorrt, bytes(plan), report)
            return BuiltPlan(bytes(plan), layers, activation_bytes, b"" if cache is None else bytes(cache.serialize()))
    raise BackendError(f"{tensorrt.backend} {tensorrt.version} built no engine: {tensorrt.last_error}")


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
    shape_tensors = [name for name, tensor in _inputs(network).items() if tensor.is_shape_tensor]
    if shape_tensors:
        raise BackendError(
            f"{tensorrt.backend} {tensorrt.version} wants the values of {shape_tensors} to know its shapes"
        )
    return builder, network


def _inputs(network: Any) -> dict[str, Any]:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    return {tensor.name: tensor for tensor in tensors}


def _optimization_profile(builder: Any, network: Any, lowered: Lowered, profile: Profile) -> Any:
    """The shapes of all inputs but the weights, from the names of their dimensions."""
    made = builder.create_optimization_profile()
    known = _inputs(network)
    for value in lowered.model.graph.inputs:
        if value.name in lowered.weights or value.name not in known or value.shape is None:
            continue
        shapes = [
            [
                getattr(getattr(profile, str(dim.value)), end) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in value.shape
            ]
            for end in ("min", "opt", "max")
        ]
        made.set_shape(value.name, *shapes)
    return made


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
