"""decoder.cuda.onnx, the graph for onnxruntime's CUDA provider: what it holds, and that it computes what the other graph does.

The provider is not here: bodies stand in for the operators of the CUDA library, so that onnxruntime's CPU provider runs the file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, inliner, parser

from mythos_export import cuda_graph, ops
from mythos_export.checkpoint import load_checkpoint
from mythos_export.export import export_bundle
from mythos_export.quantize import quantize_bundle
from mythos_export.quantize.recipe import load_recipe, with_overrides
from mythos_export.trace import trace
from runtimes.bundle import Graph, open_bundle
from runtimes.native_library import library_path

NATIVE = Path(__file__).parents[1] / "runtimes" / "native"
CONFIG = (
    '{"vocab_size": 97, "dim": 24, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 64, "max_loop_iters": 3,'
    '"prelude_layers": 1, "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2}'
)
# What stands in this graph alone.
BODIES = (
    """NormalizedLinearSplit <epsilon, sizes> (x, norm, weight) => (y, rest) {
         parts = Constant <value_ints: ints = @sizes> ()
         both = ai.mythos.NormalizedLinear <epsilon: float = @epsilon> (x, norm, weight)
         y, rest = Split <axis = -1> (both, parts)
       }""",
    """QuantizedNormalizedLinearSplit <epsilon, sizes, block_size, activation_type> (x, norm, weight, scale, rounded) => (y, rest) {
         parts = Constant <value_ints: ints = @sizes> ()
         both = ai.mythos.QuantizedNormalizedLinear <epsilon: float = @epsilon, block_size: int = @block_size,
           activation_type: int = @activation_type> (x, norm, weight, scale, rounded)
         y, rest = Split <axis = -1> (both, parts)
       }""",
    """Embedding (ids, table) => (y) {
         rows = Gather (table, ids)
         y = Cast <to = 1> (rows)
       }""",
    """PositionRows (past_len, ids, table) => (y) {
         second = Constant <value_ints = [1]> ()
         zero = Constant <value_int = 0> ()
         one = Constant <value_int = 1> ()
         seq = Shape <start = 1, end = 2> (ids)
         length = Squeeze (seq)
         steps = Range (zero, length, one)
         past = Unsqueeze (past_len, second)
         positions = Add (past, steps)
         rows = Shape <start = 0, end = 1> (table)
         count = Squeeze (rows)
         last = Sub (count, one)
         inside = Clip (positions, zero, last)
         y = Gather (table, inside)
       }""",
    """PickRows (x, positions) => (y) {
         last = Constant <value_ints = [-1]> ()
         dim = Shape <start = 2, end = 3> (x)
         counts = Shape (positions)
         shape = Concat <axis = 0> (counts, dim)
         each = Unsqueeze (positions, last)
         index = Expand (each, shape)
         y = GatherElements <axis = 1> (x, index)
       }""",
    """RecurrentStart <epsilon> (h, e, signal, norm, loop) => (y, result, mass, exit) {
         y = ai.mythos.RecurrentInput <epsilon: float = @epsilon> (h, e, signal, norm, loop)
         result = Sub (h, h)
         last = Constant <value_ints = [-1]> ()
         mass = ReduceSum (result, last)
         exit = Cast <to = 7> (mass)
       }""",
    """RecurrentUpdateInput <act_threshold, epsilon>
         (x, h, e, result, mass, exit, loop, n, down, scale, up, decay, inject, halt, bias, signal, norm, next) => (a, b, c, d, y) {
         a, b, c, d = ai.mythos.RecurrentUpdate <act_threshold: float = @act_threshold>
           (x, h, e, result, mass, exit, loop, n, down, scale, up, decay, inject, halt, bias)
         y = ai.mythos.RecurrentInput <epsilon: float = @epsilon> (a, e, signal, norm, next)
       }""",
    """QuantizedEmbedding <block_size, activation_type> (ids, table, scale) => (y) {
         rows = Gather (table, ids)
         row_scales = Gather (scale, ids)
         wide = Cast <to = 1> (row_scales)
         y = DequantizeLinear <axis = -1, block_size: int = @block_size> (rows, wide)
       }""",
)


def everywhere(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from everywhere(attribute.g.node)


def widened(operator: ops.Operator) -> onnx.FunctionProto:
    """The portable body of an operator over float32 casts of its matrices."""
    body = onnx.FunctionProto()
    body.CopyFrom(operator.functions[""])
    matrices = [name for name, kind, _ in operator.inputs if kind == "T"]
    for node in everywhere(body.node):
        node.input[:] = [f"{name}_wide" if name in matrices else name for name in node.input]
    for name in matrices:
        body.node.insert(0, helper.make_node("Cast", [name], [f"{name}_wide"], to=TensorProto.FLOAT))
    return body


def runs_anywhere(path: Path) -> onnx.ModelProto:
    """The graph of a file with bodies in the place of every operator."""
    model = onnx.load(path)
    model.functions.extend(widened(operator) for operator in ops.OPERATORS if operator.name in cuda_graph.KERNELS)
    opsets = f'<domain: "{ops.DOMAIN}", opset_import: ["": {ops.OPSET}, "{ops.DOMAIN}": 1]>'
    model.functions.extend(parser.parse_function(f"{opsets} {body}") for body in BODIES)
    for function in model.functions:
        function.opset_import.extend(
            [] if len(function.opset_import) > 1 else [helper.make_opsetid(ops.DOMAIN, ops.DOMAIN_VERSION)]
        )
    for node in [
        node for node in model.graph.node if node.op_type == "StackRows"
    ]:  # no body takes any number of inputs
        at = list(model.graph.node).index(node)
        rows = [f"{name}_row" for name in node.input]
        model.graph.initializer.append(helper.make_tensor("row_axis", TensorProto.INT64, [1], [0]))
        unsqueezed = [helper.make_node("Unsqueeze", [name, "row_axis"], [f"{name}_row"]) for name in node.input]
        for index, new in enumerate((*unsqueezed, helper.make_node("Concat", rows, node.output, axis=0))):
            model.graph.node.insert(at + index, new)
        model.graph.node.remove(node)
    return inliner.inline_local_functions(model)


@pytest.fixture(scope="module", params=["float32", "float16", "int4", "kv-int8", "int4,kv-int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint with 4 loops, in float16 with a dynamic loop count; or quantized."""
    fixed, target = request.getfixturevalue("fixed_bundle"), tmp_path_factory.mktemp("cuda") / "bundle"
    if request.param == "float32":
        return fixed
    if request.param.startswith("int4"):
        quantize_bundle(fixed, target, with_overrides(load_recipe(request.param), None, 32))
    elif request.param == "kv-int8":
        quantize_bundle(fixed, target, "kv-int8")
    else:
        export_bundle(request.getfixturevalue("shakespeare"), target, dtype="float16")
    return target


