"""Builds an engine of a bundle: the forms its experts need, profiles from its limits, everything written at once.

Shape letters: T tokens of a step, E routed experts, K top_k.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from mythos_export import __version__, overloads
from mythos_export.build.builder import BuiltPlan, Progress, build_plan
from mythos_export.build.check import check_engine
from mythos_export.build.lower import DTYPES, Lowered, LoweredExperts, has_plugins, is_cache, lower
from mythos_export.build.options import MAX_CONTEXT, Limits, Options
from mythos_export.config import MixtureOfExpertsConfig, ModelConfig
from runtimes import cuda, cuda_kernels, tensorrt_api, tensorrt_plugins
from runtimes.backend import say_once
from runtimes.bundle import Graph, Manifest, open_bundle
from runtimes.cuda import OutOfDeviceMemory
from runtimes.device_memory import BUCKET
from runtimes.dtypes import STORAGE
from runtimes.engine_folder import FOLDER, EngineWriter
from runtimes.engines import FORMAT_VERSION, PASSED, Engine, Passed, Plan, Profile, Range, Weight, engine_key
from runtimes.errors import BackendError, InputError
from runtimes.tensorrt_api import TensorRT

_log = logging.getLogger("mythos_export")
# A gathered expert is read at 0.6 of the bandwidth at which all are read in turn (H100, TensorRT 8.6, experts of 2048 x 4096 in
# float16), so gathering pays up to this share of all experts.
_GATHERING_PAYS = 0.6
_NAMES = {kind: name for name, kind in DTYPES.items()}
_TYPES = {ir.DataType.INT4: "int4", ir.DataType.FLOAT8E4M3FN: "fp8"}  # that not every version has


class BuiltEngine(NamedTuple):
    """path: where the engine stands. engine: its metadata. manifest: of the bundle it was built from."""

    path: Path
    engine: Engine
    manifest: Manifest


def build_engine(
    bundle: str | Path,
    *,
    backend: str = "tensorrt",
    dtype: str | None = None,
    limits: Limits | None = None,
    options: Options | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BuiltEngine:
    """Builds an engine of a bundle into its engines/ folder.

    backend: "tensorrt" or "tensorrt-rtx". dtype: of matrices and cache, one of float32, float16, bfloat16 (default: the bundle's;
    of a quantized bundle float16, or float32 before TensorRT 10); before TensorRT 10, of the experts alone where there are any,
    which CUDA kernels compute unless it is float32. limits: default Limits(). force: replace an engine of that key.
    Where the GPU is at hand, the engine's results are held against onnxruntime's before it stays; see check_engine.
    Raises BackendError where TensorRT, the GPU or the CUDA kernels are missing, the graph is refused or results are wrong,
    InputError for limits that make no sense, BundleError for a damaged bundle or an engine that exists. From TensorRT 10 on, the
    operators are TensorRT plugins where options.plugins and the library of them say so.
    """
    library = tensorrt_api.find(backend)
    options, limits = options or Options(), limits or Limits()
    folder, manifest = open_bundle(bundle)
    graph = manifest.graphs[0]
    dtype, context = _checked_dtype(dtype, manifest, library), _checked_context(limits, graph)
    device, capabilities = _target(library, options)
    plugins = _uses_plugins(library, folder, graph, options.plugins)
    job = _Job(library, folder, manifest, dtype, limits, context, options, device, capabilities, progress, plugins)
    wanted = _forms([] if plugins else _experts(manifest), limits)
    forms = [_lowered(job, form, max_tokens) for form, max_tokens in wanted]
    _check_types(library, forms)
    for way in range(library.n_ways - 1):
        try:
            return _built(job, forms, way, force=force)
        except BackendError as error:
            _log.warning("%s; another way of building is tried", error)
    return _built(job, forms, library.n_ways - 1, force=force)


@dataclass(frozen=True)
class _Job:
    """What is to be built, all of it checked."""

    library: TensorRT
    folder: Path
    manifest: Manifest
    dtype: str
    limits: Limits
    context: int
    options: Options
    device: str
    capabilities: tuple[str, ...]
    progress: Progress | None
    plugins: bool

    @property
    def key(self) -> str:
        return engine_key(self.library.backend, self.library.version, self.capabilities, self.device, self.dtype)


@dataclass(frozen=True)
class _Form:
    """The lowered parts of a form, in the order they run, and what its plans are for."""

    name: str
    max_tokens: int | None
    profiles: tuple[Profile, ...]
    parts: list[Lowered | LoweredExperts]

    @property
    def graphs(self) -> list[Lowered]:
        """Those of the parts that become plans."""
        return [part for part in self.parts if isinstance(part, Lowered)]


def _lowered(job: _Job, form: str, max_tokens: int | None) -> _Form:
    profiles = _profiles(job.limits, job.context, max_tokens)
    ranges = {name: [getattr(profile, name) for profile in profiles] for name in ("batch", "seq", "tokens", "k")}
    fixed = {
        name: parts[0].max for name, parts in ranges.items() if len({*parts}) == 1 and parts[0].min == parts[0].max
    }
    old_parser = not job.library.capabilities.strongly_typed
    graph = job.manifest.graphs[0]
    parts = lower(job.folder, graph, job.dtype, form=form, sizes=fixed, old_parser=old_parser, plugins=job.plugins)
    return _Form(form, max_tokens, profiles, parts)


def _check_types(library: TensorRT, forms: Sequence[_Form]) -> None:
    """Raises InputError for matrices of a type that the library does not have."""
    graphs = [part.model.graph for form in forms for part in form.graphs]
    for name in {_TYPES.get(value.dtype) for graph in graphs for value in graph.initializers.values()} - {None}:
        if not getattr(library.capabilities, str(name)):
            raise InputError(
                f"{library.backend} {library.version} has no {name}, which TensorRT 10 has; use a bundle of int8 weights "
                "(--recipe w8a8) or of floats"
            )


def _built(job: _Job, forms: Sequence[_Form], way: int, *, force: bool) -> BuiltEngine:
    """Builds the engine, beginning with one way, and checks its results where the GPU is at hand. Raises BackendError, leaving none
    behind."""
    path, began = job.folder / FOLDER / job.key, time.perf_counter()
    timing_file = path.with_name(f".{job.key.rpartition('-')[0]}.timing")
    timing = timing_file.read_bytes() if timing_file.is_file() else b""
    with EngineWriter(job.folder, job.key, force=force) as writer:
        plans, weights = [], dict[str, Weight]()
        for form in forms:
            for part in form.parts:
                weights.update(weights_of(part))
            for lowered in form.graphs:
                _log.info("building %s, part %d, of %s", lowered.stage, lowered.part, form.name)
                plan = build_plan(
                    job.library, lowered, job.folder, form.profiles, job.options, way, timing, job.progress
                )
                timing = plan.timing_cache or timing
                plans.append(_write(writer, form, lowered, plan))
        engine = _metadata(job, forms, tuple(plans), tuple(weights.values()), time.perf_counter() - began)
        writer.commit(engine)
    if timing:
        partial = timing_file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(timing)
        partial.replace(timing_file)
    if job.options.check and not job.options.compute_capabilities:
        _check_results(job, path, engine)
    return BuiltEngine(path, engine, job.manifest)


def _check_results(job: _Job, path: Path, engine: Engine) -> None:
    """Raises BackendError, with the engine removed, where it computes something else than onnxruntime."""
    try:
        agreement = check_engine(job.folder, job.manifest, job.key, engine)
    except OutOfDeviceMemory as error:
        _log.warning("%s was not held against onnxruntime: %s", job.key, error)
        return
    except BackendError:
        shutil.rmtree(path)
        raise
    _log.info("%s agrees with onnxruntime: mean KL %.2g nats, top-1 %.4f", job.key, *agreement[:2])


def _metadata(
    job: _Job, forms: Sequence[_Form], plans: tuple[Plan, ...], weights: tuple[Weight, ...], seconds: float
) -> Engine:
    graph, files = job.manifest.graphs[0], job.manifest.files
    cache = next(value for part in forms[0].graphs for value in part.model.graph.inputs if is_cache(value))
    named = sorted({weight.file for weight in weights} | set(graph.weights))
    return Engine(
        format="mythos-engine",
        format_version=FORMAT_VERSION,
        producer=f"mythos-export {__version__}",
        backend=job.library.backend,  # type: ignore[arg-type]
        version=job.library.version,
        device=job.device,
        compute_capabilities=job.capabilities,
        graph_file=graph.file,
        graph_sha256=files[graph.file].sha256,
        weights_sha256={name: files[name].sha256 for name in named},
        dtype=job.dtype,  # type: ignore[arg-type]
        cache_dtype=_NAMES[cache.dtype],  # type: ignore[arg-type]
        integers="int64" if job.library.capabilities.int64 else "int32",
        max_context=job.context,
        dim=ModelConfig.from_dict(job.manifest.model).dim,
        weights=weights,
        plans=plans,
        experts=tuple(part.call for form in forms for part in form.parts if isinstance(part, LoweredExperts)),
        build_seconds=seconds,
        plugins=tensorrt_plugins.NAME if job.plugins else None,  # type: ignore[arg-type]
    )


def _checked_dtype(dtype: str | None, manifest: Manifest, library: TensorRT) -> str:
    graph = manifest.graphs[0]
    quantized, modern = graph.weight_dtype not in STORAGE, library.capabilities.strongly_typed
    if dtype is None:
        dtype = graph.dtype if not quantized else "float16" if modern else "float32"
    if dtype not in DTYPES:
        raise InputError(f'dtype is "{dtype}"; expected one of {", ".join(DTYPES)}')
    if quantized and not modern and dtype != "float32":
        raise InputError(
            f"{library.backend} {library.version} reads scales of quantized matrices in float32 only, dtype is {dtype}; leave "
            "--dtype out"
        )
    if not modern and dtype != "float32" and _experts(manifest):
        cuda_kernels.find()  # which compute them
    elif dtype == "bfloat16" and not library.capabilities.bfloat16:
        raise InputError(
            f"{library.backend} {library.version} has no bfloat16, which TensorRT 10 has; use --dtype float16"
        )
    return dtype


def _checked_context(limits: Limits, graph: Graph) -> int:
    for name, value in (("max_batch", limits.batch), ("max_seq", limits.seq), ("max_context", limits.context)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    if limits.context is not None and limits.context > graph.max_seq_len:
        raise InputError(f"max_context is {limits.context}; the model has positions for {graph.max_seq_len}")
    return limits.context or min(MAX_CONTEXT, graph.max_seq_len)


def _target(library: TensorRT, options: Options) -> tuple[str, tuple[str, ...]]:
    """The GPU at hand, or, without a name, those that are asked for."""
    if options.compute_capabilities:
        return "", options.compute_capabilities
    device = cuda.device()
    return device.name, (device.compute_capability,)


def _uses_plugins(library: TensorRT, folder: Path, graph: Graph, wanted: bool | None) -> bool:
    """Whether the operators become plugins; if so, loads them. Raises BackendError where they are asked for and cannot be used."""
    if wanted is False or (wanted is None and not library.capabilities.strongly_typed):
        return False
    problem = tensorrt_plugins.problem(library)
    if problem is None and not has_plugins(folder, graph):
        problem = "they compute with float matrices and caches only, and this bundle has others"
    if problem is None:
        tensorrt_plugins.load(library)
        return True
    if wanted:
        raise BackendError(f"the TensorRT plugins cannot be used: {problem}")
    if library.backend == "tensorrt":
        say_once(f"the engine is built of standard operators, without the TensorRT plugins: {problem}")
    return False


def _forms(experts: Sequence[MixtureOfExpertsConfig], limits: Limits) -> list[tuple[str, int | None]]:
    """Forms to build, with the most tokens of a step each is for, where TensorRT itself computes these experts."""
    many: list[tuple[str, int | None]] = [(overloads.MANY_TOKENS, None)]
    if not experts:
        return many
    few = max(1, min(int(_GATHERING_PAYS * moe.n_experts / moe.top_k) for moe in experts))
    return [(overloads.FEW_TOKENS, min(few, limits.batch)), *many]


def _experts(manifest: Manifest) -> list[MixtureOfExpertsConfig]:
    """Of the layers that have any."""
    layers = ModelConfig.from_dict(manifest.model).layers
    return [layer.feed_forward for layer in layers if isinstance(layer.feed_forward, MixtureOfExpertsConfig)]


def _profiles(limits: Limits, context: int, max_tokens: int | None) -> tuple[Profile, ...]:
    """decode; and prefill, but for a form that is for few tokens."""
    one, rows = Range(1, 1, 1), -(-context // BUCKET) * BUCKET
    capacity = Range(BUCKET, min(1024, rows), rows)
    if max_tokens is not None:
        return (Profile("decode", Range(1, 1, max_tokens), one, capacity, one),)
    batch, seq = Range(1, limits.batch, limits.batch), Range(1, limits.seq, limits.seq)
    prefill = Profile("prefill", Range(1, 1, limits.batch), seq, capacity, Range(1, 1, limits.seq))
    return Profile("decode", batch, one, capacity, one), prefill


def weights_of(lowered: Lowered | LoweredExperts) -> dict[str, Weight]:
    """What engine.json says of a part's float matrices, by name."""
    if isinstance(lowered, LoweredExperts):
        dtypes: dict[str | None, str] = dict.fromkeys(lowered.weights, lowered.call.dtype)
    else:
        dtypes = {
            value.name: _NAMES[value.dtype] for value in lowered.model.graph.inputs if value.name in lowered.weights
        }
    return {
        name: Weight(
            name=name,
            file=str(tensor.location),
            offset=tensor.offset or 0,
            size=tensor.length or tensor.nbytes,
            stored=_NAMES[tensor.dtype],  # type: ignore[arg-type]
            dtype=dtypes[name],  # type: ignore[arg-type]
            shape=tuple(int(dim) for dim in tensor.shape),
        )
        for name, tensor in lowered.weights.items()
    }


def passes_of(lowered: Lowered) -> tuple[Passed, ...]:
    """What engine.json says of the tensors that a part hands on."""
    return tuple(
        Passed(
            name=value.name or "",
            integer=value.dtype == ir.DataType.INT64,
            shape=tuple(str(dim.value) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape or ()),  # type: ignore[misc]
        )
        for value in lowered.model.graph.outputs
        if (value.name or "").startswith(PASSED)
    )


def _write(writer: EngineWriter, form: _Form, lowered: Lowered, built: BuiltPlan) -> Plan:
    name = f"{form.name}.{lowered.stage}.{lowered.part}"
    writer.create(f"{name}.plan").write(built.plan)
    writer.create(f"{name}.layers.json").write(json.dumps(built.layers, indent=1).encode())
    return Plan(
        file=f"{name}.plan",
        stage=lowered.stage,  # type: ignore[arg-type]
        part=lowered.part,
        passes=passes_of(lowered),
        form=form.name,  # type: ignore[arg-type]
        max_tokens=form.max_tokens,
        profiles=form.profiles,
        size=len(built.plan),
        sha256=sha256(built.plan).hexdigest(),
        layers=f"{name}.layers.json",
        activation_bytes=built.activation_bytes,
    )
