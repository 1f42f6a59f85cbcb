"""Cuts a stage where its experts begin and end.

For TensorRT before 10: 8.6 widens float16 stacks to float32 in memory wherever a plan holds anything else or is for many tokens.
Experts in float16 or bfloat16 are therefore no plan at all but calls of the CUDA kernels, between parts in float32.

What a part hands on to those after it is PASSED in runtimes.engines. Dimensions: batch, seq, tokens = batch * seq; D dim, K top_k,
E experts of a stack, F expert_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import common as passes

from mythos_export.build.bodies import PARTS, input_names
from runtimes.engines import PASSED
from runtimes.errors import BackendError

_EXPERTS = "MixtureOfExperts"  # how names of the operators end
_STACKS = ("gate_up", "down")
# Values of the operator's bodies for engine builders: what experts are given, and what comes of them.
_BORDER = ("flat_f", "routed_chosen", "routed_weight", "mixed")
_TAG = "mythos_export.value"


class Part(NamedTuple):
    """A piece of a stage, and the dtype of its matrices and cache."""

    model: ir.Model
    dtype: ir.DataType


class Experts(NamedTuple):
    """The experts of a mixture: its values of the names _BORDER, normed [tokens, D], chosen and weight [tokens, K], mixed
    [tokens, D]; and the stacks that they read, stored in the bundle's weights, by name of the body's input: gate_up_routed and
    gate_up_shared [E, 2F, D], down_routed and down_shared [E, D, F]."""

    normed: ir.Value
    chosen: ir.Value
    weight: ir.Value
    mixed: ir.Value
    top_k: int
    stacks: dict[str, ir.Value]

    @property
    def given(self) -> list[ir.Value]:
        """To the experts."""
        return [self.normed, self.chosen, self.weight]


def has_experts(model: ir.Model) -> bool:
    """Whether any layer of a graph is a mixture of experts."""
    return any(node.op_type.endswith(_EXPERTS) for node in ir.traversal.RecursiveGraphIterator(model.graph))


def cut_at_experts(stage: ir.Model) -> list[Part | Experts]:
    """A stage as parts in the order they run: experts, and everything else in float32. The stage itself is used up.

    Raises BackendError for a graph that is not laid out as expected.
    """
    if not has_experts(stage):
        return [Part(stage, ir.DataType.FLOAT)]
    return _Cut(stage, _inline_calls(stage)).parts()


def _inline_calls(stage: ir.Model) -> list[Experts]:
    """Puts the mixtures' bodies in the place of the calls."""
    sizes = []
    for node in [node for node in stage.graph if node.op_type.endswith(_EXPERTS)]:
        x = node.inputs[0]
        if x is None or x.shape is None:
            raise BackendError(f"{node.name}: its input has no shape; export the checkpoint again")
        sizes.append((x.shape[2], node.attributes["top_k"].as_int(), _stacks(stage, node)))
    for function in stage.functions.values():
        if function.name.endswith(_EXPERTS):
            for node in function:
                for index, output in enumerate(node.outputs):
                    if output.name in _BORDER:
                        node.metadata_props[_TAG] = f"{output.name} {index}"
    passes.InlinePass(lambda function: function.name.endswith(_EXPERTS))(stage)
    found: dict[str, list[ir.Value]] = {name: [] for name in _BORDER}
    for node in stage.graph:
        name, _, index = node.metadata_props.get(_TAG, "").partition(" ")
        if name:
            found[name].append(node.outputs[int(index)])
    calls = []
    for values, (dim, top_k, stacks) in zip(zip(*found.values(), strict=True), sizes, strict=True):
        normed, chosen, weight, mixed = values
        call = Experts(normed, chosen, weight, mixed, top_k, stacks)
        calls.append(call)
        _describe(call.normed, ir.DataType.FLOAT, dim)
        _describe(call.chosen, ir.DataType.INT64, top_k)
        _describe(call.weight, ir.DataType.FLOAT, top_k)
        _describe(call.mixed, ir.DataType.FLOAT, dim)
    return calls


