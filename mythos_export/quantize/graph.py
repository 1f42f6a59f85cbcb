"""Rewrites a graph to the operators' quantized forms: matrices become (values, scales), activations get their static scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from mythos_export import ops
from mythos_export.quantize.plan import MatrixPlan, Plan, operator_of
from runtimes.errors import InputError

# Which inputs of which operator hold matrices.
_WEIGHTS = {
    operator.name.removeprefix("Quantized"): [
        name.removesuffix("_scale") for name, kind, _ in operator.inputs if kind == "S"
    ]
    for operator in ops.OPERATORS
    if operator.name.startswith("Quantized")
}
_PACKED = {operator.name for operator in ops.OPERATORS if any(kind == "P" for _, kind, _ in operator.inputs)}
_INPUTS = {operator.name: [name for name, _, _ in operator.inputs] for operator in ops.OPERATORS}
_STORED = {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4, "fp8": ir.DataType.FLOAT8E4M3FN}
ACTIVATION_TYPES = {  # the attribute activation_type of what a recipe calls a type
    name: kind.value
    for name, kind in (("float32", ir.DataType.FLOAT), ("int8", ir.DataType.INT8), ("fp8", ir.DataType.FLOAT8E4M3FN))
}
LOOP_MARK = "RecurrentInput"  # the operator at the start of every loop; its input `loop` tells which


def values_name(name: str) -> str:
    """The initializer that holds a quantized matrix's values."""
    return f"{name}.quantized"


def scales_name(name: str) -> str:
    """The initializer that holds its scales."""
    return f"{name}.scale"


class Rewriter:
    """Rewrites the nodes of a graph in place. activation_scales: static scales [L or 1, n] of an operator's products, by the
    operator's name (plan.operator_of); operators without find them as they run."""

    def __init__(self, model: ir.Model, plan: Plan, activation_scales: dict[str, Tensor]) -> None:
        self.graph, self._plan, self._scales = model.graph, plan, activation_scales
        self._pairs: dict[str, tuple[ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}

    def run(self) -> None:
        """Raises InputError for a graph that does not hold a planned matrix."""
        embeddings = []
        for graph in [self.graph, *self.graph.subgraphs()]:
            loop, count = None, -1
            for node in list(graph):
                if node.op_type == LOOP_MARK:
                    loop, count = node.inputs[_INPUTS[LOOP_MARK].index("loop")], count + 1
                if node.domain == ops.DOMAIN and self._planned(node):
                    self._operator(node, loop, count)
                elif node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].name == "embed":
                    embeddings.append(node)
        if "embed" in self._plan.matrices:
            for node in embeddings:
                self._embedding(node, self._plan.matrices["embed"])
        for name in self._plan.matrices:
            if name in self.graph.initializers:
                del self.graph.initializers[name]

    def _planned(self, node: ir.Node) -> bool:
        names = dict(zip(_INPUTS[node.op_type], node.inputs, strict=True))
        weights = [names[name] for name in _WEIGHTS.get(node.op_type, [])]
        return any(value is not None and value.name in self._plan.matrices for value in weights)

    def _operator(self, node: ir.Node, loop: ir.Value | None, count: int) -> None:
        quantized = f"Quantized{node.op_type}"
        names = dict(zip(_INPUTS[node.op_type], node.inputs, strict=True))
        weights = {name: _initializer(names[name]) for name in _WEIGHTS[node.op_type]}
        plans = [self._plan.matrices[value.name or ""] for value in weights.values()]
        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        if quantized in _PACKED:
            attributes["bits"] = plans[0].form.bits
        attributes["block_size"] = plans[0].form.block_size
        attributes["activation_type"] = ACTIVATION_TYPES[plans[0].activations.type]
        inputs: list[ir.Value | None] = []
        for name, value in names.items():
            inputs += self._pair(weights[name]) if name in weights else [value]
        inputs.append(self._activation_scale(operator_of(plans[0].name), node, loop, count))
        new = ir.node(quantized, inputs, attributes, domain=ops.DOMAIN, name=node.name, num_outputs=len(node.outputs))
        _replace(node, new)

    def _activation_scale(self, operator: str, node: ir.Node, loop: ir.Value | None, count: int) -> ir.Value:
        """The scales [n] for one node: none, the only ones, or those of the loop it runs in."""
        table = self._scales.get(operator)
        if table is None:
            return self._constant("activation_scale.none", np.zeros(0, np.float32))
        if len(table) == 1:
            return self._constant(f"{operator}.activation_scale", table[0].numpy())
        if node.graph is self.graph:
            return self._constant(f"{operator}.activation_scale.{count}", table[min(count, len(table) - 1)].numpy())
        rows = self._constant(f"{operator}.activation_scale", table.numpy())
        gather = ir.node("Gather", [rows, loop], {"axis": 0}, name=f"{node.name}/activation_scale")
        gather.outputs[0].name = f"{node.name}/activation_scale"
        gather.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        gather.outputs[0].shape = ir.Shape([table.shape[1]])
        if isinstance(node.graph, ir.Graph):
            node.graph.insert_before(node, gather)
        return gather.outputs[0]

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """A small initializer, held in the graph's file."""
        if name not in self._constants:
            value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
            self.graph.initializers[name] = self._constants[name] = value
        return self._constants[name]

    def _embedding(self, node: ir.Node, plan: MatrixPlan) -> None:
        """Gather, then DequantizeLinear: rows of numbers and of scales."""
        table, scales = self._pair(_initializer(node.inputs[0]))
        name = node.name or "embed"
        rows = ir.node("Gather", [table, node.inputs[1]], {"axis": 0}, name=f"{name}/rows")
        row_scales = ir.node("Gather", [scales, node.inputs[1]], {"axis": 0}, name=f"{name}/scales")
        wide = ir.node("Cast", [row_scales.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}/widen")
        attributes = {"axis": -1, "block_size": plan.form.block_size}
        result = ir.node("DequantizeLinear", [rows.outputs[0], wide.outputs[0]], attributes, name=f"{name}/dequantize")
        _replace(node, rows, row_scales, wide, result)

    def _pair(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The values and the scales that stand for a matrix, made once."""
        name = weight.name or ""
        if name not in self._pairs:
            plan = self._plan.matrices[name]
            *lead, channels = plan.shape
            of_values = [*lead, channels // 2] if plan.packed else [*lead, channels]
            dtype = ir.DataType.UINT8 if plan.packed else _STORED[plan.form.kind]
            of_scales = [*lead, -(-channels // plan.form.block_size)]
            values = ir.Value(name=values_name(name), shape=ir.Shape(of_values), type=ir.TensorType(dtype))
            half = ir.TensorType(ir.DataType.FLOAT16)
            scales = ir.Value(name=scales_name(name), shape=ir.Shape(of_scales), type=half)
            for value in (values, scales):
                self.graph.initializers[value.name or ""] = value
            self._pairs[name] = values, scales
        return self._pairs[name]


def _initializer(value: ir.Value | None) -> ir.Value:
    if value is None or not value.is_initializer():
        raise InputError("the graph computes a matrix that it should hold; export the checkpoint again")
    return value


def _replace(old: ir.Node, *new: ir.Node) -> None:
    for before, after in zip(old.outputs, new[-1].outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    graph = old.graph
    if isinstance(graph, ir.Graph):
        ir.convenience.replace_nodes_and_values(graph, old, [old], list(new), old.outputs, new[-1].outputs)
