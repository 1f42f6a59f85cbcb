"""From a float32 bundle to a quantized one: plan, calibrate, apply, write. Weights are streamed, a piece at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
import torch
from tokenizers import Tokenizer
from torch import Tensor

from calibration.rounding import pack_int4
from calibration.statistics import Statistics
from calibration.text import Sample, sample, unk_token_id
from mythos_export import __version__
from mythos_export.config import ModelConfig
from mythos_export.export import (
    GRAPH_FILE,
    WEIGHTS_FILE,
    Progress,
    attach_functions,
    bytes_of,
    pad_for,
    write_cuda_graph,
    write_graph,
)
from mythos_export.quantize.calibrate import STATISTICS, Calibration, serves
from mythos_export.quantize.compute import CACHE_LIMIT, Quantizer
from mythos_export.quantize.graph import Rewriter, scales_name, values_name
from mythos_export.quantize.plan import Plan, make_plan, matrix_table
from mythos_export.quantize.recipe import Recipe, load_recipe
from mythos_export.quantize.weights import MappedWeights, stored_tensors
from mythos_export.trace import trace
from runtimes.bundle import BundleWriter, Manifest, open_bundle
from runtimes.errors import InputError
from runtimes.folder_writer import HashedFile

_SMALL_FILES = 32 * 2**20


@dataclass(frozen=True)
class Text:
    """Calibration text: what `calibration.text.sample` takes."""

    source: str | Path
    n_sequences: int = 128
    length: int = 512
    seed: int = 0


class QuantizableBundle:
    """A float32 bundle opened for quantization. Raises BundleError or InputError for one that is not."""

    def __init__(self, path: str | Path) -> None:
        self.folder, self.manifest = open_bundle(path)
        self.graph = self.manifest.graphs[0]
        if self.manifest.quantization is not None:
            raise InputError(f"{path}: is quantized already; quantize the float32 bundle that it was made from")
        if self.graph.weight_dtype != "float32":
            raise InputError(
                f"{path}: its weights are {self.graph.weight_dtype}; quantize a bundle exported with --dtype float32"
            )
        self.config = ModelConfig.from_dict(self.manifest.model)
        self.model = ir.load(self.folder / self.graph.file)
        self.stored = stored_tensors(self.model)
        self.weights = MappedWeights(self.stored)

    @property
    def n_loops(self) -> int:
        """Times that statistics see a layer: the trained loops, or 1 of a model without a loop."""
        return max(1, self.graph.default_loops if self.graph.loops is None else self.graph.loops)

    @property
    def weights_sha256(self) -> str:
        """What statistics of this bundle's weights are known by."""
        return self.manifest.files[self.graph.weights[0]].sha256

    def sample(self, text: Text) -> Sample:
        """Token ids [N, T] to calibrate with. Raises InputError for text that does not serve."""
        encode, unk_id = None, None
        if self.manifest.tokenizer:
            tokenizer = Tokenizer.from_file(str(self.folder / self.manifest.tokenizer))
            unk_id = unk_token_id(tokenizer)

            def encode(document: str) -> list[int]:
                ids: list[int] = tokenizer.encode(document).ids
                return ids

        length = min(text.length, self.config.max_seq_len)
        return sample(text.source, encode, self.config.vocab_size, text.n_sequences, length, text.seed, unk_id)

    def n_bytes(self, plan: Plan | None = None) -> int:
        """Size of the weights as a plan quantizes them (None: as they are), tables and all else included."""
        planned = plan.matrices if plan else {}
        rest = sum(tensor.nbytes for name, tensor in self.weights.items() if name not in planned)
        return rest + sum(matrix.n_bytes for matrix in planned.values())

    def calibration(
        self,
        plan: Plan,
        text: Text,
        folder: str | Path,
        share: tuple[int, int] = (1, 1),
        progress: Progress | None = None,
    ) -> Calibration:
        """What runs the model over the text, keeping statistics in the folder."""
        chosen, sha256 = self.sample(text), self.weights_sha256
        return Calibration(plan, self.weights, chosen, Path(folder), self.n_loops, sha256, share, progress)


@dataclass(frozen=True)
class Quantized:
    """What quantize_bundle made. quantizer: with the outcome of every matrix. statistics: None where none were needed."""

    manifest: Manifest
    quantizer: Quantizer
    statistics: Statistics | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: sizes, what the manifest says of the quantization, each matrix's error."""
        return {
            "bytes": sum(entry.size for entry in self.manifest.files.values()),
            "quantization": self.manifest.quantization,
            "errors": {name: outcome.error for name, outcome in self.quantizer.outcomes.items()},
        }