def _stacks(stage: ir.Model, node: ir.Node) -> dict[str, ir.Value]:
    given = dict(zip(input_names(stage, node), node.inputs, strict=True))
    stacks: dict[str, ir.Value] = {}
    for name in [f"{stack}_{part}" for part in PARTS for stack in _STACKS]:
        value = given.get(name)
        if value is None and name.endswith(PARTS[1]):
            continue  # no shared experts
        tensor = None if value is None else value.const_value
        if value is None or not isinstance(tensor, ir.ExternalTensor) or not tensor.dtype.is_floating_point():
            raise BackendError(
                f"{node.name}: {name} is no stack of floats among the bundle's weights; export the checkpoint again"
            )
        stacks[name] = value
    return stacks


def _describe(value: ir.Value, dtype: ir.DataType, width: int | ir.SymbolicDim) -> None:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(["tokens", width])


class _Cut:
    """A stage whose mixtures are inlined, ready to be taken apart."""

    def __init__(self, stage: ir.Model, calls: list[Experts]) -> None:
        self._stage, self._graph, self._calls = stage, stage.graph, calls
        nodes = list(self._graph)
        at = {node: index for index, node in enumerate(nodes)}
        ends = [max(at[_producer(value)] for value in call.given) for call in calls]
        experts = {node for call in calls for node in _between(call)}
        # Of each node that is none of an expert's: the part it belongs to, among those that are not experts.
        self._part_of = {node: sum(at[node] > end for end in ends) for node in nodes if node not in experts}
        handed_on = [value for call in calls for value in (*call.given, call.mixed)]
        self._crossing = [value for node in nodes for value in node.outputs if self._crosses(value)]
        for number, value in enumerate([*handed_on, *(value for value in self._crossing if value not in handed_on)]):
            if value.shape is None or value.dtype is None:
                raise BackendError(
                    f"{value.name}: handed on from part to part without a shape; export the checkpoint again"
                )
            value.name = f"{PASSED}{number}"

    def _crosses(self, value: ir.Value) -> bool:
        made = self._part_of.get(_producer(value))
        return made is not None and any(self._part_of.get(node, made) > made for node, _ in value.uses())

    def parts(self) -> list[Part | Experts]:
        """Plain parts and experts in turn."""
        parts: list[Part | Experts] = []
        for number, call in enumerate(self._calls):
            parts += [Part(self._plain(number), ir.DataType.FLOAT), call]
        return [*parts, Part(self._plain(len(self._calls)), ir.DataType.FLOAT)]

    def _plain(self, number: int) -> ir.Model:
        """The part between two mixtures."""
        before = [value for value in self._crossing if self._part_of[_producer(value)] < number]
        mixed = [call.mixed for call in self._calls[max(number - 1, 0) : number]]
        made = [value for value in self._crossing if self._part_of[_producer(value)] == number]
        given = [value for call in self._calls[number : number + 1] for value in call.given]
        results = [value for value in self._graph.outputs if self._part_of[_producer(value)] == number]
        outputs = list(dict.fromkeys([*results, *given, *made]))
        return self._extract([*self._graph.inputs, *mixed, *before], outputs)

    def _extract(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        graph = ir.convenience.extract(self._graph, inputs, outputs)
        graph.name = self._graph.name
        return ir.Model(graph, ir_version=self._stage.ir_version, functions=list(self._stage.functions.values()))


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise BackendError(f"{value.name}: handed on as it came in; export the checkpoint again")
    return node


def _between(call: Experts) -> set[ir.Node]:
    """The experts' own nodes."""
    found: set[ir.Node] = set()
    wanted = [call.mixed]
    while wanted:
        value = wanted.pop()
        node = None if value in call.given else value.producer()
        if node is not None and node not in found:
            found.add(node)
            wanted += [given for given in node.inputs if given is not None]
    return found
