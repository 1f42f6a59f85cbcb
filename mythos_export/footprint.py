"""What a model weighs and what one step of it reads, counted from its description alone. No torch, no weights.

Shape letters: D dim, H query heads, K key/value heads, E experts, F hidden channels, V vocab_size, W cache width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mythos_export.config import AttentionConfig, DenseConfig, LatentAttentionConfig, LayerConfig, ModelConfig


@dataclass(frozen=True)
class Storage:
    """Bytes a number takes where it is stored. matrices: of quantized ones, by name; matrix: of the others; rest: of all else."""

    matrix: float = 4.0
    rest: float = 4.0
    matrices: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, weight_dtype: str, quantization: dict[str, Any] | None) -> Storage:
        """As a manifest describes it; quantized numbers carry their share of a float16 scale."""
        if quantization is None:
            return cls(4.0 if weight_dtype == "float32" else 2.0)
        sizes = {
            name: (0.5 if matrix["format"] == "int4" else 1.0) + 2.0 / matrix["stored_block"]
            for name, matrix in quantization["matrices"].items()
        }
        return cls(matrices=sizes)

    def bytes(self, name: str, numbers: int) -> float:
        """Of so many numbers of a matrix."""
        return numbers * self.matrices.get(name, self.matrix)


class Part(NamedTuple):
    """What a step reads: an operator of the graph, and which of its weights (one of `matrix`, `w_uk`, `w_uv`, `gate_up`, `down`,
    `head`; `rest`: norms, routers, biases, decays)."""

    operator: str
    weights: str


def _operator_of(name: str, is_mixture: bool) -> Part:
    """The operator that a layer's matrix belongs to."""
    block, _, matrix = name.removesuffix(".weight").rpartition(".")
    if block.endswith("ffn"):
        return Part("MixtureOfExperts" if is_mixture else "FeedForward", matrix)
    if matrix in ("w_uk", "w_uv"):
        return Part("LatentAttention", matrix)
    return Part("ResidualLinear" if matrix == "out" else "NormalizedLinear", "matrix")


@dataclass(frozen=True)
class LayerSize:
    """Parameters of a layer that every token reads, in matrices by name and besides; those of one routed expert, and how many
    experts there are and are read."""

    matrices: dict[str, int]
    rest: int
    expert: dict[str, int] = field(default_factory=dict)
    n_experts: int = 0
    top_k: int = 0

    @property
    def total(self) -> int:
        return sum(self.matrices.values()) + self.rest + self.n_experts * sum(self.expert.values())

    def parts_read(self, tokens: int, storage: Storage) -> dict[Part, float]:
        """Bytes read for so many tokens at once: of the experts that they choose in the mean, were every choice as likely."""
        left_out = (1 - self.top_k / self.n_experts) ** tokens if self.n_experts else 0
        experts, is_mixture = self.n_experts * (1 - left_out), bool(self.n_experts)
        parts = {_operator_of("ffn.rest", is_mixture): storage.rest * self.rest}
        for times, matrices in ((1.0, self.matrices), (experts, self.expert)):
            for name, numbers in matrices.items():
                part = _operator_of(name, is_mixture)
                parts[part] = parts.get(part, 0.0) + times * storage.bytes(name, numbers)
        return parts

    def bytes(self, storage: Storage, experts: float) -> float:
        """Of what every token reads, and of so many routed experts."""
        always = sum(storage.bytes(name, numbers) for name, numbers in self.matrices.items())
        each = sum(storage.bytes(name, numbers) for name, numbers in self.expert.items())
        return always + experts * each + storage.rest * self.rest


def _attention(name: str, dim: int, config: AttentionConfig) -> LayerSize:
    if isinstance(config, LatentAttentionConfig):
        n_down = sum(config.down_split)
        matrices = {
            "down.weight": dim * n_down,
            "q_up.weight": config.q_lora_rank * config.query_width,
            "w_uk": config.n_heads * config.qk_nope_head_dim * config.kv_lora_rank,
            "w_uv": config.n_heads * config.v_head_dim * config.kv_lora_rank,
            "out.weight": config.n_heads * config.v_head_dim * dim,
        }
        rest = config.q_lora_rank + config.kv_lora_rank + n_down * config.down_bias
    else:
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        n_qkv = queries + 2 * keys
        matrices, rest = {"qkv.weight": dim * n_qkv, "out.weight": queries * dim}, n_qkv * config.qkv_bias
    rest += dim * config.out_bias
    return LayerSize({f"{name}.attn.{part}": numbers for part, numbers in matrices.items()}, rest)


