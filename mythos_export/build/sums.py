"""Products with a single token written as sums of terms, for TensorRT 8.6: it compiles these into one pass over the matrix as it is
stored, and a float16 product beside them into float32 ones, after a copy of every matrix.

Shape letters: I input and O output channels, E matrices of a stack.
"""

from __future__ import annotations

import onnx_ir as ir

from mythos_export.build.initializers import integers


def products_to_sums(model: ir.Model) -> None:
    """Rewrites Gemm [1, I] x [O, I]^T, and MatMul [E, 1, I] x [E, O, I]^T, whose matrices are inputs of the graph."""
    for node in list(model.graph):
        if node.op_type == "Gemm" and _is_weight(node.inputs[1]) and _rows(node.inputs[0]) == 1:
            _replace(model, node, node.inputs[1], node.inputs[0], keep=-2)
        elif node.op_type == "MatMul":
            turned = node.inputs[1].producer() if node.inputs[1] is not None else None
            if turned is None or turned.op_type != "Transpose" or not _is_weight(turned.inputs[0]):
                continue
            if list(turned.attributes["perm"].as_ints()) == [0, 2, 1] and _rows(node.inputs[0]) == 1:
                _replace(model, node, turned.inputs[0], node.inputs[0], keep=1)


def _is_weight(value: ir.Value | None) -> bool:
    """An input of the graph, or a stack of matrices seen as one."""
    seen = None if value is None else value.producer()
    if seen is not None and seen.op_type == "Reshape":
        return _is_weight(seen.inputs[0])
    return value is not None and value.is_graph_input()


def _rows(value: ir.Value | None) -> object:
    """The last dimension but one."""
    return None if value is None or value.shape is None else value.shape[-2]


def _replace(model: ir.Model, node: ir.Node, matrix: ir.Value, vector: ir.Value, keep: int) -> None:
    """y [.., 1, O] = sum over I of matrix [.., O, I] * vector [.., 1, I]; keep: where the axis of one goes."""
    graph, name = model.graph, node.name or "product"
    dtype = matrix.dtype
    terms = ir.node("Mul", [matrix, vector], name=f"{name}/terms")
    wide = ir.node("Cast", [terms.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}/wide")
    last = integers(graph, "decoder/-1", [-1])
    total = ir.node("ReduceSum", [wide.outputs[0], last], {"keepdims": 0}, name=f"{name}/sum")
    narrow = ir.node("Cast", [total.outputs[0]], {"to": dtype.value}, name=f"{name}/narrow")
    row = ir.node("Unsqueeze", [narrow.outputs[0], integers(graph, f"decoder/axis{keep}", [keep])], name=name)
    new = [terms, wide, total, narrow, row]
    for part, kind in zip(new, (dtype, ir.DataType.FLOAT, ir.DataType.FLOAT, dtype, dtype), strict=True):
        part.outputs[0].type = ir.TensorType(kind)
    row.outputs[0].name, row.outputs[0].shape = node.outputs[0].name, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, node.outputs, row.outputs)
