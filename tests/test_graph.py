"""The model file: its contract, its portability, what it carries and what it does not."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import inliner
from onnx.reference import ReferenceEvaluator

from mythos_export.export import export_bundle
from mythos_export.verify import verify_bundle
from runtimes.bundle import open_bundle
from runtimes.runner import Runner, load

INPUTS = {
    "input_ids": ("INT64", ["batch", "seq"]),
    "past_len": ("INT64", ["batch"]),
    "past_kv": ("FLOAT", ["slots", "batch", "capacity", 48]),
    "logit_positions": ("INT64", ["batch", "k"]),
    "n_loops": ("INT64", ["batch"]),
}
OUTPUTS = {
    "logits": ("FLOAT", ["batch", "k", 2048]),
    "new_kv": ("FLOAT", ["slots", "batch", "seq", 48]),
    "exit_loop": ("INT64", ["batch", "seq"]),
}


def described(values) -> dict[str, tuple[str, list[str | int]]]:
    return {
        value.name: (
            onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def graph_of(bundle: Path, file: str = "decoder.onnx") -> onnx.ModelProto:
    return onnx.load(bundle / file, load_external_data=False)


@pytest.fixture(scope="module")
def gqa_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    config = folder / "config.json"
    config.write_text(
        '{"vocab_size": 97, "dim": 24, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 64, "max_loop_iters": 3,'
        '"prelude_layers": 1, "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2}'
    )
    export_bundle(f"random:{config}", folder / "bundle")
    return folder / "bundle"


def test_contract(tiny_bundle: Path, fixed_bundle: Path) -> None:
    dynamic, fixed = graph_of(tiny_bundle).graph, graph_of(fixed_bundle).graph
    assert described(dynamic.input) == INPUTS
    assert described(dynamic.output) == OUTPUTS
    assert set(described(fixed.input)) == set(INPUTS) - {"n_loops"}
    assert described(fixed.input)["past_kv"][1] == [6, "batch", "capacity", 48]


@pytest.mark.parametrize("which", ["tiny_bundle", "fixed_bundle", "gqa_bundle"])
def test_checker_in_a_process_that_knows_nothing_of_us(which: str, request: pytest.FixtureRequest) -> None:
    """onnx alone accepts the file: the operators' bodies are inside, no schema of ours is registered."""
    model = request.getfixturevalue(which) / "decoder.onnx"
    code = "import onnx, sys; onnx.checker.check_model(sys.argv[1], full_check=True); assert 'mythos_export' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code, str(model)], check=True)


@pytest.mark.parametrize("which", ["tiny_bundle", "fixed_bundle", "gqa_bundle"])
def test_plain_onnxruntime_and_onnx_evaluator_agree(which: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(which)
    path = str(bundle / "decoder.onnx")
    graph = open_bundle(bundle)[1].graphs[0]
    loops = graph.loops or graph.default_loops
    random = np.random.default_rng(0)
    shape = (graph.slots(loops), 2, 7, graph.cache_width)
    feeds = {
        "input_ids": random.integers(0, graph.vocab_size, (2, 3)),
        "past_len": np.array([5, 2]),
        "past_kv": random.standard_normal(shape, dtype=np.float32),
        "logit_positions": np.array([[2, 0], [1, 2]]),
    }
    if graph.loops is None:
        feeds["n_loops"] = np.array([loops, 1])
    session = onnxruntime.InferenceSession(path)  # no option, no library
    ours = session.run(None, feeds)
    theirs = ReferenceEvaluator(path).run(None, feeds)
    for name, a, b in zip(OUTPUTS, ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4, err_msg=name)


def test_bodies_inline_to_standard_operators(tiny_bundle: Path) -> None:
    """What TensorRT and other consumers without functions need."""
    model = graph_of(tiny_bundle)
    used = {node.op_type for node in every_node(model.graph) if node.domain == "ai.mythos"}
    assert {function.name for function in model.functions} == used > {"LatentAttention", "MixtureOfExperts"}
    assert {function.domain for function in model.functions} == {"ai.mythos"}
    inlined = inliner.inline_local_functions(model)
    assert not inlined.functions
    assert {node.domain for node in every_node(inlined.graph)} <= {"", "ai.onnx"}


def every_node(graph: onnx.GraphProto):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from every_node(attribute.g)


def test_nodes_are_named_after_modules(tiny_bundle: Path) -> None:
    names = [node.name for node in every_node(graph_of(tiny_bundle).graph)]
    assert len(set(names)) == len(names)
    assert {
        "prelude.0.attn/LatentAttention",
        "recurrent.layers.0.ffn/MixtureOfExperts",
        "coda.0.attn.out/ResidualLinear",
    } <= set(names)


def test_no_trace_of_the_machine_it_was_made_on(tiny_bundle: Path) -> None:
    """The exporter's notes hold stack traces with paths."""
    content = (tiny_bundle / "decoder.onnx").read_bytes() + (tiny_bundle / "manifest.json").read_bytes()
    for word in (b"site-packages", b".py", str(Path.home()).encode() + b"/", str(tiny_bundle.parent).encode()):
        assert word not in content


def test_weights_lie_once(tiny_bundle: Path) -> None:
    """Every initializer of size is external, none overlaps, all begin on a cache line, and the file holds little else."""
    model = graph_of(tiny_bundle)
    ranges = []
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert np.prod(tensor.dims) <= 1024, tensor.name
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "weights.bin"
        ranges.append((int(entries["offset"]), int(entries["length"])))
    ranges.sort()
    assert all(offset % 64 == 0 for offset, _ in ranges)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(ranges))
    assert (tiny_bundle / "weights.bin").stat().st_size - sum(length for _, length in ranges) < 4096 * len(ranges)


