"""What the parser of TensorRT before 10 does not know, said in older words: it reads opset 17, and 32-bit integers."""

from __future__ import annotations

import onnx_ir as ir

OLD_OPSET = 17
_REDUCTIONS = (
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
)  # take axes as an attribute up to opset 17; ReduceSum never does here


def to_old_parser(model: ir.Model) -> None:
    """Rewrites a lowered graph of opset 21 to opset 17."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type in _REDUCTIONS:
            node.attributes.pop("noop_with_empty_axes", None)
        if node.op_type in _REDUCTIONS and len(node.inputs) == 2:
            node.attributes["axes"] = ir.AttrInt64s("axes", _numbers(node.inputs[1]))
            node.resize_inputs(1)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _add_zero_point(node)
        elif node.op_type == "Shape" and len(node.attributes):
            _slice_shape(node)
        elif node.op_type == "Clip" and node.outputs[0].dtype in (None, ir.DataType.INT64):
            _clip_integers(node)
    model.graph.opset_imports[""] = model.opset_imports[""] = OLD_OPSET


def _numbers(value: ir.Value | None) -> list[int]:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return [] if tensor is None else [int(number) for number in tensor.numpy().flatten()]


def _constant(node: ir.Node, numbers: list[int] | int, name: str, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
    tensor = ir.tensor(numbers, dtype=dtype)
    constant = ir.node("Constant", [], {"value": tensor}, name=f"{node.name}/{name}")
    constant.outputs[0].const_value = tensor
    node.graph.insert_before(node, constant)
    return constant.outputs[0]


def _add_zero_point(node: ir.Node) -> None:
    """A zero point of 0, which that parser insists on, as many as there are scales; it also says that the type is int8."""
    node.attributes.pop("output_dtype", None)
    scale = node.inputs[1]
    tensor = None if scale is None else ir.convenience.get_const_tensor(scale)
    zeros: list[int] | int = 0 if tensor is None or not len(tensor.shape) else [0] * int(tensor.shape[0])
    node.resize_inputs(3)
    node.replace_input_with(2, _constant(node, zeros, "zero_point", ir.DataType.INT8))


def _slice_shape(node: ir.Node) -> None:
    """Shape with start and end: the whole shape, then a part of it."""
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else 2**31 - 1
    whole = ir.node("Shape", [node.inputs[0]], name=f"{node.name}/whole")
    node.graph.insert_before(node, whole)
    ends = [_constant(node, [number], name) for name, number in (("start", start), ("end", end), ("axis", 0))]
    part = ir.node("Slice", [whole.outputs[0], *ends], name=node.name)
    _replace(node, part)


def _clip_integers(node: ir.Node) -> None:
    """Clip of integers: Max and Min."""
    value = node.inputs[0]
    bounds = [bound for bound in zip(("Max", "Min"), node.inputs[1:], strict=False) if bound[1] is not None]
    new = []
    for kind, bound in bounds:
        new.append(ir.node(kind, [value, bound], name=f"{node.name}/{kind}"))
        value = new[-1].outputs[0]
    _replace(node, *new)


def _replace(node: ir.Node, *new: ir.Node) -> None:
    output = new[-1].outputs[0]
    output.name, output.type, output.shape = node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], list(new), node.outputs, [output])
