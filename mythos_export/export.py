"""From a checkpoint to a bundle: trace without weights, stream the weights to disk once, write it all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from tokenizers import Tokenizer

from mythos_export import __version__, cuda_graph, ops
from mythos_export.checkpoint import Checkpoint, load_checkpoint
from mythos_export.config import ModelConfig
from mythos_export.families.family import Pack
from mythos_export.model import Decoder
from mythos_export.overloads import DEQUANTIZED, PORTABLE
from mythos_export.shards import CheckpointError
from mythos_export.trace import DATA_TYPES, Parameter, Traced, store_reduced, trace
from runtimes.bundle import FORMAT_VERSION, GENERATION_CONFIG, BundleWriter, Graph, Manifest
from runtimes.cache import CACHE_DTYPES
from runtimes.errors import InputError
from runtimes.folder_writer import HashedFile

GRAPH_FILE = "decoder.onnx"
WIDE_GRAPH_FILE = "decoder.float32.onnx"
CUDA_GRAPH_FILE = "decoder.cuda.onnx"
WEIGHTS_FILE = "weights.bin"
TOKENIZER_FILE = "tokenizer.json"
# What transformers reads beside a tokenizer.json; the Runner does without.
TOKENIZER_SETTINGS = ("tokenizer_config.json", "chat_template.jinja")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PAGE = 4096  # large tensors start on a page, so that a runtime can map them; small ones on a cache line
_LINE = 64
_PART = 4 * 2**20  # numbers converted and written at a time
_SMALL_FILES = 32 * 2**20  # bytes allowed for graphs, tokenizer and manifest when asking whether the disk has room

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


def export_bundle(
    source: str | Path | Checkpoint,
    target: str | Path,
    *,
    loops: int | None = None,
    max_loops: int | None = None,
    dtype: str = "float32",
    cache_dtype: str | None = None,
    tokenizer: str | Path | None = None,
    eos: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Exports a checkpoint to a bundle folder and returns its manifest.

    source: what load_checkpoint takes, or a Checkpoint. loops: a fixed loop count, None for a dynamic one. max_loops: deepest
    n_loops of a dynamic bundle (default: the trained count). dtype: of the matrices. cache_dtype: of the cache, one of
    CACHE_DTYPES (default: dtype); int8 rows have a float32 scale each. tokenizer: a tokenizer.json (default: the one beside the
    checkpoint, if any). eos: tokens that end a text (default: those the checkpoint declares; OpenMythos ones declare none, and the
    reference generates on). force: replace an existing bundle.
    Raises CheckpointError, ConfigError, InputError or BundleError before anything is written.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    max_loops = _depth(checkpoint.config, loops, max_loops)
    if dtype not in DTYPES:
        raise InputError(f'dtype is "{dtype}"; expected one of {", ".join(DTYPES)}')
    forms = _forms(dtype, cache_dtype)
    text_file = Path(tokenizer) if tokenizer is not None else checkpoint.tokenizer
    eos_ids = _check_tokenizer(text_file, checkpoint.config.vocab_size, eos)
    packs = checkpoint.tensors(max_loops)
    tell = progress or (lambda *_: None)
    needed = _bytes_needed(checkpoint.config, max_loops, DTYPES[dtype])
    with BundleWriter(target, force=force, needed_bytes=needed) as writer:
        tell("tracing", 0, 1)
        cuda_form = _cuda_form(forms)
        traced = {
            form: form.traced(checkpoint.config, loops, max_loops) for form in {**dict.fromkeys(forms), cuda_form: None}
        }
        tell("tracing", 1, 1)
        stored = traced[forms[0]].parameters
        offsets = _write_weights(writer.create(WEIGHTS_FILE), stored, packs, tell)
        for form, graph in traced.items():
            store_reduced(graph.model, stored)
            _attach(graph.model, stored, offsets)
            if form in forms:
                write_graph(writer.create(form.file), graph.model)
        cuda_file = write_cuda_graph(writer, traced[cuda_form].model)
        for name, path in _companions(checkpoint, text_file).items():
            writer.create(name).write(path.read_bytes())
        return writer.commit(
            Manifest(
                format="mythos-bundle",
                format_version=FORMAT_VERSION,
                producer=f"mythos-export {__version__}",
                model=checkpoint.config.to_dict(),
                graphs=tuple(
                    form.graph(checkpoint.config, dtype, loops, max_loops, cuda_file if form is forms[0] else None)
                    for form in forms
                ),
                files={},
                source=checkpoint.source,
                tokenizer=TOKENIZER_FILE if text_file else None,
                eos_token_ids=eos_ids or checkpoint.eos_token_ids,
            )
        )


@dataclass(frozen=True)
class _Form:
    """One graph of a bundle: its file, what it computes in, and the dtype of its cache."""

    file: str
    dtype: str
    cache_dtype: str

    def traced(self, config: ModelConfig, loops: int | None, max_loops: int) -> Traced:
        cache_dtype = torch.int8 if self.cache_dtype == "int8" else DTYPES[self.cache_dtype]
        return trace(config, loops=loops, max_loops=max_loops, dtype=DTYPES[self.dtype], cache_dtype=cache_dtype)

    def graph(
        self, config: ModelConfig, weight_dtype: str, loops: int | None, max_loops: int, cuda_file: str | None
    ) -> Graph:
        looped = config.loop is not None
        return Graph(
            file=self.file,
            weights=(WEIGHTS_FILE,),
            dtype=self.dtype,  # type: ignore[arg-type]
            cache_dtype=self.cache_dtype,  # type: ignore[arg-type]
            weight_dtype=weight_dtype,
            loops=loops if looped else 0,
            max_loops=max_loops if looped else 0,
            default_loops=min(config.loop.trained_loops, max_loops) if config.loop else 0,
            prelude_slots=len(config.prelude),
            loop_slots=len(config.loop_layers),
            coda_slots=len(config.coda),
            cache_width=config.cache_width,
            vocab_size=config.vocab_size,
            max_seq_len=config.max_seq_len,
            window=config.window,
            cuda_file=cuda_file,
        )


def _forms(dtype: str, cache_dtype: str | None) -> list[_Form]:
    """The graph in the bundle's dtype and, where that is reduced, one that computes in float32 over the same weights."""
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        raise InputError(
            f'cache_dtype is "{cache_dtype}"; expected one of {", ".join(CACHE_DTYPES)} (numpy, which holds the cache for '
            "onnxruntime, has no bfloat16)"
        )
    forms = [_Form(GRAPH_FILE, dtype, cache_dtype or dtype)]
    if dtype != "float32":
        forms.append(_Form(WIDE_GRAPH_FILE, "float32", cache_dtype or ("float32" if dtype == "bfloat16" else dtype)))
    return forms


