"""Operators as nodes that TensorRT's parser makes plugins of: ours, over the CUDA kernels (runtimes/native/tensorrt/operators.h).

Activations between plugins are float32, as the kernels take them; matrices and caches have the engine's dtype. A plugin's inputs
are on the device, so what an operator reads of a table over loops is picked before, and what is known when the engine is built is
an attribute.
"""

from __future__ import annotations

import onnx_ir as ir

from mythos_export import overloads
from mythos_export.build.bodies import input_names
from mythos_export.config import RoutingConfig
from runtimes.errors import BackendError

DOMAIN = "trt.plugins"
_VERSION, _NAMESPACE = "1", overloads.DOMAIN  # as the plugins' creators say
# What a plugin reads, in order, by the operator's names; loops_left, and rows of this loop, are made here.
_INPUTS = {
    "NormalizedLinear": ("x", "norm", "weight"),
    "ResidualLinear": ("residual", "x", "weight"),
    "FeedForward": ("x", "norm", "gate_up", "down"),
    "MixtureOfExperts": ("x", "norm", "router", "router_bias", "gate_up", "down"),
    "LatentAttention": ("q", "kv", "kv_norm", "w_uk", "w_uv", "cos", "sin", "past_kv", "past_len"),
    "GroupedQueryAttention": ("qkv", "cos", "sin", "past_kv", "past_len"),
    "RecurrentInput": ("h", "e", "loop_signal", "norm"),
    "RecurrentUpdate": (
        *("x", "h", "e", "result", "halted_mass", "exit_loop", "loops_left", "lora_down", "lora_scale", "lora_up"),
        *("decay", "injection", "halt"),
    ),
}  # fmt: skip
_TABLES = ("loop_signal", "lora_scale")  # over loops
_DEFAULTS = {"MixtureOfExperts": RoutingConfig().attributes}  # a parser wants every attribute


def are_enough(model: ir.Model) -> bool:
    """Whether all operators of a graph are plugins: those of quantized matrices are not."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return all(node.op_type in _INPUTS for node in nodes if node.domain == overloads.DOMAIN)


def to_plugins(model: ir.Model) -> None:
    """Turns every operator of a stage, whose values have their types, into a plugin."""
    graph = model.graph
    graph.opset_imports[DOMAIN] = 1
    for node in [node for node in graph if node.op_type in _INPUTS and node.domain == overloads.DOMAIN]:
        given = dict(zip(input_names(model, node), node.inputs, strict=True))
        attributes = {**_DEFAULTS.get(node.op_type, {}), **{name: a.value for name, a in node.attributes.items()}}
        if node.op_type == "RecurrentUpdate":
            attributes["halt_bias"] = _number(node, given["halt_bias"])
        inputs = [_input(graph, node, given, name) for name in _INPUTS[node.op_type]]
        attributes |= {"plugin_version": _VERSION, "plugin_namespace": _NAMESPACE}
        plugin = ir.node(node.op_type, inputs, attributes, domain=DOMAIN, num_outputs=len(node.outputs), name=node.name)
        for before, after in zip(node.outputs, plugin.outputs, strict=True):
            after.name, after.shape = before.name, before.shape
            after.type = before.type or ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [plugin], node.outputs, plugin.outputs)


def _input(graph: ir.Graph, node: ir.Node, given: dict[str, ir.Value | None], name: str) -> ir.Value | None:
    if name == "past_kv":
        return _whole_cache(node, given[name])
    if name == "loops_left":
        left = ir.node("Sub", [given["n_loops"], given["loop"]], name=f"{node.name}/loops_left")
        return _made(graph, node, left, given["n_loops"])
    if name in _TABLES:
        row = ir.node("Gather", [given[name], given["loop"]], {"axis": 0}, name=f"{node.name}/{name}")
        return _made(graph, node, row, given[name], first_axis=1)
    return given[name]


def _made(graph: ir.Graph, node: ir.Node, new: ir.Node, like: ir.Value | None, first_axis: int = 0) -> ir.Value:
    """The result of a new node before `node`, typed and shaped as another value is, from an axis on."""
    if like is not None:
        new.outputs[0].type = like.type
        new.outputs[0].shape = None if like.shape is None else ir.Shape(list(like.shape)[first_axis:])
    graph.insert_before(node, new)
    return new.outputs[0]


def _whole_cache(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The cache of one layer, which the cut into stages gave a dimension more."""
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "Unsqueeze":
        raise BackendError(f"{node.name}: its cache is not its own; export the checkpoint again")
    return maker.inputs[0]


def _number(node: ir.Node, value: ir.Value | None) -> float:
    """What is known when an engine is built."""
    if value is None or value.const_value is None:
        raise BackendError(f"{node.name}: its halt_bias is no constant; build with --no-plugins")
    return float(value.const_value.numpy().reshape(-1)[0])
