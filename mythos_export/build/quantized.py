"""Quantized numbers in the form that TensorRT takes: matrices are constants, every scale is one.

Shape letters: E any leading dimensions, O output and I input channels, b blocks of input channels.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from mythos_export.build.initializers import initializer, integers, seen_as
from runtimes.errors import BackendError

_ENDS = ("start", "end", "axis")  # inputs of Slice


def lower_quantized(model: ir.Model, dtype: ir.DataType) -> None:
    """Rewrites every DequantizeLinear of a matrix; scales get dtype.

    int4 stays in blocks. int8 and float8 get one scale a row: TensorRT knows no blocks of them, and one axis only. Raises
    BackendError for scales that the graph computes.
    """
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type == "DequantizeLinear" and _is_picked(node):
            _dequantize_before_picking(node)
    done: dict[tuple[str, str], ir.Value] = {}
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "DequantizeLinear" or not _is_matrix(node.inputs[0]):
            continue
        values, scales = node.inputs[0], _stored(node.inputs[1])
        key = (values.name or "", scales.name or "")
        if key not in done:
            done[key] = _dequantized(model, node, values, scales, dtype)
        ir.convenience.replace_all_uses_with(node.outputs[0], done[key], replace_graph_outputs=True)
        node.graph.remove(node, safe=True)


def scale_outside(model: ir.Model) -> None:
    """Rounds inputs of products whose scales the graph computes, one for each loop, in units of their scale: x / scale is rounded
    with the scale 1, and multiplied by its own afterwards."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        scale = node.inputs[1] if node.op_type == "QuantizeLinear" else None
        if scale is None or scale.is_initializer() or scale.const_value is not None or scale.dtype is None:
            continue
        one = initializer(model.graph, f"decoder/1.{scale.dtype.name}", ir.tensor(np.ones((), scale.dtype.numpy())))
        units = ir.node("Div", [node.inputs[0], scale], name=f"{node.name}/units")
        units.outputs[0].type = scale.type
        node.graph.insert_before(node, units)
        node.replace_input_with(0, units.outputs[0])
        node.replace_input_with(1, one)
        for back in [use.node for use in node.outputs[0].uses()]:
            back.replace_input_with(1, one)
            whole = ir.node("Mul", [back.outputs[0], scale], name=f"{back.name}/whole")
            whole.outputs[0].type, whole.outputs[0].shape = scale.type, back.outputs[0].shape
            ir.convenience.replace_all_uses_with(back.outputs[0], whole.outputs[0])
            whole.replace_input_with(0, back.outputs[0])
            back.graph.insert_after(back, whole)


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and isinstance(value.const_value, ir.ExternalTensor)


def _is_picked(node: ir.Node) -> bool:
    """Whether rows of a matrix are gathered before they are dequantized, as embeddings are."""
    values = node.inputs[0]
    gather = None if values is None else values.producer()
    return gather is not None and gather.op_type == "Gather" and _is_matrix(gather.inputs[0])


def _dequantize_before_picking(node: ir.Node) -> None:
    rows, scale_rows = node.inputs[0].producer(), _source(node.inputs[1]).producer()
    whole = ir.node(
        "DequantizeLinear",
        [rows.inputs[0], scale_rows.inputs[0]],
        {name: attribute.value for name, attribute in node.attributes.items()},
        name=node.name,
    )
    whole.outputs[0].shape = rows.inputs[0].shape
    picked = ir.node("Gather", [whole.outputs[0], rows.inputs[1]], {"axis": 0}, name=f"{node.name}/rows")
    wide = ir.node("Cast", [picked.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}/cast")
    wide.outputs[0].name, wide.outputs[0].shape = node.outputs[0].name, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [whole, picked, wide], node.outputs, wide.outputs)


def _source(value: ir.Value | None) -> ir.Value:
    """What a value was cast from."""
    while value is not None and value.producer() is not None and value.producer().op_type in ("Cast", "CastLike"):
        value = value.producer().inputs[0]
    if value is None:
        raise BackendError("a DequantizeLinear of the graph has no scales; export the checkpoint again")
    return value


def _stored(value: ir.Value | None) -> ir.Value:
    source = _source(value)
    if not source.is_initializer():
        raise BackendError(f"{source.name}: scales that the graph computes; TensorRT takes stored ones only")
    return source


def _dequantized(model: ir.Model, node: ir.Node, values: ir.Value, scales: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The matrix [E, O, I] as floats, computed once at the head of the graph."""
    graph, block_size = model.graph, _block_size(node)
    levels = np.asarray(scales.const_value.numpy())  # [E, O, b]
    kind, shape = values.const_value.dtype, [int(dim) for dim in values.const_value.shape]
    if kind == ir.DataType.UINT8:
        kind, shape[-1] = ir.DataType.INT4, 2 * shape[-1]
    in_blocks = [*shape[:-1], levels.shape[-1] * block_size]
    attributes = {"axis": 0}
    if kind == ir.DataType.INT4:
        attributes, whole, stored_as = {"axis": -1, "block_size": block_size}, in_blocks, in_blocks
    elif (levels == levels[..., :1]).all():
        whole, stored_as, levels = shape, [math.prod(shape[:-1]), shape[-1]], levels[..., 0].flatten()
    else:  # each block is a row
        whole, stored_as, levels = in_blocks, [levels.size, block_size], levels.flatten()
    tensor = _stored_levels(values.const_value, kind, shape, whole, stored_as)
    stored = initializer(graph, f"{values.name}.constant", tensor)
    scale = initializer(graph, f"{scales.name}.constant", ir.tensor(levels.astype(dtype.numpy()), dtype=dtype))
    new = [ir.node("DequantizeLinear", [stored, scale], attributes, name=f"{values.name}/dequantize")]
    if stored_as != whole:
        to_whole = integers(graph, f"{values.name}.shape", whole)
        new.append(ir.node("Reshape", [new[-1].outputs[0], to_whole], name=f"{values.name}/shape"))
    if whole != shape:
        ends = [
            integers(graph, f"{values.name}.{name}", [at]) for name, at in zip(_ENDS, (0, shape[-1], -1), strict=True)
        ]
        new.append(ir.node("Slice", [new[-1].outputs[0], *ends], name=f"{values.name}/unpad"))
    result = new[-1].outputs[0]
    result.name, result.type, result.shape = f"{values.name}.dequantized", ir.TensorType(dtype), ir.Shape(shape)
    graph.insert_before(graph[0], new)
    return result


def _stored_levels(
    tensor: ir.ExternalTensor, kind: ir.DataType, shape: list[int], whole: list[int], stored_as: list[int]
) -> ir.TensorProtocol:
    """A matrix's levels as the bundle has them, only seen in another shape; where its last blocks are shorter (whole has more input
    channels than shape), a copy with zeros after them: TensorRT knows whole blocks only."""
    if whole == shape:
        return seen_as(tensor, kind, stored_as)
    levels = seen_as(tensor, kind, shape).numpy()
    padded = np.zeros(whole, levels.dtype)
    padded[..., : shape[-1]] = levels
    return ir.tensor(padded.reshape(stored_as), dtype=kind)


def _block_size(node: ir.Node) -> int:
    attribute = node.attributes.get("block_size")
    return 0 if attribute is None else attribute.as_int()
