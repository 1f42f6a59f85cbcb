"""What a model weighs and what one step of it reads, counted from its description alone. No torch, no weights.

Shape letters: D dim, H query heads, K key/value heads, E experts, F hidden channels, V vocab_size, W cache width.
"""

from __future__ import annotations

from dataclasses import dataclass

from mythos_export.config import AttentionConfig, DenseConfig, LatentAttentionConfig, LayerConfig, ModelConfig


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer that every token reads, those of one routed expert, and how many experts there are and are read."""

    always: int
    expert: int = 0
    n_experts: int = 0
    top_k: int = 0

    @property
    def total(self) -> int:
        return self.always + self.n_experts * self.expert

    def read(self, tokens: int) -> int:
        """Parameters read for so many tokens at once, at most: every token may choose other experts."""
        return self.always + min(self.n_experts, tokens * self.top_k) * self.expert


def _attention(dim: int, config: AttentionConfig) -> int:
    if isinstance(config, LatentAttentionConfig):
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        down = dim * (config.q_lora_rank + config.cache_width) + config.q_lora_rank + config.kv_lora_rank
        up = config.q_lora_rank * config.n_heads * head
        absorbed = config.n_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank
        return down + up + absorbed + config.n_heads * config.v_head_dim * dim
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    return dim * heads * config.head_dim


def layer_size(dim: int, layer: LayerConfig) -> LayerSize:
    """Counts one layer's parameters."""
    always = _attention(dim, layer.attention) + 2 * dim
    feed_forward = layer.feed_forward
    if isinstance(feed_forward, DenseConfig):
        return LayerSize(always + 3 * dim * feed_forward.hidden_dim)
    expert = 3 * dim * feed_forward.expert_dim
    always += dim * feed_forward.n_experts + feed_forward.n_experts + expert * feed_forward.n_shared_experts
    return LayerSize(always, expert, feed_forward.n_experts, feed_forward.top_k)


def _sizes(config: ModelConfig, layers: tuple[LayerConfig, ...]) -> list[LayerSize]:
    return [layer_size(config.dim, layer) for layer in layers]


def _loop_parts(config: ModelConfig) -> int:
    """Parameters around the looped layers, tables over loops aside: norm, decay, injection, LoRA, halting."""
    return config.dim * (3 + 2 * config.loop.lora_rank + 1) + 1 if config.loop else 0


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, tied matrices once, tables (RoPE, loops) aside."""
    matrices = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return sum(size.total for size in _sizes(config, config.layers)) + _loop_parts(config) + matrices + config.dim


def weights_read(config: ModelConfig, n_loops: int, tokens: int = 1) -> int:
    """Parameters read by one step over so many tokens, looped layers counted once a loop."""
    once = sum(size.read(tokens) for size in _sizes(config, config.prelude + config.coda))
    looped = sum(size.read(tokens) for size in _sizes(config, config.loop_layers)) + _loop_parts(config)
    return once + n_loops * looped + config.vocab_size * config.dim + config.dim


def cache_numbers(config: ModelConfig, n_loops: int, tokens: int) -> int:
    """Numbers in the cache of one sequence of so many tokens."""
    return config.slots(n_loops) * tokens * config.cache_width
