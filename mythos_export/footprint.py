"""What a model weighs and what one step of it reads, counted from its description alone. No torch, no weights.

Shape letters: D dim, H query heads, K key/value heads, E experts, F hidden channels, V vocab_size, W cache width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mythos_export.config import AttentionConfig, DenseConfig, LatentAttentionConfig, LayerConfig, ModelConfig


@dataclass(frozen=True)
class Storage:
    """Bytes a number: of the matrices, of embedding and head, and of everything else."""

    matrix: float = 4.0
    head: float = 4.0
    rest: float = 4.0

    @classmethod
    def of(cls, weight_dtype: str, quantization: dict[str, Any] | None) -> Storage:
        """As a manifest describes it; quantized numbers carry their share of a float16 scale."""
        if quantization is None:
            size = 4.0 if weight_dtype == "float32" else 2.0
            return cls(size, size)
        scale = 2.0 / quantization["block_size"]
        return cls(quantization["bits"] / 8 + scale, quantization["head_bits"] / 8 + scale)


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer that every token reads, in matrices and besides; those of one routed expert, and how many experts there
    are and are read."""

    matrices: int
    rest: int
    expert: int = 0
    n_experts: int = 0
    top_k: int = 0

    @property
    def total(self) -> int:
        return self.matrices + self.rest + self.n_experts * self.expert

    def read(self, tokens: int, storage: Storage) -> float:
        """Bytes read for so many tokens at once, at most: every token may choose other experts."""
        experts = min(self.n_experts, tokens * self.top_k) * self.expert
        return storage.matrix * (self.matrices + experts) + storage.rest * self.rest


def _attention(dim: int, config: AttentionConfig) -> LayerSize:
    if isinstance(config, LatentAttentionConfig):
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        down = dim * (config.q_lora_rank + config.cache_width)
        up = config.q_lora_rank * config.n_heads * head
        absorbed = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
        out = config.n_heads * config.v_head_dim * dim
        return LayerSize(down + up + absorbed + out, config.q_lora_rank + config.kv_lora_rank)
    return LayerSize(dim * (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim, 0)


def layer_size(dim: int, layer: LayerConfig) -> LayerSize:
    """Counts one layer's parameters."""
    attention, feed_forward = _attention(dim, layer.attention), layer.feed_forward
    rest = attention.rest + 2 * dim
    if isinstance(feed_forward, DenseConfig):
        return LayerSize(attention.matrices + 3 * dim * feed_forward.hidden_dim, rest)
    expert = 3 * dim * feed_forward.expert_dim
    return LayerSize(
        attention.matrices + expert * feed_forward.n_shared_experts,
        rest + (dim + 1) * feed_forward.n_experts,
        expert,
        feed_forward.n_experts,
        feed_forward.top_k,
    )


def _sizes(config: ModelConfig, layers: tuple[LayerConfig, ...]) -> list[LayerSize]:
    return [layer_size(config.dim, layer) for layer in layers]


def _loop_parts(config: ModelConfig) -> int:
    """Parameters around the looped layers, tables over loops aside: norm, decay, injection, LoRA, halting."""
    return config.dim * (3 + 2 * config.loop.lora_rank + 1) + 1 if config.loop else 0


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, tied matrices once, tables (RoPE, loops) aside."""
    matrices = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return sum(size.total for size in _sizes(config, config.layers)) + _loop_parts(config) + matrices + config.dim


def weight_bytes_read(config: ModelConfig, n_loops: int, tokens: int = 1, storage: Storage = Storage()) -> float:
    """Bytes of weights read by one step over so many tokens, looped layers counted once a loop."""
    once = sum(size.read(tokens, storage) for size in _sizes(config, config.prelude + config.coda))
    looped = sum(size.read(tokens, storage) for size in _sizes(config, config.loop_layers))
    looped += storage.rest * _loop_parts(config)
    return once + n_loops * looped + storage.head * config.vocab_size * config.dim + storage.rest * config.dim


def cache_bytes(config: ModelConfig, n_loops: int, tokens: int, cache_dtype: str) -> int:
    """Bytes in the cache of one sequence of so many tokens, with the float32 scale of every int8 row."""
    return config.slots(n_loops) * tokens * row_bytes(config.cache_width, cache_dtype)


def row_bytes(width: int, cache_dtype: str) -> int:
    """Bytes of one cached row, its scale included where it is int8."""
    return width + 4 if cache_dtype == "int8" else width * (4 if cache_dtype == "float32" else 2)
