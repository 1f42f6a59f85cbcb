"""Attention in export form, with its norm and residual: projections around the ai.mythos attention operators.

Shape letters: B batch, S new tokens, D dim, C capacity and W width of the cache, h half the rotated size of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mythos_export.config import AttentionConfig, GroupedQueryAttentionConfig, LatentAttentionConfig
from mythos_export.model.layers import NormalizedLinear, ResidualLinear, empty

Rows = tuple[Tensor, ...]  # new rows of n slots: new_kv [n, B, S, W] and, of an int8 cache, new_scale [n, B, S]


def join(rows: Iterable[Rows]) -> Rows:
    """The rows of several slots, one after another."""
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


class Context(NamedTuple):
    """What every attention layer of one step shares.

    cos, sin [B, S, h] float32; past_kv [slots, B, C, W]; past_scale [slots, B, C] float32 of an int8 cache, else None; past_len [B]
    int64; row_scale: fixed scale of an int8 cache's new rows, 0 for one of its own for each.
    """

    cos: Tensor
    sin: Tensor
    past_kv: Tensor
    past_scale: Tensor | None
    past_len: Tensor
    row_scale: float


def attend(
    name: str, inputs: tuple[Tensor, ...], context: Context, slot: Tensor, attributes: tuple[float, ...]
) -> tuple[Tensor, Rows]:
    """Calls the attention operator of that name, or its form for int8 caches; returns y and the slot's new rows."""
    inputs = *inputs, context.cos, context.sin, context.past_kv
    if context.past_scale is None:
        y, *rows = getattr(torch.ops.mythos, name)(*inputs, context.past_len, slot, *attributes)
    else:
        op = getattr(torch.ops.mythos, f"{name}_int8_cache")
        y, *rows = op(*inputs, context.past_scale, context.past_len, slot, *attributes, context.row_scale)
    return y, tuple(part.unsqueeze(0) for part in rows)


class LatentAttention(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434). down: query latent, or the queries, and cached row in one matrix."""

    def __init__(self, dim: int, config: LatentAttentionConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.split, self.scale = list(config.down_split), config.scale
        self.epsilon = epsilon if config.norm_eps is None else config.norm_eps
        self.down = NormalizedLinear(dim, sum(self.split), epsilon, dtype, bias=config.down_bias)
        self.q_up = None
        if config.q_lora_rank:
            self.q_up = NormalizedLinear(config.q_lora_rank, config.query_width, self.epsilon, dtype)
        self.kv_norm = empty(config.kv_lora_rank, dtype=torch.float32)
        self.w_uk = empty(config.n_heads, config.kv_lora_rank, config.qk_nope_head_dim, dtype=dtype)
        self.w_uv = empty(config.n_heads, config.v_head_dim, config.kv_lora_rank, dtype=dtype)
        self.out = ResidualLinear(config.n_heads * config.v_head_dim, dim, dtype, bias=config.out_bias)

    def forward(self, x: Tensor, context: Context, slot: Tensor) -> tuple[Tensor, Rows]:
        """x [B, S, D] float32 -> x + attention [B, S, D] and the slot's new rows."""
        q, kv = self.down(x).split(self.split, -1)
        inputs = q if self.q_up is None else self.q_up(q), kv, self.kv_norm, self.w_uk, self.w_uv
        y, rows = attend("latent_attention", inputs, context, slot, (self.scale, self.epsilon))
        return self.out(x, y), rows


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245). qkv: the three projections in one matrix."""

    def __init__(self, dim: int, config: GroupedQueryAttentionConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.scale = config.head_dim**-0.5
        n_out = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = NormalizedLinear(dim, n_out, epsilon, dtype, bias=config.qkv_bias)
        self.out = ResidualLinear(config.n_heads * config.head_dim, dim, dtype, bias=config.out_bias)

    def forward(self, x: Tensor, context: Context, slot: Tensor) -> tuple[Tensor, Rows]:
        """x [B, S, D] float32 -> x + attention [B, S, D] and the slot's new rows."""
        attributes = self.config.n_heads, self.config.n_kv_heads, self.config.window, self.scale
        y, rows = attend("grouped_query_attention", (self.qkv(x),), context, slot, attributes)
        return self.out(x, y), rows


def attention(dim: int, config: AttentionConfig, epsilon: float, dtype: torch.dtype) -> nn.Module:
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(dim, config, epsilon, dtype)
    return GroupedQueryAttention(dim, config, epsilon, dtype)
