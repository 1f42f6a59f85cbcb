"""From a bundle's graph to one that TensorRT parses: engine bodies inlined, matrices as inputs, the next token as an output.

Matrices stay out of the engine. They become inputs of the graph, which a runner binds to one copy in device memory, shared by all
engines and contexts; TensorRT's products read them as fast as constants. Quantized matrices must be constants of the graph, next to
their DequantizeLinear.

Dimensions are those of the graph: batch, seq, k, capacity; and tokens, batch * seq.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common as passes

from mythos_export import overloads
from mythos_export.build import plugins as trt_plugins
from mythos_export.build.bodies import choose_bodies, input_names, matrix_of, split_linears
from mythos_export.build.dialect import to_old_parser
from mythos_export.build.initializers import integers
from mythos_export.build.parts import Experts, Part, cut_at_experts, has_experts
from mythos_export.build.quantized import lower_quantized, scale_outside
from mythos_export.build.stages import split
from runtimes.bundle import Graph
from runtimes.engines import NEW_KV, PAST_KV, ExpertsCall
from runtimes.errors import BackendError

DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
# Names that matrices have among the inputs of the operators; they are what a dtype is chosen for.
_MATRICES = ("weight", "gate_up", "down", "w_uk", "w_uv")
_EMBEDDING = "embed"
NEXT_TOKEN = ("next_token", "next_logprob")  # the outputs that come to the bundle's
_INPUT_BYTES = 1 << 16  # a matrix of as much becomes an input; smaller ones are constants
_FOLD_LIMIT = 4096  # numbers; folding serves shapes, scales and constants


@dataclass(frozen=True)
class Lowered:
    """A part of a stage, whose number it has. model: its graph. weights: the tensors that became inputs, as the bundle stores
    them."""

    stage: str
    part: int
    model: ir.Model
    weights: dict[str, ir.ExternalTensor]


@dataclass(frozen=True)
class LoweredExperts:
    """Experts as a part of a stage: a call of the CUDA kernels, no graph. weights: the tensors it reads, as the bundle stores
    them."""

    call: ExpertsCall
    weights: dict[str, ir.ExternalTensor]


def lower(
    folder: Path,
    graph: Graph,
    dtype: str,
    *,
    form: str,
    sizes: Mapping[str, int] | None = None,
    old_parser: bool = False,
    plugins: bool = False,
) -> list[Lowered | LoweredExperts]:
    """Lowers a graph of the bundle in folder; returns the parts of its stages in the order they run (see stages.split).

    dtype: of the matrices and the cache, "float32", "float16" or "bfloat16"; norms, router, halting and sums stay float32. form:
    FEW_TOKENS or MANY_TOKENS of mythos_export.overloads. sizes: of dimensions that are the same in every step, by name. old_parser:
    for TensorRT before 10; float16 and bfloat16 are the dtype of experts alone then, where there are any, and CUDA kernels compute
    those (see cut_at_experts). plugins: leave the operators to the TensorRT plugins, which serve any number of tokens; only where
    has_plugins says so. Raises BackendError for a bundle whose graph holds no bodies for engine builders.
    """
    model = ir.load(folder / graph.file)
    kind = DTYPES[dtype]
    cut = old_parser and kind != ir.DataType.FLOAT and has_experts(model)
    if not plugins:
        choose_bodies(model, form)
    lowered: list[Lowered | LoweredExperts] = []
    for name, stage in split(model).items():
        for number, part in enumerate(cut_at_experts(stage) if cut else [Part(stage, kind)]):
            if isinstance(part, Experts):
                lowered.append(_lower_experts(part, name, number, form, dtype))
            else:
                lowered.append(Lowered(name, number, *_lower_part(part, sizes or {}, old_parser, plugins)))
    return lowered


def has_plugins(folder: Path, graph: Graph) -> bool:
    """Whether the TensorRT plugins compute all operators of a graph of the bundle in folder."""
    return trt_plugins.are_enough(ir.load(folder / graph.file))


def _lower_experts(experts: Experts, stage: str, part: int, form: str, dtype: str) -> LoweredExperts:
    values = {name: getattr(experts, name).name for name in ("normed", "chosen", "weight", "mixed")}
    stacks = {name: value.name or "" for name, value in experts.stacks.items()}
    tensors = {name: value.const_value for name, value in experts.stacks.items()}
    routed, dim, expert_dim = (int(size) for size in tensors["down_routed"].shape)
    shared = int(tensors["down_shared"].shape[0]) if "down_shared" in stacks else 0
    call = ExpertsCall(
        stage=stage,  # type: ignore[arg-type]
        part=part,
        form=form,  # type: ignore[arg-type]
        **values,
        **{"gate_up_shared": None, "down_shared": None, **stacks},  # type: ignore[arg-type]
        dtype=dtype,  # type: ignore[arg-type]
        dim=dim,
        expert_dim=expert_dim,
        top_k=experts.top_k,
        routed=routed,
        shared=shared,
    )
    return LoweredExperts(call, {stacks[name]: tensor for name, tensor in tensors.items()})


def _lower_part(
    part: Part, sizes: Mapping[str, int], old_parser: bool, plugins: bool
) -> tuple[ir.Model, dict[str, ir.ExternalTensor]]:
    model, dtype = part
    if old_parser:
        split_linears(model)
    _fix_sizes(model, sizes)
    _set_dtype(model, dtype)
    _hold_small(model)
    if plugins:
        trt_plugins.to_plugins(model)
    _add_next_token(model)
    passes.InlinePass()(model)
    _read_caches_whole(model)
    lower_quantized(model, dtype)
    _name_sizes(model)
    weights = _weights_to_inputs(model)  # before folding, which would transpose them
    _fold(model)
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)
        weights.pop(value.name or "", None)
    _check_standard(model)
    scale_outside(model)
    if old_parser:
        to_old_parser(model)
    _forget_untyped(model)
    return model, weights


def _nodes(model: ir.Model) -> list[ir.Node]:
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def _fix_sizes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    values = [*model.graph.inputs, *(output for node in _nodes(model) for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [sizes.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)


def _set_dtype(model: ir.Model, dtype: ir.DataType) -> None:
    """Gives matrices and cache the dtype; the values between follow, except where the graph itself needs float32."""
    graph = model.graph
    for node in _nodes(model):
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = None  # inferred again from here on
    for node in _nodes(model):
        if node.domain == overloads.DOMAIN:
            for name, value in zip(input_names(model, node), node.inputs, strict=True):
                if value is not None and matrix_of(name) in _MATRICES and value.dtype in DTYPES.values():
                    value.type = ir.TensorType(dtype)
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].name == _EMBEDDING:
            node.inputs[0].type = ir.TensorType(dtype)
            _cast_output(node, ir.DataType.FLOAT)
    for value in [*graph.inputs, *graph.outputs]:
        if (value.name or "").startswith((PAST_KV, NEW_KV)):
            value.type = ir.TensorType(dtype)
    for output in list(graph.outputs):
        producer = output.producer()
        if output.name == "logits" and producer is not None:
            _cast_output(producer, ir.DataType.FLOAT)


def _read_caches_whole(model: ir.Model) -> None:
    """A cache that has one slot is read as it is: no slot of it needs picking."""
    for node in _nodes(model):
        whole = node.inputs[0].producer() if node.op_type == "Gather" and node.inputs[0] is not None else None
        if whole is None or whole.op_type != "Unsqueeze" or not is_cache(whole.inputs[0]):
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], whole.inputs[0])
        node.graph.remove(node, safe=True)


def is_cache(value: ir.Value | None) -> bool:
    """Whether a value is the cache of an attention layer."""
    return value is not None and value.is_graph_input() and (value.name or "").startswith(PAST_KV)


def _cast_output(node: ir.Node, dtype: ir.DataType) -> None:
    """Casts a node's first output for all who use it, keeping its name."""
    output = node.outputs[0]
    cast = ir.node("Cast", [output], {"to": dtype.value}, name=f"{node.name}/cast")
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), output.shape
    ir.convenience.replace_all_uses_with(output, cast.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    cast.outputs[0].name, output.name = output.name, f"{output.name}/uncast"
    if isinstance(node.graph, ir.Graph):
        node.graph.insert_after(node, cast)


# The likeliest token, the lowest id among equals, and its natural log-probability, for each of logits [batch, k, vocab].
_NEXT_TOKEN = """
<domain: "ai.mythos", opset_import: ["": 21]>
NextToken (logits) => (next_token, next_logprob) {
  last = Constant <value_ints = [-1]> ()
  axis_0 = Constant <value_ints = [0]> ()
  largest = ReduceMax <keepdims = 1> (logits, last)
  vocab_1 = Shape <start = -1> (logits)
  vocab = Squeeze(vocab_1, axis_0)
  from_0 = Constant <value_int = 0> ()
  by_1 = Constant <value_int = 1> ()
  ids = Range(from_0, vocab, by_1)
  is_largest = Equal(logits, largest)
  id_or_none = Where(is_largest, ids, vocab)
  next_token = ReduceMin <keepdims = 0> (id_or_none, last)
  shifted = Sub(logits, largest)
  exponentials = Exp(shifted)
  total = ReduceSum <keepdims = 0> (exponentials, last)
  log_total = Log(total)
  next_logprob = Neg(log_total)
}
"""


def _add_next_token(model: ir.Model) -> None:
    """Two outputs more where there are logits, so that those need not leave the device."""
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if logits is None:
        return
    function = ir.serde.deserialize_function(onnx.parser.parse_function(_NEXT_TOKEN))
    model.functions[function.identifier()] = function
    node = ir.node("NextToken", [logits], domain=overloads.DOMAIN, num_outputs=2, name="decoder/NextToken")
    shape = None if logits.shape is None else logits.shape[:2]
    for output, name, dtype in zip(node.outputs, NEXT_TOKEN, (ir.DataType.INT64, ir.DataType.FLOAT), strict=True):
        output.name, output.type, output.shape = name, ir.TensorType(dtype), None if shape is None else ir.Shape(shape)
        model.graph.outputs.append(output)
    model.graph.append(node)


def _name_sizes(model: ir.Model) -> None:
    """Takes the sizes of values from the graph's inputs where they are the same, so that layers share what follows from them."""
    graph, first = model.graph, model.graph[0]
    sizes: dict[str, ir.Value] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            name = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if name and name not in sizes:
                attributes = {"start": axis, "end": axis + 1}
                node = ir.node("Shape", [value], attributes, name=f"decoder/{name}")
                node.outputs[0].name, node.outputs[0].shape = f"decoder/{name}", ir.Shape([1])
                node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
                graph.insert_before(first, node)
                sizes[name] = node.outputs[0]
    known = {value.producer() for value in sizes.values()}
    for node in _nodes(model):
        if node.op_type != "Shape" or node in known or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        rank = len(node.inputs[0].shape)
        start, end = (_clamped(node, name, default, rank) for name, default in (("start", 0), ("end", rank)))
        dims = list(node.inputs[0].shape)[start:end]
        parts = [_size(model, dim, sizes) for dim in dims]
        if not parts or any(part is None for part in parts):
            continue
        whole = ir.node("Concat", parts, {"axis": 0}, name=node.name)
        whole.outputs[0].name, whole.outputs[0].shape = node.outputs[0].name, ir.Shape([len(parts)])
        whole.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], [whole], node.outputs, whole.outputs)


