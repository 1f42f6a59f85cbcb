"""Cuts a graph into stages that run one after another: the layers before the loop, one loop, the layers after it.

An engine holds one loop, whether the bundle's count is fixed (the loop is unrolled) or dynamic (an ONNX Loop): its runner runs it
as often as is wanted. A loop is compiled once however deep the model is, every count can be captured as a CUDA graph, and no
compiler has to understand loops. What passes between stages are the STATE of runtimes.engines and e, the prelude's result; each
attention layer has a cache of its own, past_kv.N, and rows of its own, new_kv.N, numbered within the stage.

Dimensions: batch, seq, k, capacity, as in the graph; D dim, W width of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mythos_export.build.bodies import input_names
from mythos_export.build.initializers import initializer, integers
from runtimes.engines import NEW_KV, NEXT, PAST_KV, STATE
from runtimes.errors import BackendError

_ENTRY, _UPDATE = "RecurrentInput", "RecurrentUpdate"  # the operators that a loop begins and ends with
_CARRIED_LOOP = 2  # place of a Loop's own loop number, after trip count and condition


def split(model: ir.Model) -> dict[str, ir.Model]:
    """Graphs of the stages by name, whose operators have the bodies for engine builders. The model itself is used up.

    prelude: input_ids, past_len, past_kv.N -> e, new_kv.N. loop: STATE, e, past_len, loop, n_loops, past_kv.N -> NEXT of each of
    STATE, new_kv.N. coda: result, past_len, logit_positions, past_kv.N -> logits, new_kv.N. Each may have input_ids too, for its
    sizes. Raises BackendError for a graph that is not laid out so.
    """
    cut = _Cut(model)
    return {"prelude": cut.prelude(), "loop": cut.loop(), "coda": cut.coda()}


class _Cut:
    """The graph with the loop number, the state and the caches as inputs of their own, ready to be taken apart."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._graph = model, model.graph
        self._by_name = {value.name: value for value in self._graph.inputs}
        loop = self._new_input("loop", ir.DataType.INT64, [])
        _open_loop(self._graph, loop)
        nodes = list(self._graph)
        entries, updates = ([at for at, node in enumerate(nodes) if node.op_type == kind] for kind in (_ENTRY, _UPDATE))
        if not entries or len(entries) != len(updates):
            raise BackendError("the graph has no loop that engines are built for; export the checkpoint again")
        loops = [nodes[first : last + 1] for first, last in zip(entries, updates, strict=True)]
        _tabulate(model, loops, loop)
        self._one_loop(loops[0], loop)
        self._last_update = nodes[updates[-1]]
        parts = {"prelude": nodes[: entries[0]], "loop": loops[0], "coda": nodes[updates[-1] + 1 :]}
        self._caches = {stage: self._own_caches(stage, part) for stage, part in parts.items()}

    def _new_input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value

    def _one_loop(self, nodes: list[ir.Node], loop: ir.Value) -> None:
        """Feeds the first loop with the state, the loop's number and the depth of each row."""
        entry, update = (
            dict(zip(input_names(self._model, node), node.inputs, strict=True)) for node in (nodes[0], nodes[-1])
        )
        e = entry["e"]
        if e is None or e.shape is None:
            raise BackendError("the loop's input has no shape; export the checkpoint again")
        self._e, dim = e, e.shape[2]
        e.shape = ir.Shape(["batch", "seq", dim])
        self._state = []
        for name in STATE:
            dtype = ir.DataType.INT64 if name == "exit_loop" else ir.DataType.FLOAT
            width = dim if name in ("h", "result") else 1
            self._state.append(self._new_input(name, dtype, ["batch", "seq", width]))
        self._n_loops = self._by_name.get("n_loops") or self._new_input("n_loops", ir.DataType.INT64, ["batch"])
        given = {**dict(zip(STATE, self._state, strict=True)), "loop": loop, "n_loops": self._n_loops}
        for node, inputs in ((nodes[0], entry), (nodes[-1], update)):
            for index, name in enumerate(inputs):
                if name in given:
                    node.replace_input_with(index, given[name])
        self._loop, self._next = loop, list(nodes[-1].outputs)

    def _own_caches(self, stage: str, nodes: list[ir.Node]) -> tuple[list[ir.Value], list[ir.Value]]:
        """Gives every attention of a stage a cache of its own; returns the caches and the new rows."""
        caches: list[ir.Value] = []
        rows: list[ir.Value] = []
        for node in nodes:
            if "past_kv" not in (names := input_names(self._model, node) if node.domain else []):
                continue
            at, slot = names.index("past_kv"), names.index("slot")
            whole = node.inputs[at]
            if whole is None or whole.shape is None or whole.dtype is None:
                raise BackendError(f"{node.name}: its cache has no shape; export the checkpoint again")
            cache = self._new_input(
                f"{stage}/{PAST_KV}{len(caches)}", whole.dtype, ["batch", "capacity", whole.shape[3]]
            )
            zero = integers(self._graph, "decoder/zero", [0])
            of_slot = ir.node("Unsqueeze", [cache, zero], name=f"{node.name}/cache")
            of_slot.outputs[0].shape = ir.Shape([1, *cache.shape])
            of_slot.outputs[0].type = cache.type
            node.graph.insert_before(node, of_slot)
            node.replace_input_with(at, of_slot.outputs[0])
            node.replace_input_with(slot, integers(self._graph, "decoder/first", 0))
            new = node.outputs[1]
            new.name, new.shape = f"{stage}/{NEW_KV}{len(caches)}", ir.Shape(["batch", "seq", whole.shape[3]])
            caches.append(cache)
            rows.append(new)
        return caches, rows

    def prelude(self) -> ir.Model:
        return self._extract("prelude", {}, {"e": self._e})

    def loop(self) -> ir.Model:
        outputs = {f"{NEXT}{name}": value for name, value in zip(STATE, self._next, strict=True)}
        for value, of in zip(self._next, self._state, strict=True):
            value.shape, value.type = of.shape, of.type
        given = {"e": self._e, "loop": self._loop, "n_loops": self._n_loops}
        return self._extract("loop", {**dict(zip(STATE, self._state, strict=True)), **given}, outputs)

    def coda(self) -> ir.Model:
        result = self._last_update.outputs[STATE.index("result")]
        result.shape, result.type = self._e.shape, ir.TensorType(ir.DataType.FLOAT)
        logits = next(value for value in self._graph.outputs if value.name == "logits")
        given = {"result": result, "logit_positions": self._by_name["logit_positions"]}
        return self._extract("coda", given, {"logits": logits})

    def _extract(self, stage: str, inputs: dict[str, ir.Value], outputs: dict[str, ir.Value]) -> ir.Model:
        """The nodes between inputs and outputs, which get these names."""
        caches, rows = self._caches[stage]
        common = {name: self._by_name[name] for name in ("past_len", "input_ids")}
        inputs = {**inputs, **common, **{f"{PAST_KV}{index}": cache for index, cache in enumerate(caches)}}
        outputs = {**outputs, **{f"{NEW_KV}{index}": row for index, row in enumerate(rows)}}
        try:
            graph = ir.convenience.extract(self._graph, [*inputs.values()], [*outputs.values()])
        except ValueError as error:
            raise BackendError(
                f"the graph's {stage} is not cut as expected: {error}; export the checkpoint again"
            ) from error
        for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
            value.name = name
        graph.name = stage
        return ir.Model(graph, ir_version=self._model.ir_version, functions=list(self._model.functions.values()))


