"""Checkpoints of MixtralForCausalLM, and the 'Myth' blueprint, which is one: plain layers, each with grouped-query attention and a
mixture of experts.

Its router takes the softmax over all experts and normalizes that of the chosen ones: the softmax over the chosen ones' logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mythos_export.config import MixtureOfExpertsConfig, ModelConfig
from mythos_export.families import hugging_face
from mythos_export.families.family import Get, Pack

_ARCHITECTURES = ("MixtralForCausalLM",)


class Settings(hugging_face.Settings, frozen=True, kw_only=True):
    """MixtralConfig's fields that change what is computed."""

    num_local_experts: int
    num_experts_per_tok: int


def _blueprint(dim: int, layers: int, n_heads: int, hidden: int, vocab_size: int = 32000) -> Settings:
    """16 experts of which 2 are chosen, 8 key and value heads, a window of 4096 and a context of 131072 tokens."""
    return Settings(
        architectures=_ARCHITECTURES,
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=n_heads,
        num_key_value_heads=8,
        head_dim=dim // n_heads,
        max_position_embeddings=131072,
        sliding_window=4096,
        rope_theta=1_000_000.0,
        num_local_experts=16,
        num_experts_per_tok=2,
    )


VARIANTS = {
    "myth_100m": _blueprint(512, 8, 8, 320),
    "myth_1b": _blueprint(1024, 16, 16, 1024),
    "myth_8b": _blueprint(2048, 24, 16, 3072),
    "myth_50b": _blueprint(4096, 32, 32, 7680),
    "myth_200b": _blueprint(6144, 48, 48, 13824, 100_000),
    "myth_1.7t": _blueprint(12288, 80, 96, 35328, 100_000),
}


def model_config(settings: Settings) -> ModelConfig:
    experts = MixtureOfExpertsConfig(
        settings.num_local_experts, settings.num_experts_per_tok, settings.intermediate_size
    )
    return hugging_face.model_config(settings, experts)


def tensor_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    dim, hidden = settings.hidden_size, settings.intermediate_size
    feed_forward: dict[str, tuple[int, ...]] = {"block_sparse_moe.gate.weight": (settings.num_local_experts, dim)}
    for expert in range(settings.num_local_experts):
        prefix = f"block_sparse_moe.experts.{expert}."
        feed_forward |= {f"{prefix}w1.weight": (hidden, dim), f"{prefix}w3.weight": (hidden, dim)}
        feed_forward |= {f"{prefix}w2.weight": (dim, hidden)}
    return hugging_face.tensor_shapes(settings, feed_forward)


def pack(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    packs = hugging_face.pack(settings, get)
    for index in range(settings.num_hidden_layers):
        packs |= _pack_experts(settings, get, f"model.layers.{index}.block_sparse_moe.", f"prelude.{index}.ffn.")
    return packs


def _pack_experts(settings: Settings, get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    experts = [f"{theirs}experts.{index}." for index in range(settings.num_local_experts)]

    def gate_up() -> Iterator[Tensor]:
        for expert in experts:
            yield torch.cat([get(f"{expert}w1.weight"), get(f"{expert}w3.weight")]).unsqueeze(0)

    def down() -> Iterator[Tensor]:
        for expert in experts:
            yield get(f"{expert}w2.weight").unsqueeze(0)

    return {
        f"{ours}router": hugging_face.joined(get, f"{theirs}gate.weight"),
        f"{ours}router_bias": hugging_face.zeros(settings.num_local_experts),
        f"{ours}gate_up": gate_up,
        f"{ours}down": down,
    }


FAMILY = hugging_face.family(
    name="mixtral",
    architectures=_ARCHITECTURES,
    settings=Settings,
    model_config=model_config,
    tensor_shapes=tensor_shapes,
    pack=pack,
    variants=VARIANTS,
)
