"""Checkpoints of MixtralForCausalLM, and the 'Myth' blueprint, which is one: plain layers, each with grouped-query attention and a
mixture of experts.

Its router takes the softmax over all experts and normalizes that of the chosen ones: the softmax over the chosen ones' logits.
"""

from __future__ import annotations

from mythos_export.config import LayerConfig, MixtureOfExpertsConfig, ModelConfig
from mythos_export.families import hugging_face, parts
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
    layer = LayerConfig(hugging_face.attention(settings), experts)
    return hugging_face.model_config(settings, [layer] * settings.num_hidden_layers)


def tensor_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    dim, hidden = settings.hidden_size, settings.intermediate_size
    feed_forward: dict[str, tuple[int, ...]] = {"block_sparse_moe.gate.weight": (settings.num_local_experts, dim)}
    for expert in range(settings.num_local_experts):
        prefix = f"block_sparse_moe.experts.{expert}."
        feed_forward |= {f"{prefix}w1.weight": (hidden, dim), f"{prefix}w3.weight": (hidden, dim)}
        feed_forward |= {f"{prefix}w2.weight": (dim, hidden)}
    layer = hugging_face.attention_shapes(settings) | feed_forward
    return hugging_face.tensor_shapes(settings, [layer] * settings.num_hidden_layers)


def pack(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    packs = hugging_face.pack(settings, get)
    for index in range(settings.num_hidden_layers):
        packs |= hugging_face.pack_attention(settings, get, index)
        packs |= _pack_experts(settings, get, f"model.layers.{index}.", f"prelude.{index}.ffn.")
    return packs


def _pack_experts(settings: Settings, get: Get, layer: str, ours: str) -> dict[str, Pack]:
    theirs = f"{layer}block_sparse_moe."
    names = [f"{theirs}experts.{index}." for index in range(settings.num_local_experts)]
    return {
        f"{ours}norm": parts.joined(get, f"{layer}post_attention_layernorm.weight"),
        f"{ours}router": parts.joined(get, f"{theirs}gate.weight"),
        f"{ours}router_bias": parts.zeros(settings.num_local_experts),
        **parts.experts(get, names, ("w1.weight", "w3.weight", "w2.weight"), settings.intermediate_size, ours),
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
