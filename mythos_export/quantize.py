"""Quantizes a bundle: matrices to block-quantized int8 or int4, everything else as it was.

Linear layers, experts, dense feed-forward blocks and the absorbed projections become the operators' quantized forms; embedding
and head become int8. Router, halting, injection, LoRA, norms and tables stay float32. Weights are streamed, a piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from calibration.round_to_nearest import BLOCK_SIZES, pack_int4, round_to_nearest
from mythos_export import __version__, ops
from mythos_export.export import GRAPH_FILE, WEIGHTS_FILE, Progress, attach_functions, bytes_of, pad_for, write_graph
from runtimes.bundle import BundleWriter, HashedFile, Manifest, open_bundle
from runtimes.errors import InputError

_PIECE = 32 * 2**20  # numbers quantized at a time
_SMALL_FILES = 32 * 2**20


@dataclass(frozen=True)
class Recipe:
    """bits: of the matrices. head_bits: of embedding and head, which decide the tokens directly."""

    name: str
    bits: int
    head_bits: int = 8


RECIPES = {recipe.name: recipe for recipe in (Recipe("int8", 8), Recipe("int4", 4))}

# Which inputs of which operator hold matrices.
_WEIGHTS = {
    operator.name.removeprefix("Quantized"): [
        name.removesuffix("_scale") for name, kind, _ in operator.inputs if kind == "S"
    ]
    for operator in ops.OPERATORS
    if operator.name.startswith("Quantized")
}
_PACKED = {operator.name for operator in ops.OPERATORS if any(kind == "P" for _, kind, _ in operator.inputs)}
_ACTIVATION_TYPES = {8: ir.DataType.INT8, 32: ir.DataType.FLOAT}  # by activation_bits
_INPUTS = {operator.name: [name for name, _, _ in operator.inputs] for operator in ops.OPERATORS}


@dataclass(frozen=True)
class _Stored:
    """How one matrix is stored: bits, and whether int4 numbers are packed into uint8."""

    bits: int
    packed: bool


def quantize_bundle(
    bundle: str | Path,
    target: str | Path,
    recipe: str,
    *,
    block_size: int = 32,
    activation_bits: int = 8,
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Writes a quantized copy of a float32 bundle and returns its manifest.

    recipe: a name of RECIPES. block_size: input channels a scale, one of 32, 64, 128. activation_bits: 8 rounds the inputs of
    products to 8 bits a block, as integer kernels need; 32 leaves them. Rounding is to nearest.
    Raises BundleError or InputError before anything is written.
    """
    if recipe not in RECIPES:
        raise InputError(f'recipe is "{recipe}"; expected one of {", ".join(RECIPES)}')
    if block_size not in BLOCK_SIZES:
        raise InputError(f"block is {block_size}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
    if activation_bits not in _ACTIVATION_TYPES:
        raise InputError(f"activation bits are {activation_bits}; expected 8 or 32")
    folder, manifest = open_bundle(bundle)
    if manifest.quantization is not None or manifest.graphs[0].weight_dtype != "float32":
        raise InputError(
            f"{bundle}: its weights are {manifest.graphs[0].weight_dtype}; quantize a bundle exported with --dtype float32"
        )
    graph = manifest.graphs[0]
    model = ir.load(folder / graph.file)
    rewriter = _Rewriter(model, RECIPES[recipe], block_size, activation_bits)
    rewriter.run()
    tell = progress or (lambda *_: None)
    size = sum(entry.size for entry in manifest.files.values()) + _SMALL_FILES
    with BundleWriter(target, force=force, needed_bytes=size * RECIPES[recipe].bits // 16) as writer:
        _write_weights(writer.create(WEIGHTS_FILE), model, rewriter.sources, rewriter.stored, block_size, tell)
        attach_functions(model)
        write_graph(writer.create(GRAPH_FILE), model)
        if manifest.tokenizer:
            writer.create(manifest.tokenizer).write((folder / manifest.tokenizer).read_bytes())
        return writer.commit(
            msgspec.structs.replace(
                manifest,
                producer=f"mythos-export {__version__}",
                graphs=(msgspec.structs.replace(graph, file=GRAPH_FILE, weights=(WEIGHTS_FILE,), weight_dtype=recipe),),
                quantization={
                    "recipe": recipe,
                    "algorithm": "round-to-nearest",
                    "block_size": block_size,
                    "activation_bits": activation_bits,
                    "bits": RECIPES[recipe].bits,
                    "head_bits": RECIPES[recipe].head_bits,
                    "matrices": {name: stored.bits for name, stored in rewriter.stored.items()},
                },
                parity=None,
            )
        )


class _Rewriter:
    """Replaces the nodes that read matrices by their quantized forms, and the matrices by (values, scales)."""

    def __init__(self, model: ir.Model, recipe: Recipe, block_size: int, activation_bits: int) -> None:
        self.graph = model.graph
        self.stored: dict[str, _Stored] = {}
        self._heads = {"embed", "head"}
        self._recipe = recipe
        self._attributes = {"block_size": block_size, "activation_type": _ACTIVATION_TYPES[activation_bits].value}
        self._no_scales = ir.Value(name="activation_scale.none", const_value=ir.tensor(np.zeros(0, np.float32)))
        self._block_size = block_size
        self._pairs: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.sources = {
            name: value.const_value
            for name, value in self.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }

    def run(self) -> None:
        embeddings = [
            node
            for node in ir.traversal.RecursiveGraphIterator(self.graph)
            if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].name == "embed"
        ]
        for node in list(ir.traversal.RecursiveGraphIterator(self.graph)):
            if node.domain == ops.DOMAIN and node.op_type in _WEIGHTS:
                self._operator(node)
        for node in embeddings:
            self._embedding(node)
        for name in self.stored:
            del self.graph.initializers[name]
        self.graph.register_initializer(self._no_scales)

    def _operator(self, node: ir.Node) -> None:
        quantized = f"Quantized{node.op_type}"
        packed = quantized in _PACKED
        names = dict(zip(_INPUTS[node.op_type], node.inputs, strict=True))
        weights = _WEIGHTS[node.op_type]
        bits = {name: self._bits(_value(names[name])) for name in weights}
        attributes: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
        if packed:  # one number of bits for all
            attributes["bits"] = max(bits.values())
            bits = dict.fromkeys(weights, attributes["bits"])
        inputs: list[ir.Value | None] = []
        for name, value in names.items():
            inputs += self._pair(_value(value), bits[name], packed) if name in weights else [value]
        inputs.append(self._no_scales)
        form = attributes | self._attributes
        n_outputs = len(node.outputs)
        _replace(node, ir.node(quantized, inputs, form, domain=ops.DOMAIN, name=node.name, num_outputs=n_outputs))

    def _embedding(self, node: ir.Node) -> None:
        """Gather, then DequantizeLinear: rows of integers and of scales."""
        table = _value(node.inputs[0])
        table, scales = self._pair(table, self._bits(table), packed=False)
        name = node.name or "embed"
        rows = ir.node("Gather", [table, node.inputs[1]], {"axis": 0}, name=f"{name}/rows")
        row_scales = ir.node("Gather", [scales, node.inputs[1]], {"axis": 0}, name=f"{name}/scales")
        wide = ir.node("Cast", [row_scales.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}/widen")
        attributes = {"axis": -1, "block_size": self._block_size}
        result = ir.node("DequantizeLinear", [rows.outputs[0], wide.outputs[0]], attributes, name=f"{name}/dequantize")
        _replace(node, rows, row_scales, wide, result)

    def _bits(self, weight: ir.Value) -> int:
        """Embedding and head have their own; int4 needs an even number of input channels."""
        bits = self._recipe.head_bits if weight.name in self._heads else self._recipe.bits
        return 8 if bits == 4 and _shape(weight)[-1] % 2 else bits

    def _pair(self, weight: ir.Value, bits: int, packed: bool) -> tuple[ir.Value, ir.Value]:
        """The values and the scales that stand for a matrix, made once."""
        name = weight.name or ""
        if name not in self._pairs:
            self.stored[name] = _Stored(bits, packed and bits == 4)
            shape = _shape(weight)
            dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8 if packed else ir.DataType.INT4
            of_values = [*shape[:-1], shape[-1] // 2] if self.stored[name].packed else shape
            of_scales = [*shape[:-1], -(-shape[-1] // self._block_size)]
            values = ir.Value(name=f"{name}.int{bits}", shape=ir.Shape(of_values), type=ir.TensorType(dtype))
            scales = ir.Value(name=f"{name}.scale", shape=ir.Shape(of_scales), type=ir.TensorType(ir.DataType.FLOAT16))
            for value in (values, scales):
                self.graph.initializers[value.name or ""] = value
            self._pairs[name] = values, scales
        return self._pairs[name]


def _value(value: ir.Value | None) -> ir.Value:
    if value is None or not value.is_initializer():
        raise InputError("the graph computes a matrix that it should hold; export the checkpoint again")
    return value


def _shape(value: ir.Value) -> list[int]:
    return [int(dim) for dim in value.shape or ()]


def _replace(old: ir.Node, *new: ir.Node) -> None:
    for before, after in zip(old.outputs, new[-1].outputs, strict=True):
        after.name, after.shape, after.type = before.name, before.shape, before.type
    graph = old.graph
    if isinstance(graph, ir.Graph):
        ir.convenience.replace_nodes_and_values(graph, old, [old], list(new), old.outputs, new[-1].outputs)


def _write_weights(
    file: HashedFile,
    model: ir.Model,
    sources: dict[str, ir.ExternalTensor],
    stored: dict[str, _Stored],
    block_size: int,
    tell: Progress,
) -> None:
    """Writes every tensor of the new graph, quantizing on the way, and points the graph at them."""
    initializers = model.graph.initializers
    total, done = sum(source.size for source in sources.values()), 0
    for name, source in sources.items():
        array = _mapped(source)
        if name not in stored:
            _write(file, initializers[name], iter([array]))
        else:
            scales: list[Tensor] = []
            values = _quantized(name, array, stored[name], block_size, scales)
            _write(file, initializers[f"{name}.int{stored[name].bits}"], values)
            _write(file, initializers[f"{name}.scale"], iter(scales))
        done += source.size
        tell("quantizing", done, total)


def _mapped(source: ir.ExternalTensor) -> Tensor:
    """The tensor as it lies in the file (mapped copy-on-write: torch wants memory it could write to)."""
    dtype, shape = source.dtype.numpy(), tuple(int(dim) for dim in source.shape)
    return torch.from_numpy(np.memmap(source.path, dtype, "c", source.offset or 0, shape))


def _quantized(name: str, weight: Tensor, how: _Stored, block_size: int, scales: list[Tensor]) -> Iterator[Tensor]:
    """The integers of a matrix, piece by piece; its scales are added to the list."""
    rows = max(1, _PIECE // (weight[0].numel() or 1))
    for piece in weight.split(rows):
        integers, piece_scales = round_to_nearest(piece, how.bits, block_size, name)
        scales.append(piece_scales)
        yield pack_int4(integers) if how.bits == 4 else integers


def _write(file: HashedFile, value: ir.Value, pieces: Iterator[Tensor]) -> None:
    """Writes one tensor's pieces and makes them the value's."""
    shape, dtype = ir.Shape(value.shape or ()), value.dtype
    if dtype is None:
        raise InputError(f"{value.name}: has no dtype; export the checkpoint again")
    pad_for(file, math.ceil(math.prod(_shape(value)) * dtype.itemsize))
    start = file.size
    for piece in pieces:
        file.write(bytes_of(piece))
    value.const_value = ir.ExternalTensor(
        WEIGHTS_FILE, start, file.size - start, dtype, shape=shape, name=value.name or ""
    )