def test_export_is_reproducible(shakespeare: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    export_bundle(shakespeare, tmp_path / "again", max_loops=12)
    for path in sorted(tiny_bundle.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_reduced_weights(dtype: str, shakespeare: Path, tiny_bundle: Path, tmp_path: Path, caplog) -> None:
    """Half the bytes; a typed graph for those who compute in it, a float32 one for onnxruntime's CPU, which says so once."""
    bundle = tmp_path / dtype
    export_bundle(shakespeare, bundle, dtype=dtype)
    ratio = (bundle / "weights.bin").stat().st_size / (tiny_bundle / "weights.bin").stat().st_size
    assert ratio < 0.56
    typed, wide = graph_of(bundle), graph_of(bundle, "decoder.float32.onnx")
    assert described(typed.graph.input)["past_kv"][0] == dtype.upper()
    assert described(typed.graph.output)["new_kv"][0] == dtype.upper()
    wide_cache = {"float16": "float16", "bfloat16": "float32"}[dtype]  # numpy has no bfloat16 to hold a cache in
    assert described(wide.graph.input)["past_kv"][0] == wide_cache.upper().removesuffix("32")
    dtypes = [(graph.dtype, graph.cache_dtype) for graph in open_bundle(bundle)[1].graphs]
    assert dtypes == [(dtype, dtype), ("float32", wide_cache)]
    for name in ("decoder.onnx", "decoder.float32.onnx"):
        onnx.checker.check_model(str(bundle / name), full_check=True)
    runner = load(bundle)
    load(bundle)
    assert sum(f"do not compute in {dtype}" in record.message for record in caplog.records) <= 1
    parity = verify_bundle(bundle, shakespeare, tokens=40, loops=(1, 4))
    assert all(check.ok for check in parity.checks)
    assert len(runner.generate("ROMEO.", 8).complete().ids) == 8


def test_float16_graph_computes(shakespeare: Path, runner: Runner, tmp_path: Path) -> None:
    """The typed graph itself, on onnxruntime with its own casts around every node: near the float32 bundle."""
    export_bundle(shakespeare, tmp_path / "half", dtype="float16")
    session = onnxruntime.InferenceSession(str(tmp_path / "half" / "decoder.onnx"))
    ids = runner.encode("Enter HAMLET.\nTo be, or not to be")
    positions = np.arange(len(ids))[None]
    feeds = {"input_ids": np.array([ids]), "past_len": np.zeros(1, np.int64), "logit_positions": positions}
    feeds |= {"past_kv": np.zeros((6, 1, 1, 48), np.float16), "n_loops": np.array([4])}
    half = session.run(["logits"], feeds)[0][0]
    full = runner.score(ids, 4, logits=True)
    assert np.abs(half - full).max() < 0.1
    assert (half.argmax(-1) == full.argmax(-1)).mean() >= 0.9


def test_tensors_of_2_gb_and_more_are_addressed(tmp_path: Path) -> None:
    """Offsets beyond 2**31 survive the protobuf: the graph never embeds weights."""
    from mythos_export import export as module
    from mythos_export.checkpoint import load_checkpoint
    from mythos_export.trace import trace

    config = load_checkpoint("random:mythos_1b").config
    traced = trace(config, loops=1, max_loops=1)
    offset, offsets = 0, {}
    for name, parameter in traced.parameters.items():
        offsets[name] = (offset, parameter.nbytes)
        offset += parameter.nbytes
    assert offset > 2**32 - 2**28
    module._attach(traced.model, traced.parameters, offsets)
    import onnx_ir as ir

    proto = ir.to_proto(traced.model)
    stored = {tensor.name: {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
              for tensor in proto.graph.initializer if tensor.external_data}  # fmt: skip
    assert max(entry["offset"] for entry in stored.values()) > 2**31
    assert proto.ByteSize() < 2**20