def _clamped(node: ir.Node, name: str, default: int, rank: int) -> int:
    attribute = node.attributes.get(name)
    value = default if attribute is None else attribute.as_int()
    return max(0, min(rank, value + rank if value < 0 else value))


def _size(model: ir.Model, dim: int | ir.SymbolicDim, sizes: dict[str, ir.Value]) -> ir.Value | None:
    """The value [1] that holds a dimension, None where it is not one of the inputs' or a number."""
    if isinstance(dim, ir.SymbolicDim):
        return sizes.get(dim.value or "")
    return integers(model.graph, f"decoder/{dim}", [dim])


def _fold(model: ir.Model) -> None:
    """Folds what depends on constants and static shapes alone; afterwards no branch is left whose condition is known."""
    onnxscript.optimizer.optimize_ir(
        model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT, onnx_shape_inference=True
    )
    passes.IdentityEliminationPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _hold_small(model: ir.Model) -> None:
    """Small float initializers become constants of the graph's own, in its dtype."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in DTYPES.values():
            continue
        if tensor.nbytes < _INPUT_BYTES:
            dtype = value.dtype or tensor.dtype
            value.const_value = ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name)


def _weights_to_inputs(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """Turns the large float initializers into inputs; returns where the bundle stores them."""
    graph = model.graph
    weights: dict[str, ir.ExternalTensor] = {}
    for name, value in sorted(graph.initializers.items()):
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in DTYPES.values():
            continue
        weights[name] = tensor
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    return weights


def _check_standard(model: ir.Model) -> None:
    left = sorted({node.op_type for node in _nodes(model) if node.domain not in ("", "ai.onnx", trt_plugins.DOMAIN)})
    if left:
        raise BackendError(
            f"operators without a body for engine builders are left: {', '.join(left)}; export the checkpoint again"
        )
    branches = [node.name or "" for node in _nodes(model) if node.op_type == "If"]
    if branches:
        raise BackendError(
            f"{branches[0]}: which way to compute is not known when an engine is built; export the checkpoint again"
        )


def _forget_untyped(model: ir.Model) -> None:
    """A shape without a type cannot be written; readers infer both."""
    for node in _nodes(model):
        for output in node.outputs:
            if output.type is None:
                output.shape = None
