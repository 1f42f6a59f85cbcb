"""Engines for fake_tensorrt: the parts that a real engine is built from, in onnxruntime."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from fake_tensorrt import make_plan

from runtimes.bundle import Graph, open_bundle
from runtimes.engine_folder import EngineWriter
from runtimes.engines import FORMAT_VERSION, Engine, ExpertsCall, Passed, Plan, Profile, Range, Weight, engine_key
from runtimes.folder_writer import FileEntry

if TYPE_CHECKING:
    import onnx

BATCH, SEQ = 4, 32  # most sequences, most tokens of a prefill step
Dims = tuple[str | int, ...]


def add_engine(
    bundle: Path,
    *,
    backend: str = "tensorrt",
    version: str = "8.6.1",
    device: str = "Fake GPU",
    capabilities: tuple[str, ...] = ("9.0",),
    dtype: str = "float32",
    integers: str = "int32",
    few_tokens: int | None = 2,
    max_context: int | None = None,
    header: bytes | None = None,
) -> Path:
    """Writes an engine of the bundle and returns its folder. few_tokens: max_tokens of plans of that form, None for no such
    plans."""
    _, manifest = open_bundle(bundle)
    graph = manifest.graphs[0]
    forms = [("many_tokens", None)] if few_tokens is None else [("few_tokens", few_tokens), ("many_tokens", None)]
    key = engine_key(backend, version, capabilities, device, dtype)
    old_parser = backend == "tensorrt" and int(version.partition(".")[0]) < 10
    plans, calls, weights = [], [], {}
    with EngineWriter(bundle, key) as writer:
        for form, most in forms:
            profiles = _profiles(form, max_context or graph.max_seq_len)
            for part in _parts(bundle, dtype, form, integers, old_parser):
                weights.update({weight.name: weight for weight in part.weights})
                if part.call is not None:
                    calls.append(part.call)
                    continue
                name = f"{form}.{part.stage}.{part.part}"
                shapes = [_shapes(dict(part.inputs), profile) for profile in profiles]
                data = make_plan(part.model, shapes, 4096)
                entry = _write(writer, f"{name}.plan", data if header is None else header + data[len(header) :])
                _write(writer, f"{name}.layers.json", b"[]")
                plans.append(
                    Plan(
                        file=f"{name}.plan",
                        stage=part.stage,
                        part=part.part,
                        passes=part.passes,
                        form=form,
                        max_tokens=most,
                        profiles=profiles,
                        size=entry.size,
                        sha256=entry.sha256,
                        layers=f"{name}.layers.json",
                        activation_bytes=4096,
                    )
                )
        writer.commit(
            Engine(
                format="mythos-engine",
                format_version=FORMAT_VERSION,
                producer="test",
                backend=backend,
                version=version,
                device=device,
                compute_capabilities=capabilities,
                graph_file=graph.file,
                graph_sha256=manifest.files[graph.file].sha256,
                weights_sha256={name: manifest.files[name].sha256 for name in graph.weights},
                dtype=dtype,
                cache_dtype="float32" if old_parser else dtype,
                integers=integers,
                max_context=max_context or graph.max_seq_len,
                dim=manifest.model["dim"],
                weights=tuple(weights.values()),
                plans=tuple(plans),
                experts=tuple(calls),
                build_seconds=0.0,
            )
        )
    return bundle / "engines" / key


def _write(writer: EngineWriter, name: str, data: bytes) -> FileEntry:
    file = writer.create(name)
    file.write(data)
    return file.entry


class _Part(NamedTuple):
    """A plan, or a call of the kernels."""

    weights: tuple[Weight, ...]
    call: ExpertsCall | None = None
    stage: str = ""
    part: int = 0
    passes: tuple[Passed, ...] = ()
    model: bytes = b""
    inputs: tuple[tuple[str, Dims], ...] = ()  # but the weights


_LOWERED: dict[tuple[object, ...], list[_Part]] = {}  # by what they are made of: copies of a bundle share them


def _parts(bundle: Path, dtype: str, form: str, integers: str, old_parser: bool) -> list[_Part]:
    """The parts of a form."""
    _, manifest = open_bundle(bundle)
    graph = manifest.graphs[0]
    made_of = tuple(manifest.files[name].sha256 for name in (graph.file, *graph.weights))
    key = (made_of, dtype, form, integers, old_parser)
    if key not in _LOWERED:
        _LOWERED[key] = _lowered(bundle, graph, dtype, form, integers, old_parser)
    return _LOWERED[key]


def _lowered(bundle: Path, graph: Graph, dtype: str, form: str, integers: str, old_parser: bool) -> list[_Part]:
    import onnx_ir as ir  # which a machine that runs real engines need not have

    from mythos_export.build.engine import passes_of, weights_of
    from mythos_export.build.lower import LoweredExperts, lower

    sizes = {"seq": 1, "k": 1} if form == "few_tokens" else {}
    parts = []
    for lowered in lower(bundle, graph, dtype, form=form, sizes=sizes, old_parser=old_parser):
        weights = tuple(weights_of(lowered).values())
        if isinstance(lowered, LoweredExperts):
            parts.append(_Part(weights, lowered.call))
            continue
        model = ir.to_proto(lowered.model)
        if integers == "int32":
            _narrow_integers(model.graph)
        names = {weight.name for weight in weights}
        inputs = tuple(
            (value.name, tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim))
            for value in model.graph.input
            if value.name not in names
        )
        serialized = model.SerializeToString()
        parts.append(_Part(weights, None, lowered.stage, lowered.part, passes_of(lowered), serialized, inputs))
    return parts


def _narrow_integers(graph: onnx.GraphProto) -> None:
    """Casts around the graph: int32 outside, int64 inside."""
    from onnx import TensorProto, helper

    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type != TensorProto.INT64:
            continue
        inside = f"{value.name}_int64"
        of_input = value in list(graph.input)
        for node in graph.node:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == value.name:
                        names[index] = inside
        value.type.tensor_type.elem_type = TensorProto.INT32
        if of_input:
            graph.node.insert(0, helper.make_node("Cast", [value.name], [inside], to=TensorProto.INT64))
        else:
            graph.node.append(helper.make_node("Cast", [inside], [value.name], to=TensorProto.INT32))


def _profiles(form: str, max_context: int) -> tuple[Profile, ...]:
    batch, capacity, one = Range(1, 1, BATCH), Range(1, min(256, max_context), max_context), Range(1, 1, 1)
    decode = Profile("decode", batch, one, capacity, one)
    prefill = Profile("prefill", batch, Range(1, SEQ, SEQ), capacity, Range(1, 1, SEQ))
    return (decode,) if form == "few_tokens" else (decode, prefill)


def _shapes(inputs: dict[str, Dims], profile: Profile) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Least and largest shape of each input."""

    def span(dims: Dims) -> tuple[tuple[int, ...], tuple[int, ...]]:
        parts = [Range(dim, dim, dim) if isinstance(dim, int) else getattr(profile, dim) for dim in dims]
        return tuple(part.min for part in parts), tuple(part.max for part in parts)

    return {name: span(dims) for name, dims in inputs.items()}


def flip(path: Path, at: int = 1000) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(bytes(data))


def rewrite(folder: Path, **changes: object) -> None:
    """Changes fields of engine.json."""
    path = folder / "engine.json"
    engine = msgspec.json.decode(path.read_bytes(), type=Engine)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(engine, **changes)))


def rehash(folder: Path) -> None:
    """Makes engine.json agree with the plans as they are: what an attacker would do."""
    engine = msgspec.json.decode((folder / "engine.json").read_bytes(), type=Engine)
    plans = []
    for plan in engine.plans:
        data = (folder / plan.file).read_bytes()
        plans.append(msgspec.structs.replace(plan, size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    rewrite(folder, plans=tuple(plans))
