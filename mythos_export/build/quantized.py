"""Quantized matrices in the form that TensorRT takes: a constant next to a DequantizeLinear with constant scales.

Shape letters: E any leading dimensions, O output and I input channels, b blocks of input channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from runtimes.errors import BackendError

_BLOCKED = (ir.DataType.INT4, ir.DataType.UINT8)  # what TensorRT dequantizes in blocks; uint8 here is int4, two a byte


def lower_quantized(model: ir.Model, dtype: ir.DataType) -> None:
    """Rewrites every DequantizeLinear of a matrix; scales get dtype.

    int4 stays in blocks. int8 and float8 get one scale a row: TensorRT knows no blocks of them, and one axis only. Raises
    BackendError where that cannot be.
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
    tensor: ir.ExternalTensor = values.const_value
    levels = np.asarray(scales.const_value.numpy())  # [E, O, b]
    *lead, channels = (int(dim) for dim in tensor.shape)
    attributes: dict[str, int] = {}
    if tensor.dtype in _BLOCKED:
        channels *= 2 if tensor.dtype == ir.DataType.UINT8 else 1
        kind, shape, attributes = ir.DataType.INT4, [*lead, channels], {"axis": -1, "block_size": _block_size(node)}
    else:
        kind, attributes = tensor.dtype, {"axis": 0}
        shape, levels = _by_channel(values, [math.prod(lead), channels], levels, _block_size(node))
    graph = model.graph
    stored = ir.Value(name=f"{values.name}.constant", shape=ir.Shape(shape), type=ir.TensorType(kind))
    stored.const_value = ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        kind,
        shape=ir.Shape(shape),
        name=stored.name,
        base_dir=tensor.base_dir,
    )
    of_scales = levels.astype(dtype.numpy())
    scale = ir.Value(name=f"{scales.name}.constant", shape=ir.Shape(of_scales.shape), type=ir.TensorType(dtype))
    scale.const_value = ir.tensor(of_scales, dtype=dtype, name=scale.name)
    for value in (stored, scale):
        graph.initializers[value.name or ""] = value
    new = [ir.node("DequantizeLinear", [stored, scale], attributes, name=f"{values.name}/dequantize")]
    if shape != [*lead, channels]:
        whole = ir.Value(
            name=f"{values.name}.shape", shape=ir.Shape([len(lead) + 1]), type=ir.TensorType(ir.DataType.INT64)
        )
        whole.const_value = ir.tensor([*lead, channels], dtype=ir.DataType.INT64, name=whole.name)
        graph.initializers[whole.name or ""] = whole
        new.append(ir.node("Reshape", [new[0].outputs[0], whole], name=f"{values.name}/shape"))
    result = new[-1].outputs[0]
    result.name, result.type, result.shape = (
        f"{values.name}.dequantized",
        ir.TensorType(dtype),
        ir.Shape([*lead, channels]),
    )
    graph.insert_before(graph[0], new)
    return result


def _by_channel(
    values: ir.Value, shape: list[int], levels: np.ndarray[Any, Any], block_size: int
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """The shape [rows, I] in which every row of a matrix [E*O, I] has one scale, and these: rows are its channels where all blocks
    of a channel have one scale, otherwise its blocks."""
    if (levels == levels[..., :1]).all():
        return shape, levels[..., 0].flatten()
    if shape[1] % block_size:
        raise BackendError(
            f"{values.name}: {shape[1]} input channels in blocks of {block_size}, of which the last is shorter; TensorRT cannot "
            'express that: quantize with a recipe whose matrices have block = "channel"'
        )
    return [shape[0] * (shape[1] // block_size), block_size], levels.flatten()


def _block_size(node: ir.Node) -> int:
    attribute = node.attributes.get("block_size")
    return 0 if attribute is None else attribute.as_int()
