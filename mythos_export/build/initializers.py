"""Initializers of a graph: new ones, and the bundle's bytes seen as another type or shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name; made from the tensor where the graph has none yet."""
    if name not in graph.initializers:
        tensor.name = name
        kind = ir.TensorType(tensor.dtype)
        graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=kind, const_value=tensor)
    return graph.initializers[name]


def integers(graph: ir.Graph, name: str, numbers: list[int] | int) -> ir.Value:
    """An initializer of int64."""
    return initializer(graph, name, ir.tensor(numbers, dtype=ir.DataType.INT64))


def seen_as(tensor: ir.ExternalTensor, dtype: ir.DataType, shape: Sequence[int], at: int = 0) -> ir.ExternalTensor:
    """The bundle's bytes of a tensor, from its byte `at` on, as another dtype and shape."""
    size = -(-math.prod(shape) * dtype.bitwidth // 8)
    return ir.ExternalTensor(
        tensor.location,
        (tensor.offset or 0) + at,
        size,
        dtype,
        shape=ir.Shape(shape),
        name="",
        base_dir=tensor.base_dir,
    )