def _cuda_form(forms: list[_Form]) -> _Form:
    """What the graph for onnxruntime's CUDA provider is made of: it computes in float32, over the cache of the first form."""
    wanted = _Form(CUDA_GRAPH_FILE, "float32", forms[0].cache_dtype)
    same = (form for form in forms if (form.dtype, form.cache_dtype) == (wanted.dtype, wanted.cache_dtype))
    return next(same, wanted)


def _depth(config: ModelConfig, loops: int | None, max_loops: int | None) -> int:
    """The deepest n_loops the graph must serve: rows of its tables over loops."""
    if config.loop is None:
        return 1
    for name, value in (("loops", loops), ("max_loops", max_loops)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    if loops is None:
        return max_loops or config.loop.trained_loops
    if max_loops is not None and max_loops != loops:
        raise InputError(
            f"max_loops is {max_loops} but loops fixes the count at {loops}; max_loops goes with dynamic loops"
        )
    return loops


def _check_tokenizer(path: Path | None, vocab_size: int, eos: Sequence[str]) -> tuple[int, ...]:
    """Refuses a tokenizer that cannot be the model's; returns the ids of the tokens that end a text."""
    if path is None:
        if eos:
            raise InputError(f"eos names {', '.join(eos)}, but there is no tokenizer; pass one with --tokenizer")
        return ()
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file; expected a tokenizer.json of Hugging Face tokenizers")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{path}: not a tokenizer.json of Hugging Face tokenizers: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise InputError(
            f"{path}: {tokenizer.get_vocab_size()} tokens, but the model's vocabulary is {vocab_size}; "
            "pass the tokenizer it was trained with"
        )
    ids = [tokenizer.token_to_id(token) for token in eos]
    if None in ids:
        raise InputError(f"{path}: has no token {eos[ids.index(None)]}; eos expects tokens of its vocabulary")
    return tuple(token for token in ids if token is not None)


