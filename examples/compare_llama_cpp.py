"""A bundle of plain layers beside llama.cpp on the same shape: python examples/compare_llama_cpp.py BUNDLE [options].

Writes a GGUF of random weights with the sizes of the bundle's model (llama.cpp's "llama" architecture, which Mixtral is one of)
and times both in turn, so that they see the same machine. Needs, beside mythos-export: pip install gguf llama-cpp-python, which
compiles llama.cpp for the processor at hand. Embedding and head are Q8_0, since recipes of mythos-export keep them in int8.
llama.cpp knows no sliding window for this architecture: compare within it. Its threads wait for each other busily, so other load on
the machine costs it more; the fastest rounds say what both can do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Kind

from mythos_export import Runner, load
from mythos_export.config import DenseConfig, GroupedQueryAttentionConfig, LayerConfig, ModelConfig
from mythos_export.config import MixtureOfExpertsConfig as MoEConfig

Side = Callable[
    [list[int], list[list[int]]], float
]  # tokens of the context, tokens of every timed step; returns seconds


def main() -> None:
    options = _options()
    runner = load(options.bundle, "onnxruntime", threads=options.threads)
    config = ModelConfig.from_dict(runner.manifest.model)
    path = (options.gguf or options.bundle.parent) / f"{options.bundle.name}-{options.type}.gguf"
    if not path.exists():
        write_gguf(path, config, Kind[options.type.upper()])
    ids = np.random.default_rng(1).integers(0, config.vocab_size, max(options.prompt, options.context + options.new))
    tokens = ids.tolist()
    tests: dict[str, tuple[list[int], list[list[int]]]] = {}
    if options.prompt:
        tests[f"pp{options.prompt}"] = [], [tokens[: options.prompt]]
    if options.new:
        steps = [[token] for token in tokens[options.context :][: options.new]]
        tests[f"tg{options.new} @ {options.context}"] = tokens[: options.context], steps
    sides = _mythos_export(runner), _llama_cpp(path, len(tokens) + 1, options)
    table = {name: measure(sides, context, steps, options.rounds) for name, (context, steps) in tests.items()}
    print(json.dumps(table) if options.json else "\n".join(_line(name, row) for name, row in table.items()))


def measure(sides: tuple[Side, Side], context: list[int], steps: list[list[int]], rounds: int) -> dict[str, Any]:
    """Tokens a second of both sides, in turn, after a warm-up."""
    for side in sides:
        side(context, steps)
    n_tokens = sum(map(len, steps))
    rates = [[n_tokens / side(context, steps) for side in sides] for _ in range(rounds)]
    ratios = [ours / theirs for ours, theirs in rates]
    of_each = list(zip(*rates, strict=True))
    return {
        "median": [statistics.median(side) for side in of_each],
        "fastest": [max(side) for side in of_each],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"{name}: {row['median'][0]:.1f} tokens/s beside {row['median'][1]:.1f} of llama.cpp, ratio {row['ratio']:.2f} "
        f"({min(row['ratios']):.2f} to {max(row['ratios']):.2f}); fastest {row['fastest'][0]:.1f} beside {row['fastest'][1]:.1f}"
    )


def _mythos_export(runner: Runner) -> Side:
    def side(context: list[int], steps: list[list[int]]) -> float:
        session = runner.session(chunk=512)  # as llama.cpp's
        if context:
            session.advance([context])
        began = time.perf_counter()
        for step in steps:
            session.advance([step])
        return time.perf_counter() - began

    return side


def _llama_cpp(path: Path, n_tokens: int, options: argparse.Namespace) -> Side:
    model = llama_cpp.Llama(
        str(path),
        n_ctx=n_tokens,
        n_batch=512,
        n_ubatch=512,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        flash_attn=options.flash_attention,
        verbose=False,
    )

    def side(context: list[int], steps: list[list[int]]) -> float:
        model.reset()
        if context:
            model.eval(context)
        began = time.perf_counter()
        for step in steps:
            model.eval(step)
        return time.perf_counter() - began

    return side


def write_gguf(path: Path, config: ModelConfig, kind: Kind) -> None:
    """Writes random weights of the model's sizes, matrices as kind."""
    layer = _one_layer(config)
    writer = gguf.GGUFWriter(path.with_suffix(".partial"), "llama")
    _write_sizes(writer, config, layer)
    random = np.random.default_rng(0)

    def add(name: str, *shape: int, kind: Kind = kind) -> None:
        values = random.standard_normal(shape, dtype=np.float32) * 0.02
        if kind is Kind.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(config.dim, dtype=np.float32))

    add("token_embd.weight", config.vocab_size, config.dim, kind=Kind.Q8_0)
    add("output.weight", config.vocab_size, config.dim, kind=Kind.Q8_0)
    add_norm("output_norm.weight")
    for index in range(len(config.layers)):
        block = f"blk.{index}."
        add_norm(f"{block}attn_norm.weight")
        add_norm(f"{block}ffn_norm.weight")
        for name, shape in _matrices(layer, config.dim):
            add(f"{block}{name}.weight", *shape)
        if isinstance(layer.feed_forward, MoEConfig):
            add(f"{block}ffn_gate_inp.weight", layer.feed_forward.n_experts, config.dim, kind=Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()
    path.with_suffix(".partial").rename(path)


def _write_sizes(writer: gguf.GGUFWriter, config: ModelConfig, layer: LayerConfig) -> None:
    attention, feed_forward = layer.attention, layer.feed_forward
    writer.add_block_count(len(config.layers))
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_head_count(attention.n_heads)
    writer.add_head_count_kv(attention.n_kv_heads)
    for add_size in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add_size(attention.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    if isinstance(feed_forward, DenseConfig):
        writer.add_feed_forward_length(feed_forward.hidden_dim)
    else:
        writer.add_feed_forward_length(feed_forward.expert_dim)
        writer.add_expert_count(feed_forward.n_experts)
        writer.add_expert_used_count(feed_forward.top_k)


def _matrices(layer: LayerConfig, dim: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A layer's matrices [out, in], those of experts one above another."""
    attention, feed_forward = layer.attention, layer.feed_forward
    wide, narrow = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
    yield "attn_q", (wide, dim)
    yield "attn_k", (narrow, dim)
    yield "attn_v", (narrow, dim)
    yield "attn_output", (dim, wide)
    if isinstance(feed_forward, DenseConfig):
        suffix, experts, hidden = "", (), feed_forward.hidden_dim
    else:
        suffix, experts, hidden = "_exps", (feed_forward.n_experts,), feed_forward.expert_dim
    yield f"ffn_gate{suffix}", (*experts, hidden, dim)
    yield f"ffn_up{suffix}", (*experts, hidden, dim)
    yield f"ffn_down{suffix}", (*experts, dim, hidden)


def _one_layer(config: ModelConfig) -> LayerConfig:
    first = config.layers[0]
    shared = isinstance(first.feed_forward, MoEConfig) and first.feed_forward.n_shared_experts
    plain = isinstance(first.attention, GroupedQueryAttentionConfig) and not shared
    if config.loop is not None or not plain or any(layer != first for layer in config.layers):
        raise SystemExit(
            "error: expected a bundle of plain layers, all alike: Llama, Mistral, Mixtral or the blueprint"
        )
    return first


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--gguf", type=Path, metavar="FOLDER", help="For the GGUF, used again if there; default beside the bundle."
    )
    parser.add_argument("--type", choices=("q4_0", "q8_0", "f32"), default="q4_0", help="Of the GGUF's matrices.")
    parser.add_argument("-p", "--prompt", type=int, default=512, help="Tokens of the prefill test; 0 leaves it out.")
    parser.add_argument("-n", "--new", type=int, default=64, help="Tokens of the decode test; 0 leaves it out.")
    parser.add_argument("-d", "--context", type=int, default=64, help="Tokens in the cache before the decode test.")
    parser.add_argument("-r", "--rounds", type=int, default=7, help="Each round times both.")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--flash-attention", action="store_true", help="llama.cpp's.")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