def files(bundle: Path) -> tuple[Graph, Path, Path]:
    """The manifest's entry, the file for the CUDA provider, and the one in float32 that it comes from."""
    graphs = open_bundle(bundle)[1].graphs
    assert graphs[0].cuda_file == "decoder.cuda.onnx"
    return graphs[0], bundle / graphs[0].cuda_file, bundle / graphs[-1].file


def described(model: onnx.ModelProto) -> list[tuple[str, bytes]]:
    return [(value.name, value.type.SerializeToString()) for value in (*model.graph.input, *model.graph.output)]


def feeds(graph: Graph, seq: int, past: list[int]) -> dict[str, np.ndarray]:
    draw, batch = np.random.default_rng(seq), len(past)
    slots = graph.slots(graph.default_loops)
    shape, int8 = (slots, batch, 16, graph.cache_width), graph.cache_dtype == "int8"
    past_kv = (draw.normal(size=shape) * (40 if int8 else 1)).astype(graph.cache_dtype)
    given = {
        "input_ids": draw.integers(graph.vocab_size, size=(batch, seq)),
        "past_len": np.array(past),
        "past_kv": past_kv,
        "logit_positions": np.tile(np.arange(seq), (batch, 1)),
    }
    if int8:
        given["past_scale"] = draw.uniform(0.02, 0.03, shape[:3]).astype(np.float32)
    return given if graph.loops is not None else {**given, "n_loops": np.array([graph.default_loops, 2][:batch])}