def gather_statistics(
    bundle: str | Path,
    folder: str | Path,
    recipe: Recipe,
    text: Text,
    share: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> Statistics:
    """Statistics for a recipe, kept in a folder for `quantize_bundle(statistics=…)`.

    share: (k, n), the k-th of n parts of the text. Raises InputError for a recipe that needs none, and as quantize_bundle does.
    """
    if not recipe.needs_statistics:
        raise InputError("the recipe needs no statistics; pass it to `mythos-export quantize` as it is")
    source = QuantizableBundle(bundle)
    return source.calibration(make_plan(recipe, source.config), text, folder, share, progress).statistics()


def quantize_bundle(
    bundle: str | Path,
    target: str | Path,
    recipe: str | Recipe,
    *,
    text: Text | None = None,
    statistics: Sequence[str | Path] = (),
    force: bool = False,
    progress: Progress | None = None,
    then: Callable[[Quantizer], object] | None = None,
) -> Quantized:
    """Writes a quantized copy of a float32 bundle.

    recipe: a Recipe, or names as load_recipe takes them. text: what to calibrate with; needed by recipes that rest on statistics,
    unless `statistics` names the folders that `mythos-export calibrate` made. A run that was killed while calibrating goes on where
    it stopped: its statistics stand beside the target until the bundle is written. then: called with the bundle's quantizer once it
    is written, while the statistics are still there.
    Raises BundleError or InputError before anything is written.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    source = QuantizableBundle(bundle)
    plan = make_plan(recipe, source.config)
    check_text(recipe, text, statistics)
    size = sum(entry.size for entry in source.manifest.files.values()) + _SMALL_FILES
    folder = Path(target).with_name(f".{Path(target).name}.calibration")
    with BundleWriter(target, force=force, needed_bytes=size) as writer:
        rests_on_text = recipe.needs_ranges or (recipe.needs_statistics and not statistics)
        calibration = source.calibration(plan, text, folder, progress=progress) if text and rests_on_text else None
        gathered = _statistics(source, plan, statistics) if statistics and recipe.needs_statistics else None
        quantizer = calibrated_quantizer(source, plan, calibration, gathered)
        model = _graph(source, plan, quantizer)
        _write_weights(writer.create(WEIGHTS_FILE), model, source, quantizer, progress or (lambda *_: None))
        attach_functions(model)
        write_graph(writer.create(GRAPH_FILE), model)
        cuda_file = write_cuda_graph(writer, model)
        graphs = {name for graph in source.manifest.graphs for name in graph.files}
        for name in sorted(source.manifest.files.keys() - graphs):
            writer.create(name).write((source.folder / name).read_bytes())
        manifest = writer.commit(_manifest(source, plan, quantizer, calibration, cuda_file))
    if then:
        then(quantizer)
    shutil.rmtree(folder, ignore_errors=True)
    return Quantized(manifest, quantizer, quantizer.statistics)


def check_text(recipe: Recipe, text: Text | None, statistics: Sequence[str | Path] = ()) -> None:
    """Raises InputError where a recipe needs text that is not given."""
    if recipe.needs_ranges and text is None:
        raise InputError("the recipe has static activation scales, which come from text; pass --text")
    if recipe.needs_statistics and text is None and not statistics:
        raise InputError(
            "the recipe rests on calibration; pass --text, or --statistics made by `mythos-export calibrate`"
        )


def calibrated_quantizer(
    source: QuantizableBundle, plan: Plan, calibration: Calibration | None, statistics: Statistics | None = None
) -> Quantizer:
    """A quantizer with all that its recipe rests on. calibration: gathers what it needs and `statistics` does not hold yet."""
    recipe = plan.recipe
    if recipe.needs_statistics and statistics is None and calibration is not None:
        statistics = calibration.statistics()
    quantizer = Quantizer(plan, source.weights, statistics if recipe.needs_statistics else None)
    if recipe.needs_ranges and calibration is not None:
        quantizer.set_ranges(calibration.ranges(quantizer.factors))
    return quantizer


def _statistics(source: QuantizableBundle, plan: Plan, folders: Sequence[str | Path]) -> Statistics:
    found = Statistics([Path(folder) / STATISTICS for folder in folders])
    if found.subject is None or found.subject["weights"] != source.weights_sha256:
        raise InputError(f"{folders[0]}: was gathered of another bundle; run `mythos-export calibrate` on this one")
    if not serves(found, plan, source.weights, source.n_loops):
        raise InputError(
            f"{folders[0]}: was gathered for a recipe that needs less, or otherwise; calibrate with this recipe"
        )
    return found


def _graph(source: QuantizableBundle, plan: Plan, quantizer: Quantizer) -> ir.Model:
    """The bundle's graph in its quantized form; traced anew where the cache changes."""
    model, cache = source.model, plan.recipe.kv_cache
    if cache is not None:
        row_scale = 1.0 / CACHE_LIMIT if cache.scale == "channel" else 0.0
        graph = source.graph
        model = trace(
            source.config,
            loops=graph.loops,
            max_loops=graph.max_loops,
            cache_dtype=torch.int8,
            row_scale=row_scale,
        ).model
        for name, tensor in source.stored.items():
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = tensor
    deepest = source.graph.max_loops
    scales = {operator: quantizer.activation_scales(matrices, deepest) for operator, matrices in plan.operators()}
    Rewriter(model, plan, {operator: table for operator, table in scales.items() if table is not None}).run()
    return model


def _manifest(
    source: QuantizableBundle,
    plan: Plan,
    quantizer: Quantizer,
    calibration: Calibration | None,
    cuda_file: str | None,
) -> Manifest:
    formats = {matrix.form.kind for matrix in plan.matrices.values()} or {"float32"}
    uncalibrated = {name: outcome.uncalibrated for name, outcome in quantizer.outcomes.items() if outcome.uncalibrated}
    record: dict[str, Any] = {
        "recipe": msgspec.to_builtins(plan.recipe),
        "matrices": matrix_table(plan),
        "text": None if calibration is None else calibration.sample.record,
        "n_loops": source.n_loops if quantizer.statistics else None,
        "uncalibrated_experts": {name: {str(e): n for e, n in seen.items()} for name, seen in uncalibrated.items()},
    }
    main = max(formats, key=lambda kind: sum(m.n_bytes for m in plan.matrices.values() if m.form.kind == kind))
    changes: dict[str, Any] = {"cache_dtype": "int8"} if plan.recipe.kv_cache else {}
    graph = msgspec.structs.replace(
        source.graph, file=GRAPH_FILE, weights=(WEIGHTS_FILE,), weight_dtype=main, cuda_file=cuda_file, **changes
    )
    return msgspec.structs.replace(
        source.manifest,
        producer=f"mythos-export {__version__}",
        graphs=(graph,),
        quantization=record,
        parity=None,
    )


def _write_weights(
    file: HashedFile, model: ir.Model, source: QuantizableBundle, quantizer: Quantizer, tell: Progress
) -> None:
    """Writes every tensor of the new graph, quantizing on the way, and points the graph at them."""
    initializers = model.graph.initializers
    total, done = sum(tensor.size for tensor in source.stored.values()), 0
    changed, planned = quantizer.changed, quantizer.plan.matrices
    for name, tensor in source.stored.items():
        if name in planned:
            scales: list[Tensor] = []
            _write(file, initializers[values_name(name)], _values(quantizer, name, scales))
            _write(file, initializers[scales_name(name)], iter(scales))
        elif name in initializers:
            _write(
                file, initializers[name], iter([quantizer.tensor(name) if name in changed else source.weights[name]])
            )
        done += tensor.size
        tell("quantizing", done, total)


def _values(quantizer: Quantizer, name: str, scales: list[Tensor]) -> Iterator[Tensor]:
    """A matrix as the file holds it, piece by piece; its scales are added to the list."""
    is_int4 = quantizer.plan.matrices[name].form.kind == "int4"
    for values, piece_scales in quantizer.quantized(name):
        scales.append(piece_scales)
        yield pack_int4(values) if is_int4 else values


def _write(file: HashedFile, value: ir.Value, pieces: Iterator[Tensor]) -> None:
    """Writes one tensor's pieces and makes them the value's."""
    shape, dtype = ir.Shape(value.shape or ()), value.dtype
    if dtype is None:
        raise InputError(f"{value.name}: has no dtype; export the checkpoint again")
    pad_for(file, math.ceil(math.prod(int(dim) for dim in shape) * dtype.itemsize))
    start = file.size
    for piece in pieces:
        file.write(bytes_of(piece))
    value.const_value = ir.ExternalTensor(
        WEIGHTS_FILE, start, file.size - start, dtype, shape=shape, name=value.name or ""
    )
