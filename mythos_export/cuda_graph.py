"""Makes of a float32 graph the one for onnxruntime's CUDA provider, with our operators there (runtimes/native/cuda).

The weights stay the same file. The operators read 16-bit matrices as they are stored, where the float32 graph casts them. What
would cost kernels of its own, or what the provider cannot capture in a CUDA graph (it copies the parameters of a Split or Concat of
parts of several sizes from memory that is gone at a replay), becomes an operator that stands in no other graph:
NormalizedLinearSplit, Embedding and their quantized forms, PositionRows, PickRows, StackRows; RecurrentStart and
RecurrentUpdateInput, where loops are unrolled. With all dimensions of the inputs fixed, no shape is left to be computed.

Shape letters: B batch, S new tokens, D dim, N slots, W width of the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from mythos_export.overloads import DOMAIN
from runtimes.errors import InputError

_QUANTIZABLE = ("NormalizedLinear", "ResidualLinear", "FeedForward", "MixtureOfExperts")
_ATTENTION = tuple(
    f"{name}{cache}" for name in ("LatentAttention", "GroupedQueryAttention") for cache in ("", "Int8Cache")
)
# The operators that the CUDA library has.
KERNELS = frozenset(
    (
        *_QUANTIZABLE,
        *(f"Quantized{name}" for name in _QUANTIZABLE),
        *_ATTENTION,
        "RecurrentInput",
        "RecurrentUpdate",
    )
)
_DEQUANTIZED = tuple(f"Quantized{name}" for name in _ATTENTION if name.startswith("Latent"))  # become the float ones
_PRODUCTS = ("NormalizedLinear", "QuantizedNormalizedLinear")
_OF_QUANTIZED = {"block_size", "activation_type"}  # attributes
_STACKED = ("new_kv", "new_scale")
_PICKED = "logit_positions"
_UPDATED = slice(3, 6)  # of RecurrentUpdate's inputs: result, halted_mass, exit_loop
_POSITIONS_OF = ("past_len", "input_ids")
_REDUCED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def serves(model: ir.Model) -> bool:
    """Whether the CUDA library can run every operator of the graph: it knows no dense feed-forward whose two matrices are of
    different types."""
    return all(_has_kernel(node) for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN)


def _has_kernel(node: ir.Node) -> bool:
    if node.op_type == "QuantizedFeedForward":
        gate_up, down = node.inputs[2], node.inputs[4]
        return gate_up is not None and down is not None and gate_up.dtype == down.dtype
    return node.op_type in KERNELS or node.op_type in _DEQUANTIZED


def rewrite(model: ir.Model) -> None:
    """Rewrites a graph that it serves, in place. The bodies of operators go: they take matrices of the activations' dtype alone."""
    _Rewriter(model.graph).run()
    model.functions.clear()
    passes.RemoveUnusedNodesPass()(model)


