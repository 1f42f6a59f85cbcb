"""The decoder over whole sequences, its products taken apart into torch.nn.Linear modules: what calibration hooks and changes.

Every matrix of the graph is a Linear module of the graph's name (`recurrent.layers.0.attn.down.weight`); a stack of matrices, as of
experts or heads, is one Linear an index (`recurrent.layers.0.ffn.gate_up.3`). A looped module is called once a loop, in order.
No cache: sequences are short and fed whole. The weights are the tensors given, not copies.

Shape letters: B batch, S tokens, D dim, H heads, N qk_nope_head_dim, Q qk_rope_head_dim, V v_head_dim, R kv_lora_rank,
W cache_width, E routed experts, T = B * S, O output and I input channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_export.config import (
    AttentionConfig,
    DenseConfig,
    LatentAttentionConfig,
    LayerConfig,
    MixtureOfExpertsConfig,
    ModelConfig,
)
from mythos_export.ops.cached_attention import rotate
from mythos_export.ops.operator import rms_norm
from mythos_export.ops.routing import route

Weights = Mapping[str, Tensor]


def linear(weight: Tensor) -> nn.Linear:
    """A Linear module without bias over a matrix [O, I], not a copy of it."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


class NormalizedLinear(nn.Module):
    """rms_norm(x) · weight^T, and a bias where there is one."""

    def __init__(self, weights: Weights, name: str, epsilon: float) -> None:
        super().__init__()
        self.norm, self.epsilon = weights[f"{name}.norm"], epsilon
        self.weight, self.bias = linear(weights[f"{name}.weight"]), weights.get(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.weight(rms_norm(x, self.norm, self.epsilon))
        return y if self.bias is None else y + self.bias


class ResidualLinear(nn.Module):
    """residual + x · weight^T, and a bias where there is one."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weight, self.bias = linear(weights[f"{name}.weight"]), weights.get(f"{name}.bias")

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = residual + self.weight(x)
        return y if self.bias is None else y + self.bias


class CachedRows(nn.Identity):
    """Where the rows [B, S, W] pass that a cache would hold. pairs: (start, stop, head_dim) of the rotated heads in them."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.channels = config.cache_width
        if isinstance(config, LatentAttentionConfig):
            self.pairs = (config.kv_lora_rank, config.cache_width, config.qk_rope_head_dim)
        else:
            self.pairs = (0, config.cache_width // 2, config.head_dim)


def _stack(matrices: Tensor) -> nn.ModuleList:
    return nn.ModuleList([linear(matrix) for matrix in matrices])


class LatentAttention(nn.Module):
    """Absorbed latent attention (arXiv 2405.04434), causal."""

    def __init__(self, weights: Weights, name: str, config: LatentAttentionConfig, epsilon: float) -> None:
        super().__init__()
        self.config, self.epsilon = config, epsilon if config.norm_eps is None else config.norm_eps
        self.down = NormalizedLinear(weights, f"{name}.down", epsilon)
        self.q_up = NormalizedLinear(weights, f"{name}.q_up", self.epsilon) if config.q_lora_rank else None
        self.kv_norm = weights[f"{name}.kv_norm"]
        self.w_uk, self.w_uv = _stack(weights[f"{name}.w_uk"]), _stack(weights[f"{name}.w_uv"])
        self.cache = CachedRows(config)
        self.out = ResidualLinear(weights, f"{name}.out")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, D], cos, sin [B, S, Q/2] -> [B, S, D]."""
        config = self.config
        nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
        q, latent, key = self.down(x).split([config.down_split[0], rank, config.qk_rope_head_dim], -1)
        heads = (q if self.q_up is None else self.q_up(q)).unflatten(-1, (config.n_heads, -1))
        absorbed = torch.stack([w_uk(heads[:, :, h, :nope]) for h, w_uk in enumerate(self.w_uk)], 2)
        query = torch.cat([absorbed, rotate(heads[..., nope:], cos, sin)], -1).transpose(1, 2)
        latent = rms_norm(latent, self.kv_norm, self.epsilon)
        rows = self.cache(torch.cat([latent, rotate(key.unsqueeze(2), cos, sin).squeeze(2)], -1))
        rows = rows.unsqueeze(1).expand(-1, config.n_heads, -1, -1)
        mixed = F.scaled_dot_product_attention(query, rows, rows[..., :rank], is_causal=True, scale=config.scale)
        y = torch.cat([w_uv(mixed[:, h]) for h, w_uv in enumerate(self.w_uv)], -1)
        out: Tensor = self.out(x, y)
        return out


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), causal."""

    def __init__(self, weights: Weights, name: str, layer: LayerConfig, epsilon: float) -> None:
        super().__init__()
        config = self.config = layer.attention
        self.qkv = NormalizedLinear(weights, f"{name}.qkv", epsilon)
        self.cache = CachedRows(config)
        self.out = ResidualLinear(weights, f"{name}.out")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, D], cos, sin [B, S, head_dim/2] -> [B, S, D]."""
        config = self.config
        if isinstance(config, LatentAttentionConfig):
            raise TypeError("the layer is not grouped-query attention")
        seq = x.shape[1]
        heads = self.qkv(x).unflatten(-1, (-1, config.head_dim))
        q, k, v = heads.split([config.n_heads, config.n_kv_heads, config.n_kv_heads], 2)
        rows = self.cache(torch.cat([rotate(k, cos, sin).flatten(2), v.flatten(2)], -1))
        k, v = (part.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for part in rows.chunk(2, -1))
        position = torch.arange(seq)
        seen = position <= position[:, None]
        if config.window:
            seen &= position > position[:, None] - config.window
        q = rotate(q, cos, sin).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        out: Tensor = self.out(x, y.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """The dense SwiGLU block (arXiv 2002.05202)."""

    def __init__(self, weights: Weights, name: str, epsilon: float) -> None:
        super().__init__()
        self.norm, self.epsilon = weights[f"{name}.norm"], epsilon
        self.gate_up, self.down = linear(weights[f"{name}.gate_up"]), linear(weights[f"{name}.down"])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(rms_norm(x, self.norm, self.epsilon)).chunk(2, -1)
        y: Tensor = x + self.down(F.silu(gate) * up)
        return y


class BiasedFeedForward(nn.Module):
    """The same with biases."""

    def __init__(self, weights: Weights, name: str, epsilon: float) -> None:
        super().__init__()
        self.gate_up = NormalizedLinear(weights, f"{name}.gate_up", epsilon)
        self.down = ResidualLinear(weights, f"{name}.down")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = self.down(x, F.silu(gate) * up)
        return y


class MixtureOfExperts(nn.Module):
    """Routed and shared experts (arXiv 2401.06066). every_token: run every expert on every token, as calibration may want; the
    result is that of the chosen ones all the same."""

    def __init__(self, weights: Weights, name: str, config: MixtureOfExpertsConfig, epsilon: float) -> None:
        super().__init__()
        self.norm, self.epsilon, self.config = weights[f"{name}.norm"], epsilon, config
        self.router, self.router_bias = weights[f"{name}.router"], weights[f"{name}.router_bias"]
        self.gate_up, self.down = _stack(weights[f"{name}.gate_up"]), _stack(weights[f"{name}.down"])
        self.every_token = False

    def forward(self, x: Tensor) -> Tensor:
        normed = rms_norm(x, self.norm, self.epsilon).flatten(0, -2)
        logits = F.linear(normed, self.router)
        chosen, weights = route(logits, self.router_bias, self.config.top_k, self.config.routing)
        weight = torch.zeros_like(logits).scatter(-1, chosen, weights)
        shared = weight.new_ones(len(weight), len(self.gate_up) - weight.shape[1])
        picked = torch.cat([torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True), shared.bool()], -1)
        weight = torch.cat([weight, shared], -1)
        y = torch.zeros_like(normed)
        for index, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            # Called even without tokens: the number of calls tells the loop.
            token = torch.arange(len(normed)) if self.every_token else torch.where(picked[:, index])[0]
            self._set_tokens(gate_up, down, token)
            gate, up = gate_up(normed[token]).chunk(2, -1)
            y.index_add_(0, token, down(F.silu(gate) * up) * weight[token, index].unsqueeze(-1))
        return x + y.reshape(x.shape)

    @staticmethod
    def _set_tokens(gate_up: nn.Module, down: nn.Module, token: Tensor) -> None:
        """Tells observers which tokens [n] of the batch the next call sees."""
        gate_up.tokens = down.tokens = token  # type: ignore[assignment]


class Layer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, weights: Weights, name: str, config: LayerConfig, epsilon: float) -> None:
        super().__init__()
        self.attn: nn.Module
        self.ffn: nn.Module
        if isinstance(config.attention, LatentAttentionConfig):
            self.attn = LatentAttention(weights, f"{name}.attn", config.attention, epsilon)
        else:
            self.attn = GroupedQueryAttention(weights, f"{name}.attn", config, epsilon)
        if isinstance(config.feed_forward, DenseConfig):
            kind = BiasedFeedForward if config.feed_forward.bias else FeedForward
            self.ffn = kind(weights, f"{name}.ffn", epsilon)
        else:
            self.ffn = MixtureOfExperts(weights, f"{name}.ffn", config.feed_forward, epsilon)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y: Tensor = self.ffn(self.attn(x, cos, sin))
        return y


class Recurrent(nn.Module):
    """The looped layers. contribution: where the share of the result that is still open passes, [B, S, 1], at the start of every
    loop: what a token's state can still weigh in its result, 0 once it has halted."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        super().__init__()
        if config.loop is None:
            raise TypeError("the model has no loop")
        self.loop, self.epsilon = config.loop, config.norm_eps
        self.layers = nn.ModuleList(
            [
                Layer(weights, f"recurrent.layers.{index}", layer, config.norm_eps)
                for index, layer in enumerate(config.loop_layers)
            ]
        )
        self.tables = {
            name: weights[f"recurrent.{name}"]
            for name in ("loop_signal", "norm", *_UPDATE)
            if f"recurrent.{name}" in weights
        }
        self.contribution = nn.Identity()

    def forward(self, e: Tensor, cos: Tensor, sin: Tensor, n_loops: int) -> Tensor:
        """e [B, S, D] -> the halting-weighted sum of n_loops states [B, S, D]."""
        tables = self.tables
        h, result, halted = e, torch.zeros_like(e), torch.zeros_like(e[..., :1])
        exit_loop = torch.zeros_like(halted, dtype=torch.int64)
        for index in range(n_loops):
            loop, depth = torch.tensor(index), torch.tensor([n_loops])
            running = halted < self.loop.act_threshold
            self.contribution(torch.where(running, 1.0 - halted, torch.zeros_like(halted)))
            x = torch.ops.mythos.recurrent_input(h, e, tables["loop_signal"], tables["norm"], loop, self.epsilon)
            for layer in self.layers:
                x = layer(x, cos, sin)
            h, result, halted, exit_loop = torch.ops.mythos.recurrent_update(
                x, h, e, result, halted, exit_loop, loop, depth, *(tables[name] for name in _UPDATE),
                self.loop.act_threshold,
            )  # fmt: skip
        return result