def test_it_computes_what_the_other_graph_does(bundle: Path) -> None:
    """To the last bit, where both run as portable bodies: prefill, and decode of rows of several lengths. Quantized attention has
    its matrices rounded to float16, which may move a cached number by a level."""
    graph, path, source = files(bundle)
    models = runs_anywhere(path), inliner.inline_local_functions(onnx.load(source))
    own, other = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]) for model in models
    )
    for seq, past in ((5, [0, 3]), (1, [15, 7])):
        given = feeds(graph, seq, past)
        for got, expected in zip(own.run(None, given), other.run(None, given), strict=True):
            rounded = 1.0 if got.dtype == np.int8 else 0.1 if graph.cache_dtype == "int8" else 0.02
            limit = rounded if graph.weight_dtype == "int4" else 0.0
            np.testing.assert_allclose(got.astype(np.float64), expected, rtol=0, atol=limit)


def test_it_reads_the_same_weights_through_operators_of_the_library_alone(bundle: Path) -> None:
    graph, path, source = files(bundle)
    model, other = (onnx.load(file, load_external_data=False) for file in (path, source))
    # In a process that knows the operators' schemas as they are in other graphs, it could not pass.
    check = f"import onnx; onnx.checker.check_model({str(path)!r}, full_check=True)"
    subprocess.run([sys.executable, "-c", check], check=True)
    assert described(model) == described(other)
    assert not model.functions
    weights = {tensor.name: tensor for tensor in other.graph.initializer}
    for tensor in model.graph.initializer:
        assert tensor.name not in weights or tensor == weights[tensor.name]
        assert tensor.data_location == TensorProto.EXTERNAL or np.prod(tensor.dims) < 100
    nodes = list(everywhere(model.graph.node))
    kinds = {node.op_type for node in nodes}
    quantized = "Quantized" * (graph.weight_dtype == "int4")
    assert {f"{quantized}NormalizedLinearSplit", f"{quantized}Embedding", "PositionRows"} <= kinds
    assert "Range" not in kinds  # computed on the CPU, whatever its inputs are
    assert not kinds & {"Split", "DequantizeLinear", "QuantizedLatentAttention", "QuantizedLatentAttentionInt8Cache"}
    int8 = graph.cache_dtype == "int8"
    assert ("LatentAttentionInt8Cache" in kinds) == int8
    stacked = [node.output[0] for node in nodes if node.op_type == "StackRows"]
    assert stacked == ([] if graph.loops is None else ["new_kv", "new_scale"] if int8 else ["new_kv"])
    loop_ends = [node.op_type for node in nodes if node.op_type.startswith("Recurrent")]
    joined = ["RecurrentUpdateInput"] * ((graph.loops or 1) - 1)  # unrolled, or the body of a loop
    start = "RecurrentInput" if graph.loops is None else "RecurrentStart"
    assert loop_ends == [start, *joined, "RecurrentUpdate"]
    assert not kinds & {"GatherElements"}
    assert quantized or not [node for node in nodes if node.op_type == "Cast" and node.input[0] in weights]
    assert path.name not in graph.weights
    assert path.stat().st_size < source.stat().st_size


