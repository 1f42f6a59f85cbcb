"""Engines for fake_tensorrt: a bundle's own graph, its weights turned into inputs, the choice of a token appended."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from fake_tensorrt import make_plan

from runtimes.bundle import Graph, open_bundle
from runtimes.dtypes import STORAGE
from runtimes.engines import Engine, EngineWriter, Plan, Profile, Range, Weight, engine_key
from runtimes.folder_writer import FileEntry

if TYPE_CHECKING:
    import onnx

BATCH, SEQ = 4, 32  # most sequences, most tokens of a prefill step
INTEGERS = ("input_ids", "past_len", "logit_positions", "n_loops", "exit_loop", "next_token")


def add_engine(
    bundle: Path,
    *,
    backend: str = "tensorrt",
    version: str = "8.6.1",
    device: str = "Fake GPU",
    capabilities: tuple[str, ...] = ("9.0",),
    integers: str = "int32",
    few_tokens: int | None = 2,
    max_context: int | None = None,
    cuda_graph: bool = True,
    host_inputs: tuple[str, ...] = (),
    header: bytes | None = None,
) -> Path:
    """Writes an engine of the bundle and returns its folder. few_tokens: max_tokens of a plan of that form, None for no such
    plan."""
    _, manifest = open_bundle(bundle)
    graph = manifest.graphs[0]
    model, weights = lowered(bundle, graph, integers)
    forms = [("many_tokens", None)] if few_tokens is None else [("few_tokens", few_tokens), ("many_tokens", None)]
    dtype = msgspec.structs.asdict(graph)["dtype"]
    key = engine_key(backend, version, capabilities, device, dtype)
    plans = []
    with EngineWriter(bundle, key) as writer:
        for form, most in forms:
            profiles = _profiles(graph, form, max_context or graph.max_seq_len)
            shapes = [_shapes(graph, profile) for profile in profiles]
            data = make_plan(model.SerializeToString(), shapes, 4096, host_inputs)
            entry = _write(writer, f"{form}.plan", data if header is None else header + data[len(header) :])
            _write(writer, f"{form}.layers.json", b"[]")
            plans.append(
                Plan(f"{form}.plan", form, most, profiles, entry.size, entry.sha256, f"{form}.layers.json", 4096)
            )
        writer.commit(
            Engine(
                format="mythos-engine",
                format_version=1,
                producer="test",
                backend=backend,
                version=version,
                device=device,
                compute_capabilities=capabilities,
                graph_file=graph.file,
                graph_sha256=manifest.files[graph.file].sha256,
                weights_sha256={name: manifest.files[name].sha256 for name in graph.weights},
                dtype=dtype,
                cache_dtype=graph.cache_dtype,
                integers=integers,
                host_inputs=host_inputs,
                cuda_graph=cuda_graph,
                weights=weights,
                plans=tuple(plans),
                build_seconds=0.0,
            )
        )
    return bundle / "engines" / key


def _write(writer: EngineWriter, name: str, data: bytes) -> FileEntry:
    file = writer.create(name)
    file.write(data)
    return file.entry


def lowered(bundle: Path, graph: Graph, integers: str) -> tuple[onnx.ModelProto, tuple[Weight, ...]]:
    """The graph as an engine has it: weights are inputs, next_token and next_logprob outputs, integers of the given dtype."""
    import onnx  # which a machine that runs real engines need not have
    from onnx import TensorProto, external_data_helper, helper

    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    model = onnx.load(bundle / graph.file, load_external_data=False)
    weights = []
    for tensor in list(model.graph.initializer):
        if not external_data_helper.uses_external_data(tensor):
            continue
        where = {entry.key: entry.value for entry in tensor.external_data}
        dtype = names[tensor.data_type]
        size = int(np.prod(tensor.dims)) * np.dtype(STORAGE[dtype]).itemsize
        weights.append(
            Weight(tensor.name, where["location"], int(where.get("offset", 0)), size, dtype, dtype, tuple(tensor.dims))
        )
        model.graph.initializer.remove(tensor)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    model.graph.node.extend(
        [
            helper.make_node("ArgMax", ["logits"], ["next_token"], axis=-1, keepdims=0),
            helper.make_node("ArgMax", ["logits"], ["likeliest"], axis=-1, keepdims=1),
            helper.make_node("LogSoftmax", ["logits"], ["logprobs"], axis=-1),
            helper.make_node("GatherElements", ["logprobs", "likeliest"], ["logprob"], axis=-1),
            helper.make_node("Constant", [], ["last_axis"], value_ints=[-1]),
            helper.make_node("Squeeze", ["logprob", "last_axis"], ["next_logprob"]),
        ]
    )
    model.graph.output.append(helper.make_tensor_value_info("next_token", TensorProto.INT64, ["batch", "k"]))
    model.graph.output.append(helper.make_tensor_value_info("next_logprob", TensorProto.FLOAT, ["batch", "k"]))
    if integers == "int32":
        _narrow_integers(model.graph)
    return model, tuple(weights)


def _narrow_integers(graph: onnx.GraphProto) -> None:
    """Casts around the graph: int32 outside, int64 inside."""
    from onnx import TensorProto, helper

    for value in [*graph.input, *graph.output]:
        if value.name not in INTEGERS:
            continue
        inside = f"{value.name}_int64"
        of_input = value in list(graph.input)
        _rename(graph, value.name, inside)
        value.type.tensor_type.elem_type = TensorProto.INT32
        if of_input:
            graph.node.insert(0, helper.make_node("Cast", [value.name], [inside], to=TensorProto.INT64))
        else:
            graph.node.append(helper.make_node("Cast", [inside], [value.name], to=TensorProto.INT32))


def _rename(graph: onnx.GraphProto, before: str, after: str) -> None:
    """Renames a value wherever nodes read or write it, bodies of loops included."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == before:
                    names[index] = after
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, before, after)


def _profiles(graph: Graph, form: str, max_context: int) -> tuple[Profile, ...]:
    least, most = graph.slots(graph.loops or 1), graph.slots(graph.loops or graph.max_loops)
    batch, capacity, slots = Range(1, 1, BATCH), Range(1, min(256, max_context), max_context), Range(least, most, most)
    one = Range(1, 1, 1)
    decode = Profile("decode", batch, one, capacity, slots, one)
    prefill = Profile("prefill", batch, Range(1, SEQ, SEQ), capacity, slots, Range(1, 1, SEQ))
    return (decode,) if form == "few_tokens" else (decode, prefill)


def _shapes(graph: Graph, profile: Profile) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    def span(*ranges: Range | int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        parts = [part if isinstance(part, Range) else Range(part, part, part) for part in ranges]
        return tuple(part.min for part in parts), tuple(part.max for part in parts)

    shapes = {
        "input_ids": span(profile.batch, profile.seq),
        "past_len": span(profile.batch),
        "past_kv": span(profile.slots, profile.batch, profile.capacity, graph.cache_width),
        "logit_positions": span(profile.batch, profile.k),
    }
    return shapes if graph.loops is not None else {**shapes, "n_loops": span(profile.batch)}


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