_UPDATE = ("lora_down", "lora_scale", "lora_up", "decay", "injection", "halt", "halt_bias")


class Unfolded(nn.Module):
    """The whole model. weights: every tensor of the graph by its name, float32. n_loops: loops to run, to be changed at will."""

    def __init__(self, config: ModelConfig, weights: Weights, n_loops: int) -> None:
        super().__init__()

        def layers(group: str, configs: tuple[LayerConfig, ...]) -> nn.ModuleList:
            return nn.ModuleList([Layer(weights, f"{group}.{i}", c, config.norm_eps) for i, c in enumerate(configs)])

        self.config, self.n_loops = config, n_loops
        self.rope = weights["rope_cos"], weights["rope_sin"]
        self.norm, self.table = weights["norm"], weights["embed"]
        self.prelude = layers("prelude", config.prelude)
        self.recurrent = Recurrent(weights, config) if config.loop else None
        self.coda = layers("coda", config.coda)
        self.embed = linear(weights["embed"]) if config.tie_embeddings else None
        self.head = None if config.tie_embeddings else linear(weights["head"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [B, S] int64 -> logits [B, S, vocab_size] float32."""
        cos, sin = (table[: input_ids.shape[1]].expand(len(input_ids), -1, -1) for table in self.rope)
        x = F.embedding(input_ids, self.table)
        for layer in self.prelude:
            x = layer(x, cos, sin)
        if self.recurrent is not None:
            x = self.recurrent(x, cos, sin, self.n_loops)
        for layer in self.coda:
            x = layer(x, cos, sin)
        head = self.embed if self.head is None else self.head
        logits: Tensor = head(rms_norm(x, self.norm, self.config.norm_eps))  # type: ignore[misc]
        return logits
