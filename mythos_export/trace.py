"""Traces the Decoder with torch.export and torch.onnx into the graph of a bundle.

The model is traced without its weights (fake tensors), so tracing costs the same for every size; the weights are attached
afterwards as external data. Shape letters are those of the graph: batch, seq, k (positions with logits), slots, capacity.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mythos_export import __version__, ops
from mythos_export.config import ModelConfig
from mythos_export.model import Decoder
from runtimes.errors import InputError, MythosError

DATA_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
}
_SCOPES = "pkg.torch.onnx.name_scopes"
_FOLD_LIMIT = 1024  # numbers; folding serves shapes and constants, weights stay as they are stored


@dataclass(frozen=True)
class Parameter:
    """A tensor the graph expects: its shape and dtype as stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Traced:
    """A graph without weights, and what it wants them to be, in the order of the model's layers."""

    model: ir.Model
    parameters: dict[str, Parameter]


def trace(
    config: ModelConfig,
    *,
    loops: int | None,
    max_loops: int,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    row_scale: float = 0.0,
) -> Traced:
    """Traces the model.

    loops: unrolls that many, None makes the loop count an input of at most max_loops. dtype: of the matrices. cache_dtype: of the
    cache, default dtype; int8 adds the input past_scale and the output new_scale. row_scale: fixed scale of an int8 cache's rows,
    0 for one of its own for each. Raises InputError for a row_scale that is negative or not that of an int8 cache.
    """
    if row_scale < 0 or (row_scale and cache_dtype != torch.int8):
        raise InputError(
            f"row_scale is {row_scale} for a cache of {cache_dtype or dtype}; expected 0, or above 0 with int8"
        )
    ops.register_schemas()
    fixed = loops if config.loop else 0
    with FakeTensorMode(shape_env=ShapeEnv()):
        decoder = Decoder(config, max_loops=max_loops, fixed_loops=fixed, dtype=dtype, row_scale=row_scale).eval()
        inputs, dynamic_shapes = _example(config, fixed, cache_dtype or dtype)
    parameters = {name: Parameter(tuple(value.shape), value.dtype) for name, value in decoder.named_parameters()}
    exported = torch.export.export(decoder, (), inputs, dynamic_shapes=dynamic_shapes)
    outputs = ["logits", "new_kv", "exit_loop", "new_scale"]
    with _quiet():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=ops.OPSET,
            optimize=False,
            input_names=list(inputs),
            output_names=outputs if "past_scale" in inputs else outputs[:3],
            custom_translation_table={operator.torch_op: operator.translation for operator in ops.OPERATORS},
            verbose=False,
        )
        if program is None:
            raise MythosError("torch.onnx.export returned no graph; this torch release is not supported")
        _clean(program.model, parameters)
    return Traced(program.model, parameters)


def _example(
    config: ModelConfig, fixed: int | None, cache_dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, object]]]:
    """Example inputs by name, and which of their dimensions vary. Sizes differ so that none is taken for another."""
    batch, seq, capacity, k = 2, 3, 5, 4
    slots = config.slots(6 if fixed is None else fixed)
    int64 = torch.int64
    inputs = {
        "input_ids": torch.zeros(batch, seq, dtype=int64),
        "past_len": torch.zeros(batch, dtype=int64),
        "past_kv": torch.zeros(slots, batch, capacity, config.cache_width, dtype=cache_dtype),
        "logit_positions": torch.zeros(batch, k, dtype=int64),
    }
    b = Dim("batch")
    of_cache: dict[int, object] = {1: b, 2: Dim("capacity")}
    dims: dict[str, dict[int, object]] = {
        "input_ids": {0: b, 1: Dim("seq")},
        "past_len": {0: b},
        "past_kv": of_cache,
        "logit_positions": {0: b, 1: Dim("k")},
    }
    if fixed is None:
        inputs["n_loops"] = torch.ones(batch, dtype=int64)
        of_cache[0] = Dim("slots", min=config.slots(2))
        dims["n_loops"] = {0: b}
    if cache_dtype == torch.int8:
        inputs["past_scale"] = torch.zeros(slots, batch, capacity)
        dims["past_scale"] = of_cache
    return inputs, dims


class _quiet(warnings.catch_warnings):
    """Keeps the exporter's notes to itself: they concern its own internals, and every result is verified."""

    def __enter__(self) -> None:  # type: ignore[override]
        super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

    def __exit__(self, *error: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*error)


def _clean(model: ir.Model, parameters: dict[str, Parameter]) -> None:
    """Folds shape arithmetic, drops what is unused, names dimensions, and nodes after the modules they come from."""
    graph = model.graph
    for name in parameters:
        graph.initializers[name].const_value = None
    onnxscript.optimizer.optimize_ir(
        model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT, onnx_shape_inference=True
    )
    passes.IdentityEliminationPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    _name_dimensions(model)
    _name_nodes(model)
    model.producer_name, model.producer_version = "mythos-export", __version__
    model.metadata_props.clear()
    graph.name = "decoder"


def _name_dimensions(model: ir.Model) -> None:
    """The exporter's symbols (s53) become batch, seq, k, slots, capacity, wherever they stand alone."""
    names = {
        "input_ids": ("batch", "seq"),
        "past_kv": ("slots", "batch", "capacity"),
        "past_scale": ("slots", "batch", "capacity"),
        "logit_positions": ("batch", "k"),
    }
    symbols = {
        str(symbol): name
        for graph_input in model.graph.inputs
        for symbol, name in zip(graph_input.shape or (), names.get(graph_input.name or "", ()), strict=False)
        if isinstance(symbol, ir.SymbolicDim)
    }
    values = {*model.graph.inputs}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values.update(node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                values.update(attribute.as_graph().inputs)
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            dims = [symbols.get(str(dim), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
            value.shape = ir.Shape(dims)


def _name_nodes(model: ir.Model) -> None:
    """prelude.0.attn/LatentAttention instead of node_42; the exporter's own notes (paths, stack traces) are dropped."""
    seen: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        name = f"{_module_of(node, model.graph)}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _module_of(node: ir.Node, outermost: ir.Graph) -> str:
    """The module a node was traced in: as the exporter noted, or, inside a loop where it notes nothing, whose weights it reads."""
    scopes: list[str] = [scope for scope in re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, "")) if scope]
    if len(scopes) > 1 and not scopes[-2].startswith("_"):
        return scopes[-2]
    weights = (value.name or "" for value in node.inputs if value is not None and value.is_initializer())
    owner: str = next((name.rpartition(".")[0] for name in weights if "." in name), "")
    return owner or ("decoder" if node.graph is outermost else "recurrent")


def store_reduced(model: ir.Model, parameters: dict[str, Parameter]) -> None:
    """Lets a float32 graph read weights stored as `parameters` says: a reduced one is cast, which a backend folds at load. A graph
    that wants them as they are stays as it is."""
    graph, first = model.graph, model.graph[0]
    for name, parameter in parameters.items():
        value = graph.initializers.get(name)
        if value is None or value.dtype == DATA_TYPES[parameter.dtype]:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name=f"{name}/widen")
        cast.outputs[0].name, cast.outputs[0].shape = f"{name}.float32", value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        value.dtype = DATA_TYPES[parameter.dtype]
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(first, cast)
