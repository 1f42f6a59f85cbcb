"""Builds an engine of a bundle: the forms its experts need, profiles from its limits, everything written at once.

Shape letters: T tokens of a step, E routed experts, K top_k.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir

from mythos_export import __version__, overloads
from mythos_export.build.builder import BuiltPlan, Options, Progress, build_plan
from mythos_export.build.check import check_engine
from mythos_export.build.lower import DTYPES, Lowered, lower
from mythos_export.config import MixtureOfExpertsConfig, ModelConfig
from runtimes import cuda, tensorrt_api
from runtimes.bundle import Graph, Manifest, open_bundle
from runtimes.dtypes import STORAGE
from runtimes.engines import FOLDER, FORMAT_VERSION, Engine, EngineWriter, Plan, Profile, Range, Weight, engine_key
from runtimes.errors import BackendError, InputError
from runtimes.tensorrt_api import TensorRT

_log = logging.getLogger("mythos_export")
MAX_BATCH, MAX_SEQ, MAX_CONTEXT = 1, 512, 4096  # of an engine, unless asked for more; the last at most the model's
_BUCKET = 256  # least capacity of a cache
# A gathered expert is read at 0.6 of the bandwidth at which all are read in turn (H100, TensorRT 8.6, experts of 2048 x 4096 in
# float16), so gathering pays up to this share of all experts.
_GATHERING_PAYS = 0.6


@dataclass(frozen=True)
class Limits:
    """What an engine must serve. batch: sequences. seq: new tokens of each in a prefill step. context: tokens of each."""

    batch: int = MAX_BATCH
    seq: int = MAX_SEQ
    context: int | None = None


def build_engine(
    bundle: str | Path,
    *,
    backend: str = "tensorrt",
    dtype: str | None = None,
    limits: Limits | None = None,
    options: Options | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Path, Engine]:
    """Builds an engine of a bundle into its engines/ folder and returns where it stands and its metadata.

    backend: "tensorrt" or "tensorrt-rtx". dtype: of matrices and cache, one of float32, float16, bfloat16 (default: the bundle's;
    of a quantized bundle float16, or float32 before TensorRT 10). limits: default Limits(). force: replace an engine of that key.
    Where the GPU is at hand, the engine's results are held against onnxruntime's before it stays; see check_engine.
    Raises BackendError where TensorRT or the GPU is missing, the graph is refused or results are wrong, InputError for limits that
    make no sense, BundleError for a damaged bundle or an engine that exists.
    """
    library = tensorrt_api.find(backend)
    options, limits = options or Options(), limits or Limits()
    folder, manifest = open_bundle(bundle)
    dtype = _checked_dtype(dtype, manifest.graphs[0], library)
    device, capabilities = _target(library, options)
    job = _Job(library, folder, manifest, dtype, limits, options, device, capabilities, progress)
    _checked_context(limits, manifest.graphs[0])
    for way in range(library.n_ways):
        try:
            return _built(job, way, force=force)
        except BackendError as error:
            if way + 1 == library.n_ways:
                raise
            _log.warning("%s; another way of building is tried", error)
    raise BackendError(f"{backend} {library.version} knows no way to build")


@dataclass(frozen=True)
class _Job:
    """What is to be built, all of it checked."""

    library: TensorRT
    folder: Path
    manifest: Manifest
    dtype: str
    limits: Limits
    options: Options
    device: str
    capabilities: tuple[str, ...]
    progress: Progress | None

    @property
    def key(self) -> str:
        return engine_key(self.library.backend, self.library.version, self.capabilities, self.device, self.dtype)


def _built(job: _Job, way: int, *, force: bool) -> tuple[Path, Engine]:
    """Builds the engine one way and, where the GPU is at hand, checks its results. Raises BackendError, leaving none behind."""
    path = job.folder / FOLDER / job.key
    began = time.perf_counter()
    cache = path.with_name(f".{job.key.rpartition('-')[0]}.timing")
    timing = cache.read_bytes() if cache.is_file() else b""
    graph, library = job.manifest.graphs[0], job.library
    context = _checked_context(job.limits, graph)
    with EngineWriter(job.folder, job.key, force=force) as writer:
        plans, weights, built = [], dict[str, Weight](), []
        for form, max_tokens in _forms(job.manifest, job.limits):
            lowered = lower(job.folder, graph, job.dtype, form=form, old_parser=not library.capabilities.strongly_typed)
            weights.update(_weights(lowered))
            profiles = _profiles(graph, job.limits, context, max_tokens)
            model = ir.to_proto(lowered.model).SerializeToString()
            plan = build_plan(library, model, job.folder, profiles, job.options, way, timing, job.progress)
            built.append(plan)
            timing = plan.timing_cache or timing
            plans.append(_write(writer, form, max_tokens, profiles, plan))
        engine = _metadata(job, tuple(plans), tuple(weights.values()), built, time.perf_counter() - began)
        writer.commit(engine)
    if timing:
        cache.write_bytes(timing)
    if not job.options.compute_capabilities:
        try:
            agreement = check_engine(job.folder, job.key)
        except BackendError:
            shutil.rmtree(path)
            raise
        _log.info(
            "%s agrees with onnxruntime: mean KL %.2g nats, top-1 %.4f", job.key, agreement.mean_kl, agreement.top1
        )
    return path, engine


def _metadata(
    job: _Job, plans: tuple[Plan, ...], weights: tuple[Weight, ...], built: Sequence[BuiltPlan], seconds: float
) -> Engine:
    graph, files = job.manifest.graphs[0], job.manifest.files
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
        cache_dtype=job.dtype,  # type: ignore[arg-type]
        integers="int64" if job.library.capabilities.int64 else "int32",
        host_inputs=tuple(sorted({name for plan in built for name in plan.host_inputs})),
        cuda_graph=graph.loops is not None,
        weights=weights,
        plans=plans,
        build_seconds=seconds,
    )


def _checked_dtype(dtype: str | None, graph: Graph, library: TensorRT) -> str:
    quantized = graph.weight_dtype not in STORAGE
    able = library.capabilities
    if dtype is None:
        dtype = graph.dtype if not quantized else "float16" if able.strongly_typed else "float32"
    if dtype not in DTYPES:
        raise InputError(f'dtype is "{dtype}"; expected one of {", ".join(DTYPES)}')
    wanted = {"bfloat16": dtype == "bfloat16", "int4": "int4" in graph.weight_dtype, "fp8": "fp8" in graph.weight_dtype}
    for name, is_wanted in wanted.items():
        if is_wanted and not getattr(able, name):
            raise InputError(
                f"{library.backend} {library.version} has no {name}, which TensorRT 10 has; use "
                + ("--dtype float16" if name == "bfloat16" else "a bundle of int8 weights (--recipe w8a8) or of floats")
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


def _forms(manifest: Manifest, limits: Limits) -> list[tuple[str, int | None]]:
    """Forms to build, with the most tokens of a step each is for."""
    config = ModelConfig.from_dict(manifest.model)
    experts = [layer.feed_forward for layer in config.layers if isinstance(layer.feed_forward, MixtureOfExpertsConfig)]
    many: list[tuple[str, int | None]] = [(overloads.MANY_TOKENS, None)]
    if not experts:
        return many
    few = max(1, min(int(_GATHERING_PAYS * moe.n_experts / moe.top_k) for moe in experts))
    return [(overloads.FEW_TOKENS, min(few, limits.batch)), *many]


def _profiles(graph: Graph, limits: Limits, context: int, max_tokens: int | None) -> tuple[Profile, ...]:
    batch = Range(1, max_tokens or limits.batch, max_tokens or limits.batch)
    slots = Range(
        graph.slots(graph.loops or 1), graph.slots(graph.loops or graph.default_loops), graph.slots(graph.max_loops)
    )
    least = min(_BUCKET, context)
    capacity = Range(least, min(1024, context), context)
    one = Range(1, 1, 1)
    decode = Profile("decode", Range(1, 1, max_tokens) if max_tokens else batch, one, capacity, slots, one)
    if max_tokens is not None:
        return (decode,)
    seq = Range(1, limits.seq, limits.seq)
    return decode, Profile("prefill", Range(1, 1, limits.batch), seq, capacity, slots, Range(1, 1, limits.seq))


def _weights(lowered: Lowered) -> dict[str, Weight]:
    inputs = {value.name: value for value in lowered.model.graph.inputs}
    names = {kind: name for name, kind in DTYPES.items()}
    return {
        name: Weight(
            name=name,
            file=str(tensor.location),
            offset=tensor.offset or 0,
            size=tensor.length or tensor.nbytes,
            stored=names[tensor.dtype],  # type: ignore[arg-type]
            dtype=names[inputs[name].dtype],  # type: ignore[arg-type]
            shape=tuple(int(dim) for dim in tensor.shape),
        )
        for name, tensor in lowered.weights.items()
    }


def _write(
    writer: EngineWriter, form: str, max_tokens: int | None, profiles: tuple[Profile, ...], built: BuiltPlan
) -> Plan:
    file, layers = f"{form}.plan", f"{form}.layers.json"
    writer.create(file).write(built.plan)
    writer.create(layers).write(json.dumps(built.layers, indent=1).encode())
    return Plan(
        file=file,
        form=form,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        profiles=profiles,
        size=len(built.plan),
        sha256=sha256(built.plan).hexdigest(),
        layers=layers,
        activation_bytes=built.activation_bytes,
    )
