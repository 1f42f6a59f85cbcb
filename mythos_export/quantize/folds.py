"""Where factors of channels can move between layers without changing what the model computes.

A fold divides what a producer gives (a norm's weight, rows of a matrix) and multiplies the columns of every matrix that reads it.

Shape letters: D dim, H heads, N qk_nope_head_dim, Q qk_rope_head_dim, V v_head_dim, R kv_lora_rank, G query heads of a key head,
h head_dim, F hidden channels, E any leading dimensions, O output and I input channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mythos_export.config import (
    DenseConfig,
    GroupedQueryAttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    ModelConfig,
)

At = tuple[Any, ...]  # an index into the outputs [E, O] of a tensor, or into the inputs [E, I] of a matrix
Places = tuple[tuple[str, At], ...]
ALL: At = (...,)


@dataclass(frozen=True)
class Fold:
    """Where one vector of factors goes. divided: outputs of tensors. columns: inputs of matrices to multiply; rows: outputs to
    multiply. modules: Linear modules that read these channels. groups: (n, G, h) where G runs of h channels out of n * G must share
    factors, as the queries of a key head do; what is divided then has n * h outputs."""

    modules: tuple[str, ...] = ()
    divided: Places = ()
    columns: Places = ()
    rows: Places = ()
    groups: tuple[int, int, int] | None = None

    def shared(self, channels: Tensor) -> Tensor:
        """Statistics [I] made equal within groups, by the largest."""
        if self.groups is None:
            return channels
        runs = channels.unflatten(0, self.groups)
        largest: Tensor = runs.amax(1, keepdim=True).expand_as(runs).flatten()
        return largest


class Factors:
    """The factors of all folds made so far: `rows` of the outputs [E, O] and `columns` of the inputs [E, I] of tensors, by name."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self._shapes = shapes
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def apply(self, fold: Fold, factors: Tensor) -> None:
        """Adds factors [I] of a fold."""
        one = factors if fold.groups is None else factors.unflatten(0, fold.groups)[:, 0].flatten()
        for name, at in fold.divided:
            self._multiply(self.rows, name, at, 1.0 / one)
        for name, at in fold.rows:
            self._multiply(self.rows, name, at, factors)
        for name, at in fold.columns:
            self._multiply(self.columns, name, at, factors)

    def _multiply(self, where: dict[str, Tensor], name: str, at: At, factors: Tensor) -> None:
        shape = self._shapes[name]
        if name not in where:
            outputs = shape[:-1] if len(shape) > 1 else shape
            where[name] = torch.ones(outputs if where is self.rows else (*shape[:-2], shape[-1]))
        part = where[name][at]
        part *= factors.reshape(part.shape) if factors.numel() == part.numel() else factors

    def of(self, name: str, part: int | slice | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Factors of the outputs and of the inputs of a tensor, of a matrix of a stack, or of a run of rows; None for all 1."""
        rows, columns = self.rows.get(name), self.columns.get(name)
        if part is not None and rows is not None:
            rows = rows[part]
        if isinstance(part, int) and columns is not None:
            columns = columns[part]
        return rows, columns

    def scaled(self, name: str, tensor: Tensor, part: int | slice | None = None) -> Tensor:
        """A tensor, or that part of it, with its factors; float32."""
        rows, columns = self.of(name, part)
        if rows is not None:
            tensor = tensor * (rows if tensor.dim() == 1 else rows.unsqueeze(-1))
        return tensor if columns is None else tensor * (columns if tensor.dim() < 3 else columns.unsqueeze(-2))


def folds(config: ModelConfig) -> Iterator[Fold]:
    """Every fold between a layer's parts, inputs of its matrices in the order in which they are computed."""
    for name, layer in _layers(config):
        if isinstance(layer.attention, LatentAttentionConfig):
            yield from _latent(f"{name}.attn", layer.attention)
        else:
            yield from _grouped(f"{name}.attn", layer.attention)
        yield from _feed_forward(f"{name}.ffn", layer)


def _layers(config: ModelConfig) -> Iterator[tuple[str, LayerConfig]]:
    groups = (("prelude", config.prelude), ("recurrent.layers", config.loop_layers), ("coda", config.coda))
    for group, layers in groups:
        for index, layer in enumerate(layers):
            yield f"{group}.{index}", layer


def _normed(name: str) -> Fold:
    return Fold((f"{name}.weight",), ((f"{name}.norm", ALL),), ((f"{name}.weight", ALL),))


def _outputs(name: str, at: slice, *, bias: bool) -> Places:
    """Those outputs of a linear layer."""
    return ((f"{name}.weight", (at,)), *(((f"{name}.bias", (at,)),) if bias else ()))


def _queries(name: str, config: LatentAttentionConfig, at: slice) -> Places:
    """Those outputs of what gives the queries."""
    if config.q_lora_rank:
        return _outputs(f"{name}.q_up", at, bias=False)
    return _outputs(f"{name}.down", at, bias=config.down_bias)


def _latent(name: str, config: LatentAttentionConfig) -> Iterator[Fold]:
    head, out = config.qk_nope_head_dim + config.qk_rope_head_dim, f"{name}.out.weight"
    yield _normed(f"{name}.down")
    if config.q_lora_rank:
        yield _normed(f"{name}.q_up")
    for h in range(config.n_heads):
        queries = _queries(name, config, slice(h * head, h * head + config.qk_nope_head_dim))
        yield Fold((f"{name}.w_uk.{h}",), queries, ((f"{name}.w_uk", (h,)),))
    yield Fold((out,), ((f"{name}.w_uv", ALL),), ((out, ALL),))


def _grouped(name: str, config: GroupedQueryAttentionConfig) -> Iterator[Fold]:
    n_kv, width, out = config.n_kv_heads, config.head_dim, f"{name}.out.weight"
    values = slice((config.n_heads + n_kv) * width, (config.n_heads + 2 * n_kv) * width)
    yield _normed(f"{name}.qkv")
    groups = (n_kv, config.n_heads // n_kv, width)
    yield Fold((out,), _outputs(f"{name}.qkv", values, bias=config.qkv_bias), ((out, ALL),), groups=groups)


def _feed_forward(name: str, layer: LayerConfig) -> Iterator[Fold]:
    config, gate_up, down = layer.feed_forward, f"{name}.gate_up", f"{name}.down"
    norm = ((f"{name}.norm", ALL),)
    if isinstance(config, DenseConfig):
        up = slice(config.hidden_dim, 2 * config.hidden_dim)
        if config.bias:
            yield _normed(gate_up)
            down = f"{down}.weight"
            yield Fold((down,), _outputs(gate_up, up, bias=True), ((down, ALL),))
            return
        yield Fold((gate_up,), norm, ((gate_up, ALL),))
        yield Fold((down,), ((gate_up, (up,)),), ((down, ALL),))
        return
    experts = config.n_experts + config.n_shared_experts
    up = slice(config.expert_dim, 2 * config.expert_dim)
    yield Fold(tuple(f"{gate_up}.{e}" for e in range(experts)), norm, ((gate_up, ALL), (f"{name}.router", ALL)))
    for e in range(experts):
        yield Fold((f"{down}.{e}",), ((gate_up, (e, up)),), ((down, (e,)),))


def cache_folds(config: ModelConfig) -> Iterator[tuple[str, slice, Fold]]:
    """(module that the layer's rows pass, channels of them, fold): dividing cached rows channel by channel.

    The factors of a rotated pair must be equal, as a rotation mixes the two.
    """
    for layer_name, layer in _layers(config):
        name, attention = f"{layer_name}.attn", layer.attention
        is_latent = isinstance(attention, LatentAttentionConfig)
        parts = _latent_cache(name, attention) if is_latent else _grouped_cache(name, attention)  # type: ignore[arg-type]
        for channels, fold in parts:
            yield f"{name}.cache", channels, fold


def _latent_cache(name: str, config: LatentAttentionConfig) -> Iterator[tuple[slice, Fold]]:
    rank, rope, nope = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
    # The latent's share of a score is a product with w_uk's outputs.
    norm, values, keys = ((f"{name}.{part}", ALL) for part in ("kv_norm", "w_uv", "w_uk"))
    yield slice(0, rank), Fold(divided=(norm,), columns=(values,), rows=(keys,))
    start = config.down_split[0] + rank
    rotated = [slice(h * (nope + rope) + nope, (h + 1) * (nope + rope)) for h in range(config.n_heads)]
    queries = tuple(place for at in rotated for place in _queries(name, config, at))
    key = _outputs(f"{name}.down", slice(start, start + rope), bias=config.down_bias)
    yield slice(rank, rank + rope), Fold(divided=key, rows=queries)


def _grouped_cache(name: str, config: GroupedQueryAttentionConfig) -> Iterator[tuple[slice, Fold]]:
    n_q, n_kv, width = config.n_heads, config.n_kv_heads, config.head_dim
    out = f"{name}.out.weight"

    def channels(head: int) -> slice:
        return slice(head * width, (head + 1) * width)

    def rows(head: int) -> Places:
        return _outputs(f"{name}.qkv", channels(head), bias=config.qkv_bias)

    group = n_q // n_kv
    for head in range(n_kv):
        queries = range(head * group, (head + 1) * group)
        yield channels(head), Fold(divided=rows(n_q + head), rows=tuple(place for q in queries for place in rows(q)))
        columns = tuple((out, (channels(q),)) for q in queries)
        yield channels(n_kv + head), Fold(divided=rows(n_q + n_kv + head), columns=columns)