class _Rewriter:
    """Rewrites the nodes of a graph and of its loop; constants stand in the graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._float16: dict[str | None, ir.Value] = {}

    def run(self) -> None:
        self._read_reduced()
        self._embed()
        self._locate()
        for graph in (self._graph, *self._graph.subgraphs()):
            self._dequantize(graph)
        for graph in (self._graph, *self._graph.subgraphs()):
            self._split(graph)
        self._join_loops()
        self._start_loops()
        self._pick()
        self._stack()
        self._derive_shapes()

    def _read_reduced(self) -> None:
        """Gives the operators their 16-bit matrices, without the cast."""
        for node in _nodes(self._graph, "Cast"):
            weight = node.inputs[0]
            if weight is None or not weight.is_initializer() or weight.dtype not in _REDUCED:
                continue
            for user, index in list(node.outputs[0].uses()):
                if user.domain == DOMAIN:
                    user.replace_input_with(index, weight)

    def _embed(self) -> None:
        """The rows of input_ids become float32 in one operator, whatever the table is stored as."""
        for node in _nodes(self._graph, "DequantizeLinear"):
            rows, scales = (_producer(value) for value in node.inputs)
            scales = _producer(scales.inputs[0]) if scales is not None and scales.op_type == "Cast" else scales
            tables = [None if gather is None else _table(gather) for gather in (rows, scales)]
            if rows is None or None in tables:
                continue
            attributes = {
                "block_size": node.attributes["block_size"].as_int(),
                "activation_type": ir.DataType.FLOAT.value,
            }
            _replace(self._graph, [node], "QuantizedEmbedding", [rows.inputs[1], *tables], attributes)
        for node in _nodes(self._graph, "Gather"):
            table = _table(node)
            if table is not None and node.outputs[0].uses() and table.dtype in (ir.DataType.FLOAT, *_REDUCED):
                _replace(self._graph, [node], "Embedding", [node.inputs[1], table])

    def _locate(self) -> None:
        """Rows of tables for positions: a session computes Range on the CPU, whose result a captured graph cannot read."""
        inputs = {value.name: value for value in self._graph.inputs}
        for node in _nodes(self._graph, "Gather"):
            table = node.inputs[0]
            floats = table is not None and table.is_initializer() and table.dtype == ir.DataType.FLOAT
            if floats and _are_positions(node.inputs[1]):
                _replace(self._graph, [node], "PositionRows", [*(inputs[name] for name in _POSITIONS_OF), table])

    def _dequantize(self, graph: ir.Graph) -> None:
        """Attention multiplies with float16 matrices where they are quantized: small ones, dequantized as a session is made."""
        for node in [node for name in _DEQUANTIZED for node in _nodes(graph, name, DOMAIN)]:
            q, kv, norm, w_uk, uk_scale, w_uv, uv_scale, *rest, _ = node.inputs
            block = node.attributes["block_size"].as_int()
            matrices = [self._as_float16(*pair, block) for pair in ((w_uk, uk_scale), (w_uv, uv_scale))]
            attributes = {name: node.attributes[name].value for name in node.attributes.keys() - _OF_QUANTIZED}
            _replace(graph, [node], node.op_type.removeprefix("Quantized"), [q, kv, norm, *matrices, *rest], attributes)

    def _as_float16(self, values: ir.Value | None, scale: ir.Value | None, block: int) -> ir.Value:
        """A quantized matrix [H, O, I] with scales [H, O, b] as floats.

        All of it are constants, which a session folds; a DequantizeLinear it would not fold.
        """
        if values is None or scale is None or values.shape is None or scale.shape is None:
            raise InputError("the graph computes a matrix that it should hold; export the checkpoint again")
        if values.name in self._float16:
            return self._float16[values.name]
        *lead, columns = (int(dim) for dim in values.shape)
        blocks, wide, start = int(scale.shape[-1]), {"to": ir.DataType.FLOAT.value}, self._graph[0]

        def computed(op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
            node = ir.node(op_type, inputs, attributes or {})
            self._graph.insert_before(start, node)
            return node.outputs[0]

        levels, scales = computed("Cast", [values], wide), computed("Cast", [scale], wide)
        scales = computed("Unsqueeze", [scales, self._constant([-1])])
        scales = computed("Expand", [scales, self._constant([*lead, blocks, block])])
        scales = computed("Reshape", [scales, self._constant([*lead, blocks * block])])
        scales = computed("Slice", [scales, *(self._constant([number]) for number in (0, columns, -1))])
        result = computed("Cast", [computed("Mul", [levels, scales])], {"to": ir.DataType.FLOAT16.value})
        result.name, result.shape, result.type = (
            f"{values.name}.float16",
            values.shape,
            ir.TensorType(ir.DataType.FLOAT16),
        )
        self._float16[values.name] = result
        return result

    def _split(self, graph: ir.Graph) -> None:
        """A product whose columns go two ways writes them so; other parts of several sizes are slices."""
        for node in _nodes(graph, "Split"):
            x, sizes = node.inputs[0], _numbers(node.inputs[1]) if len(node.inputs) > 1 else []
            if x is None or x.shape is None or not sizes:
                continue
            axis = node.attributes["axis"].as_int() % len(x.shape)
            product = x.producer()
            fits = product is not None and product.op_type in _PRODUCTS and len(x.uses()) == 1
            if product is not None and fits and len(sizes) == 2 and axis == len(x.shape) - 1:
                attributes = {name: attribute.value for name, attribute in product.attributes.items()} | {
                    "sizes": sizes
                }
                _replace(graph, [product, node], f"{product.op_type}Split", list(product.inputs), attributes)
            elif len(set(sizes)) > 1:
                self._slice(graph, node, x, axis, sizes)

    def _slice(self, graph: ir.Graph, split: ir.Node, x: ir.Value, axis: int, sizes: list[int]) -> None:
        start = 0
        for output, size in zip(split.outputs, sizes, strict=True):
            where = [self._constant([number]) for number in (start, start + size, axis)]
            part = ir.node("Slice", [x, *where], name=f"{split.name}/{start}")
            _take_place(output, part.outputs[0])
            graph.insert_before(split, part)
            start += size
        graph.remove(split, safe=True)

    def _join_loops(self) -> None:
        """Where loops are unrolled, the end of one and what enters the next are one operator; other graphs stay as they are."""
        for entry in _nodes(self._graph, "RecurrentInput", DOMAIN):
            h, e, *of_loop = entry.inputs
            update = _producer(h)
            if update is None or update.op_type != "RecurrentUpdate" or h is not update.outputs[0]:
                continue
            # It comes to stand where the update does, before what the entry may read.
            constant = all(value is not None and value.is_initializer() for value in of_loop)
            if constant and e is update.inputs[2]:
                attributes = {
                    name: attribute.value for node in (update, entry) for name, attribute in node.attributes.items()
                }
                inputs, outputs = [*update.inputs, *of_loop], [*update.outputs, *entry.outputs]
                _replace(self._graph, [entry, update], "RecurrentUpdateInput", inputs, attributes, outputs=outputs)

    def _start_loops(self) -> None:
        """What enters a first loop comes with the zeros that the loop's end updates, where loops are unrolled."""
        ends = [node for node in self._graph if node.op_type in ("RecurrentUpdate", "RecurrentUpdateInput")]
        starts = [node for node in ends if all(_is_zero(value) for value in node.inputs[_UPDATED])]
        entries = _nodes(self._graph, "RecurrentInput", DOMAIN)
        if len(starts) != 1 or len(entries) != 1:
            return
        zeros = [value for value in starts[0].inputs[_UPDATED] if value is not None]
        entry, shapes = entries[0], [(value.shape, value.type) for value in zeros]
        attributes = {name: attribute.value for name, attribute in entry.attributes.items()}
        start = ir.node("RecurrentStart", entry.inputs, attributes, domain=DOMAIN, num_outputs=4, name=entry.name)
        for index, (value, (shape, kind)) in enumerate(zip(start.outputs[1:], shapes, strict=True)):
            value.name, value.shape, value.type = f"{entry.name}/{index}", shape, kind
            starts[0].replace_input_with(_UPDATED.start + index, value)
        y = start.outputs[0]
        y.name, y.shape, y.type = entry.outputs[0].name, entry.outputs[0].shape, entry.outputs[0].type
        ir.convenience.replace_nodes_and_values(self._graph, entry, [entry], [start], entry.outputs, [y])

    def _pick(self) -> None:
        """The tokens whose logits are asked for, without an index for each of their numbers."""
        positions = next((value for value in self._graph.inputs if value.name == _PICKED), None)
        for node in _nodes(self._graph, "GatherElements"):
            x, index = node.inputs
            expand = _producer(index)
            unsqueeze = _producer(expand.inputs[0]) if expand is not None and expand.op_type == "Expand" else None
            picked = unsqueeze is not None and unsqueeze.inputs[0] is positions
            if picked and x is not None and x.dtype == ir.DataType.FLOAT and node.attributes.get_int("axis", 0) == 1:
                _replace(self._graph, [node], "PickRows", [x, positions])

    def _stack(self) -> None:
        """The rows of a step's slots, where each is a tensor [B, S, W] of its own, are put together at once; their scales [B, S]
        likewise."""
        for output in [value for value in self._graph.outputs if value.name in _STACKED]:
            rows, concat = list(_rows(output)), output.producer()
            if concat is not None and all(row is not None for row in rows):
                _replace(self._graph, [concat], "StackRows", rows)

    def _derive_shapes(self) -> None:
        """Shapes of values are made of the inputs' dimensions, which a session may fix; it knows no shapes behind our operators."""
        origins: dict[str, tuple[ir.Value, int]] = {}
        for graph_input in self._graph.inputs:
            for axis, dim in enumerate(graph_input.shape or ()):
                origins.setdefault(str(dim), (graph_input, axis))
        for node in _nodes(self._graph, "Shape"):
            value = node.inputs[0]
            if (
                value is None
                or value.is_graph_input()
                or value.shape is None
                or node.attributes.get_int("start", 0) != 0
            ):
                continue
            dims = list(value.shape)
            if "end" not in node.attributes and all(isinstance(dim, int) or str(dim) in origins for dim in dims):
                _replace(
                    self._graph,
                    [node],
                    "Concat",
                    [self._dim(dim, origins, node) for dim in dims],
                    {"axis": 0},
                    domain="",
                )

    def _dim(self, dim: int | ir.SymbolicDim, origins: dict[str, tuple[ir.Value, int]], before: ir.Node) -> ir.Value:
        """A dimension as a tensor [1]."""
        if isinstance(dim, int):
            return self._constant([dim])
        origin, axis = origins[str(dim)]
        node = ir.node("Shape", [origin], {"start": axis, "end": axis + 1}, name=f"{before.name}/{dim}")
        result = node.outputs[0]
        result.name, result.type, result.shape = node.name, ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        self._graph.insert_before(before, node)
        return result

    def _constant(self, numbers: list[int]) -> ir.Value:
        """An int64 initializer, made once."""
        name = f"numbers_{'_'.join(map(str, numbers))}"
        if name not in self._graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
            value.shape, value.type = ir.Shape([len(numbers)]), ir.TensorType(ir.DataType.INT64)
            self._graph.initializers[name] = value
        return self._graph.initializers[name]