def test_no_shape_is_left_where_the_inputs_dimensions_are_fixed(fixed_bundle: Path, tmp_path: Path) -> None:
    """What onnxruntime folds of the standard nodes alone: nothing stays that the CUDA provider would leave to the processor."""
    model = onnx.load(files(fixed_bundle)[1], load_external_data=False)
    ours = [node for node in model.graph.node if node.domain == ops.DOMAIN]
    made, taken = ({name for node in ours for name in names(node)} for names in (lambda n: n.output, lambda n: n.input))
    rest = [node for node in model.graph.node if node.domain != ops.DOMAIN]
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    outputs = [
        name for node in rest for name in node.output if name in taken or name in {v.name for v in model.graph.output}
    ]
    used = {name for node in rest for name in node.input}
    small = [tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    rope = [
        tensor
        for tensor in model.graph.initializer
        if tensor.name in used and tensor.data_location == TensorProto.EXTERNAL
    ]
    for tensor in rope:
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(fixed_bundle))
        tensor.data_location = TensorProto.DEFAULT
    graph = helper.make_graph(
        rest,
        "rest",
        [
            *(value for value in model.graph.input if value.name in used),
            *(values[name] for name in sorted(made & used)),
        ],
        [values[name] for name in outputs],
        [tensor for tensor in (*small, *rope) if tensor.name in used],
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    for name, size in {"batch": 2, "seq": 1, "capacity": 32, "k": 1}.items():
        options.add_free_dimension_override_by_name(name, size)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ops.OPSET)], ir_version=10)
    onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert left <= {"Unsqueeze", "Add", "Clip", "Min", "Gather", "Expand", "GatherElements", "Squeeze"}, left


def test_bfloat16_keeps_its_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    manifest = export_bundle(f"random:{tmp_path / 'config.json'}", tmp_path / "bundle", dtype="bfloat16", loops=2)
    _, path, _ = files(tmp_path / "bundle")
    model = onnx.load(path, load_external_data=False)
    of_cache = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert of_cache["past_kv"] == of_cache["new_kv"] == TensorProto.BFLOAT16
    matrices = {t.name for t in model.graph.initializer if t.data_type == TensorProto.BFLOAT16}
    assert {"embed", "recurrent.layers.0.ffn.gate_up"} <= matrices
    assert [graph.cuda_file for graph in manifest.graphs] == ["decoder.cuda.onnx", None]


def test_a_row_scale_is_kept(shakespeare: Path) -> None:
    """Of all rows of an int8 cache."""
    import torch

    traced = trace(load_checkpoint(shakespeare).config, loops=2, max_loops=2, cache_dtype=torch.int8, row_scale=0.0625)
    assert cuda_graph.serves(traced.model)
    cuda_graph.rewrite(traced.model)
    nodes = [node for node in traced.model.graph if node.op_type == "LatentAttentionInt8Cache"]
    assert {node.attributes["row_scale"].as_float() for node in nodes} == {0.0625}


