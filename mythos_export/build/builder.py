"""A lowered graph to a TensorRT plan: parsing, optimization profiles, precision, progress, layer report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.engines import Profile
from runtimes.errors import BackendError
from runtimes.tensorrt_api import TensorRT

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all
# Dimensions of each input, by the ranges of a profile; None is taken from the graph.
_DIMENSIONS: dict[str, tuple[str | None, ...]] = {
    "input_ids": ("batch", "seq"),
    "past_len": ("batch",),
    "past_kv": ("slots", "batch", "capacity", None),
    "logit_positions": ("batch", "k"),
    "n_loops": ("batch",),
}


@dataclass(frozen=True)
class Options:
    """workspace: bytes of device memory for scratch, None for all there is. optimization_level: 0 to 5, None for TensorRT's own.
    compute_capabilities: what TensorRT-RTX builds for, like "8.9"; none for the GPU at hand."""

    workspace: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuiltPlan:
    """plan: the serialized engine. layers: what the engine inspector says of it. activation_bytes: of a context, 0 where unknown.
    host_inputs: inputs that TensorRT reads from host memory. timing_cache: to be given to the next build."""

    plan: bytes
    layers: dict[str, Any]
    activation_bytes: int
    host_inputs: tuple[str, ...]
    timing_cache: bytes


def build_plan(
    tensorrt: TensorRT,
    model: bytes,
    folder: Path,
    profiles: tuple[Profile, ...],
    options: Options,
    way: int = 0,
    timing_cache: bytes = b"",
    progress: Progress | None = None,
) -> BuiltPlan:
    """Builds one plan from a serialized ONNX model, whose external data lies in folder. way: one of tensorrt.n_ways.

    Raises BackendError, with TensorRT's words, where it refuses the graph or finds no way to compute it.
    """
    network, builder = _network(tensorrt, model, folder)
    config = builder.create_builder_config()
    module = tensorrt.module
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for profile in profiles:
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
    tensorrt.set_precision(config, network)
    if options.compute_capabilities:
        tensorrt.set_compute_capabilities(config, options.compute_capabilities)
    cache = tensorrt.set_timing_cache(config, timing_cache)
    if progress is not None:
        tensorrt.set_progress(config, progress)
    tensorrt.choose_way(config, way)
    with tensorrt.logger.layers_reported() as report:
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"{tensorrt.backend} {tensorrt.version} built no engine: {tensorrt.last_error}")
    data = bytes(plan)
    layers, activation_bytes = _inspect(tensorrt, data, report)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    host_inputs = tuple(tensor.name for tensor in inputs if tensor.is_shape_tensor)
    return BuiltPlan(data, layers, activation_bytes, host_inputs, b"" if cache is None else bytes(cache.serialize()))


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
    return network, builder


def _optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = _DIMENSIONS.get(tensor.name)
        if names is None:
            continue  # a weight: its shape is fixed
        static = list(tensor.shape)
        shapes = [
            [
                static[axis] if name is None or static[axis] > 0 else getattr(getattr(profile, name), end)
                for axis, name in enumerate(names)
            ]
            for end in ("min", "opt", "max")
        ]
        made.set_shape(tensor.name, *shapes)
    return made


def _inspect(tensorrt: TensorRT, plan: bytes, report: list[str]) -> tuple[dict[str, Any], int]:
    """The layer report and the bytes of a context's activations: from the engine; or, where that is for a GPU that is not here,
    what the builder reported, and 0."""
    try:
        deserialized = tensorrt.deserialize(plan)
    except BackendError:
        return {"Layers": report}, 0
    information = tensorrt.module.LayerInformationFormat.JSON
    layers = json.loads(deserialized.engine.create_engine_inspector().get_engine_information(information))
    return layers, deserialized.activation_bytes