def _table(gather: ir.Node) -> ir.Value | None:
    """The initializer, as it is stored, whose rows a node gathers for input_ids; None where it does not."""
    if gather.op_type != "Gather" or gather.inputs[1] is None or gather.inputs[1].name != "input_ids":
        return None
    cast = _producer(gather.inputs[0])
    table = gather.inputs[0] if cast is None else cast.inputs[0]
    return table if table is not None and table.is_initializer() else None


def _are_positions(value: ir.Value | None) -> bool:
    """Whether value [B, S] is past_len + the numbers from 0 on, where they are clipped to the table's."""
    clip = _producer(value)
    add = _producer(clip.inputs[0]) if clip is not None and clip.op_type == "Clip" else None
    parts = [_producer(part) for part in add.inputs] if add is not None and add.op_type == "Add" else []
    kinds = {part.op_type: part.inputs[0] for part in parts if part is not None}
    start, past = kinds.get("Range"), kinds.get("Unsqueeze")
    return past is not None and past.name == _POSITIONS_OF[0] and _numbers(start) == [0]


def _is_zero(value: ir.Value | None) -> bool:
    """Whether a value is zeros of any shape, or a cast of them."""
    node = _producer(value)
    if node is not None and node.op_type == "Cast":
        node = _producer(node.inputs[0])
    constant = node.inputs[0].const_value if node is not None and node.op_type == "Expand" and node.inputs[0] else None
    return constant is not None and not constant.numpy().any()