def _open_loop(graph: ir.Graph, loop: ir.Value) -> None:
    """Puts the body of an ONNX Loop in the Loop's place, once, as if the loop were unrolled and its count one."""
    for node in [node for node in graph if node.op_type == "Loop"]:
        body = node.attributes["body"].as_graph()
        for index, value in enumerate(body.inputs):
            given = loop if index == _CARRIED_LOOP else node.inputs[index]
            if given is not None:
                ir.convenience.replace_all_uses_with(value, given)
        for inner in list(body):
            body.remove(inner)
            graph.insert_before(node, inner)
        results = list(body.outputs)
        body.outputs.clear()
        for before, after in zip(node.outputs, results[1:], strict=True):
            ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _tabulate(model: ir.Model, loops: list[list[ir.Node]], loop: ir.Value) -> None:
    """Where unrolled loops read constants of their own, the first reads a row of a table instead."""
    for node, *same in zip(*([node for node in nodes if node.domain] for nodes in loops), strict=True):
        for at, value in enumerate(node.inputs):
            others = [value, *(other.inputs[at] for other in same)]
            if value is None or not value.is_initializer() or all(other is value for other in others):
                continue
            if any(other is None or not other.is_initializer() or other.dtype != ir.DataType.FLOAT for other in others):
                continue  # slots and loop numbers
            table = np.stack([other.const_value.numpy() for other in others])
            rows = initializer(model.graph, f"{value.name}.by_loop", ir.tensor(table))
            pick = ir.node("Gather", [rows, loop], {"axis": 0}, name=f"{node.name}/by_loop")
            pick.outputs[0].type, pick.outputs[0].shape = value.type, value.shape
            node.graph.insert_before(node, pick)
            node.replace_input_with(at, pick.outputs[0])