def layer_size(name: str, dim: int, layer: LayerConfig) -> LayerSize:
    """Counts the parameters of the layer of that name."""
    attention, feed_forward = _attention(name, dim, layer.attention), layer.feed_forward
    rest = attention.rest + 2 * dim

    def swiglu(hidden: int, suffix: str = "") -> dict[str, int]:
        return {f"{name}.ffn.gate_up{suffix}": 2 * dim * hidden, f"{name}.ffn.down{suffix}": dim * hidden}

    if isinstance(feed_forward, DenseConfig):
        hidden, suffix = feed_forward.hidden_dim, ".weight" if feed_forward.bias else ""
        return LayerSize(attention.matrices | swiglu(hidden, suffix), rest + (2 * hidden + dim) * feed_forward.bias)
    return LayerSize(
        attention.matrices | swiglu(feed_forward.expert_dim * feed_forward.n_shared_experts),
        rest + (dim + 1) * feed_forward.n_experts,
        swiglu(feed_forward.expert_dim),
        feed_forward.n_experts,
        feed_forward.top_k,
    )


def _sizes(config: ModelConfig, *groups: str) -> list[LayerSize]:
    layers = {"prelude": config.prelude, "recurrent.layers": config.loop_layers, "coda": config.coda}
    return [
        layer_size(f"{group}.{index}", config.dim, layer)
        for group in groups
        for index, layer in enumerate(layers[group])
    ]


def _loop_parts(config: ModelConfig) -> int:
    """Parameters around the looped layers, tables over loops aside: norm, decay, injection, LoRA, halting."""
    return config.dim * (3 + 2 * config.loop.lora_rank + 1) + 1 if config.loop else 0


def parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, tied matrices once, tables (RoPE, loops) aside."""
    matrices = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    layers = sum(size.total for size in _sizes(config, "prelude", "recurrent.layers", "coda"))
    return layers + _loop_parts(config) + matrices + config.dim


def weight_bytes(config: ModelConfig, storage: Storage = Storage()) -> float:
    """Bytes of all weights as they are stored, tied matrices once, tables (RoPE, loops) aside."""
    layers = sum(size.bytes(storage, size.n_experts) for size in _sizes(config, "prelude", "recurrent.layers", "coda"))
    matrices = ["embed"] if config.tie_embeddings else ["embed", "head"]
    ends = sum(storage.bytes(name, config.vocab_size * config.dim) for name in matrices)
    return layers + ends + storage.rest * (_loop_parts(config) + config.dim)


def parts_read(config: ModelConfig, n_loops: int, tokens: int = 1, storage: Storage = Storage()) -> dict[Part, float]:
    """Bytes of weights read by one step over so many tokens, by part, looped layers counted once a loop. A layer's norms and biases
    count with its feed-forward block, what surrounds the looped layers with RecurrentUpdate."""
    parts: dict[Part, float] = {}

    def add(part: Part, n_bytes: float) -> None:
        parts[part] = parts.get(part, 0.0) + n_bytes

    for times, groups in ((1, ("prelude", "coda")), (n_loops, ("recurrent.layers",))):
        for size in _sizes(config, *groups):
            for part, n_bytes in size.parts_read(tokens, storage).items():
                add(part, times * n_bytes)
    if config.loop:
        add(Part("RecurrentUpdate", "rest"), n_loops * storage.rest * _loop_parts(config))
    head = storage.bytes("embed" if config.tie_embeddings else "head", config.vocab_size * config.dim)
    add(Part("NormalizedLinear", "head"), head + storage.rest * config.dim)
    return parts


def weight_bytes_read(config: ModelConfig, n_loops: int, tokens: int = 1, storage: Storage = Storage()) -> float:
    """Bytes of weights read by one step over so many tokens, looped layers counted once a loop."""
    return sum(parts_read(config, n_loops, tokens, storage).values())


def cache_bytes(config: ModelConfig, n_loops: int, tokens: int, cache_dtype: str) -> int:
    """Bytes in the cache of one sequence of so many tokens (of the last `window` where every layer has one), with the float32 scale
    of every int8 row."""
    rows = min(tokens, config.window or tokens)
    return config.slots(n_loops) * rows * row_bytes(config.cache_width, cache_dtype)


def row_bytes(width: int, cache_dtype: str) -> int:
    """Bytes of one cached row, its scale included where it is int8."""
    return width + 4 if cache_dtype == "int8" else width * (4 if cache_dtype == "float32" else 2)