def _rows(value: ir.Value | None) -> Iterator[ir.Value | None]:
    """The tensors [B, S, W] that are stacked in value [N, B, S, W], or [B, S] in [N, B, S]; None for what is none."""
    node = _producer(value)
    if node is not None and node.op_type == "Concat" and node.attributes["axis"].as_int() == 0:
        for part in node.inputs:
            yield from _rows(part)
    elif node is not None and node.op_type == "Unsqueeze" and _numbers(node.inputs[1]) == [0]:
        yield node.inputs[0]
    else:
        yield None


def _replace(
    graph: ir.Graph,
    old: list[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    domain: str = DOMAIN,
    outputs: Sequence[ir.Value] | None = None,
) -> None:
    """Puts one node in the place of several, where the last one stands. outputs: of theirs, those that are its own; None for all of
    the last one's."""
    last = old[-1]
    outputs = last.outputs if outputs is None else outputs
    new = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=len(outputs), name=last.name)
    for before, after in zip(outputs, new.outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(graph, last, old[::-1], [new], outputs, new.outputs)


def _take_place(before: ir.Value, after: ir.Value) -> None:
    after.name, after.shape, after.type = before.name, before.shape, before.type
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)


def _numbers(value: ir.Value | None) -> list[int]:
    """The numbers of a constant; none where it is none."""
    constant = None if value is None else value.const_value
    return [] if constant is None else [int(number) for number in constant.numpy().ravel()]


def _nodes(graph: ir.Graph, op_type: str, domain: str = "") -> list[ir.Node]:
    return [node for node in graph if node.domain == domain and node.op_type == op_type]


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