def _companions(checkpoint: Checkpoint, tokenizer: Path | None) -> dict[str, Path]:
    """Files that come along as they are, by their names in the bundle."""
    found = {TOKENIZER_FILE: tokenizer, GENERATION_CONFIG: checkpoint.generation_config}
    if tokenizer:
        found |= {name: tokenizer.with_name(name) for name in TOKENIZER_SETTINGS}
    return {name: path for name, path in found.items() if path is not None and path.is_file()}


def _bytes_needed(config: ModelConfig, max_loops: int, dtype: torch.dtype) -> int:
    """What the disk must hold: every tensor on pages of its own at most, and the small files."""
    with torch.device("meta"):
        decoder = Decoder(config, max_loops=max_loops, dtype=dtype)
    return sum(p.numel() * p.element_size() + _PAGE for p in decoder.parameters()) + _SMALL_FILES


def _write_weights(
    file: HashedFile, parameters: dict[str, Parameter], packs: dict[str, Pack], tell: Progress
) -> dict[str, tuple[int, int]]:
    """Streams every tensor, piece by piece, in the dtype and order the graph wants; returns (offset, bytes) by name."""
    total = sum(parameter.nbytes for parameter in parameters.values())
    offsets: dict[str, tuple[int, int]] = {}
    for name, parameter in parameters.items():
        pad_for(file, parameter.nbytes)
        start, rows = file.size, 0
        for piece in packs[name]():
            if tuple(piece.shape[1:]) != parameter.shape[1:]:
                raise CheckpointError(
                    f"{name}: a piece of shape {list(piece.shape)} does not fit {list(parameter.shape)}"
                )
            rows += piece.shape[0]
            for part in piece.flatten().split(_PART):
                file.write(bytes_of(part.to(parameter.dtype)))
                tell("writing weights", file.size, total)
        if rows != parameter.shape[0]:
            raise CheckpointError(f"{name}: {rows} rows, expected {parameter.shape[0]}")
        offsets[name] = (start, file.size - start)
    return offsets


def pad_for(file: HashedFile, n_bytes: int) -> None:
    """Moves on to where a tensor of so many bytes may begin."""
    file.pad_to(_PAGE if n_bytes >= _PAGE else _LINE)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _attach(model: ir.Model, parameters: dict[str, Parameter], offsets: dict[str, tuple[int, int]]) -> None:
    """Points the graph's initializers into the weights file, and gives the graph its functions."""
    for name, parameter in parameters.items():
        value = model.graph.initializers.get(name)
        if value is None:
            continue  # a fixed loop count of 1 never reads some tables
        offset, length = offsets[name]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, DATA_TYPES[parameter.dtype], shape=ir.Shape(parameter.shape), name=name
        )
    attach_functions(model)


def attach_functions(model: ir.Model) -> None:
    """Gives the graph the bodies of the operators it uses: the one that runs anywhere, and those for engine builders."""
    operators = {operator.name: operator for operator in ops.OPERATORS}
    model.functions.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != ops.DOMAIN:
            continue
        operator = operators[node.op_type]
        node.overload = operator.overload_for(value.dtype for value in node.inputs if value is not None)
        if node.op_identifier() in model.functions:
            continue
        engine = [overload for overload in operator.functions if overload not in (PORTABLE, DEQUANTIZED)]
        # Its own last: onnx's evaluator knows no overloads and takes the last.
        for overload in (*engine, node.overload):
            function = ir.serde.deserialize_function(operator.functions[overload])
            model.functions[function.identifier()] = function
    model.opset_imports[ops.DOMAIN] = ops.DOMAIN_VERSION


def write_graph(file: HashedFile, model: ir.Model) -> None:
    proto = ir.to_proto(model)
    file.write(proto.SerializeToString(deterministic=True))


def write_cuda_graph(writer: BundleWriter, model: ir.Model) -> str | None:
    """Makes a float32 graph the one for onnxruntime's CUDA provider and writes it; returns its file's name.

    None, and the graph stays as it was, where the CUDA library lacks an operator of it.
    """
    if not cuda_graph.serves(model):
        return None
    cuda_graph.rewrite(model)
    write_graph(writer.create(CUDA_GRAPH_FILE), model)
    return CUDA_GRAPH_FILE