def test_other_splits_of_several_sizes_become_slices() -> None:
    import onnx_ir as ir

    proto = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[b, 6] x) => (float[b, 1] a, float[b, 2] c, float[b, 3] new_kv)'
        "<int64[3] sizes = {1, 2, 3}> { y = Relu(x) a, c, new_kv = Split <axis = 1> (y, sizes) }"
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    cuda_graph.rewrite(model)
    rewritten = ir.to_proto(model)
    assert [node.op_type for node in rewritten.graph.node] == ["Relu", "Slice", "Slice", "Slice"]
    x = np.arange(12, dtype=np.float32).reshape(2, 6)
    parts = onnxruntime.InferenceSession(rewritten.SerializeToString()).run(None, {"x": x})
    np.testing.assert_array_equal(np.concatenate(parts, -1), x)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of operators, or, where it is not built, its host code over kernels that are not there."""
    if library_path("mythos_ops_cuda").is_file():
        return library_path("mythos_ops_cuda")
    caches = list(NATIVE.glob("build/*/CMakeCache.txt"))
    found = [
        line.partition("=")[2]
        for cache in caches
        for line in cache.read_text().splitlines()
        if "ONNXRUNTIME_INCLUDE" in line
    ]
    if not found or not shutil.which("g++"):
        pytest.skip("needs g++ and onnxruntime's headers")
    target = tmp_path_factory.mktemp("library") / "libmythos_ops_cuda.so"
    kernels = set(re.findall(r"\bmythos_cuda_\w+(?=\()", (NATIVE / "cuda" / "mythos_cuda.h").read_text()))
    stubs = target.with_name("kernels.cc")
    stubs.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in sorted(kernels)))
    exports = f"-Wl,--version-script={NATIVE / 'cuda' / 'exports.map'}"
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-shared", exports, "-isystem", found[0]]
    sources = [str(NATIVE / "cuda" / "onnxruntime_ops_cuda.cc"), str(stubs)]
    subprocess.run(["g++", *flags, *sources, "-o", str(target)], check=True)
    return target


def test_the_library_registers_without_a_gpu_and_types_its_operators(library: Path) -> None:
    """onnxruntime takes it, finds the types of every output, and then no CUDA provider; it exports its entry alone."""
    graphs = {
        "int64[b, s] ids, float16[9, 4] t": "float[b, s, 4] y = Embedding (ids, t)",
        "int64[b] p, int64[b, s] ids, float[9, 4] t": "float[b, s, 4] y = PositionRows (p, ids, t)",
        "int64[b, s] ids, int8[9, 64] t, float16[9, 2] u": "float[b, s, 64] y = QuantizedEmbedding <block_size = 32> (ids, t, u)",
        "float[b, s, 8] x, float[8] n, bfloat16[6, 8] w": "float[b, s, 6] y = NormalizedLinear <epsilon = 0.1> (x, n, w)",
        "float[b, s, 8] f, float[b, s, 1] m, int64[b, s, 1] i, int64 l, int64[b] n, float[2, 8] t, float[8] v, float[1] g": (
            "float[b, s, 8] h, float[b, s, 8] r, float[b, s, 1] w, int64[b, s, 1] x, float[b, s, 8] y"
            " = RecurrentUpdateInput <act_threshold = 0.9, epsilon = 0.1> "
            "(f, f, f, f, m, i, l, n, t, t, t, v, v, v, g, t, v, l)"
        ),
        "float[b, s, 8] f, float[2, 8] t, float[8] v, int64 l": (
            "float[b, s, 8] y, float[b, s, 8] r, float[b, s, 1] m, int64[b, s, 1] x"
            " = RecurrentStart <epsilon = 0.1> (f, f, t, v, l)"
        ),
        "float[b, s, 8] f, int64[b, k] p": "float[b, k, 8] y = PickRows (f, p)",
        "bfloat16[b, s, 8] p, bfloat16[b, s, 8] q": "bfloat16[2, b, s, 8] y = StackRows (p, q)",
        "int8[b, s, 8] p, int8[b, s, 8] q": "int8[2, b, s, 8] y = StackRows (p, q)",
        "float[b, s, 32] x, float[b, s, 4] c, int8[1, b, n, 16] p, float[1, b, n] z, int64[b] l, int64 i": (
            "float[b, s, 16] y, int8[b, s, 16] r, float[b, s] t = GroupedQueryAttentionInt8Cache "
            "<n_heads = 2, n_kv_heads = 1, window = 0, scale = 1.0, row_scale = 0.0> (x, c, c, p, z, l, i)"
        ),
    }
    for inputs, (outputs, call) in {key: value.split(" = ", 1) for key, value in graphs.items()}.items():
        node = f"{', '.join(re.findall(r'] (.)', outputs))} = ai.mythos.{call}"
        model = parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 21, "ai.mythos": 1]> g ({inputs}) => ({outputs}) {{ {node} }}'
        )
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        with pytest.raises(Exception, match=r"Failed to find kernel for|Could not find an implementation for"):
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if shutil.which("nm"):
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
        ).stdout
        assert [line.split()[-1] for line in symbols.splitlines()] == ["RegisterCustomOps"]
