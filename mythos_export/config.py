"""The one description of a model that tracing, quantization, runners and the C API read.

A model is three groups of layers: `prelude` before the loop, `loop_layers` inside it, `coda` after it. Each layer says what
attention and what feed-forward it has. `loop` holds the parts that only a looped model has. A model without a loop has no
`loop_layers` and `loop=None`.

Cache slots, in order: one per prelude layer, one per loop layer and loop, one per coda layer.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from runtimes.errors import MythosError


class ConfigError(MythosError, ValueError):
    """A model description that contradicts itself; the message names the field, its value and what is allowed."""


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ConfigError(what)


def _require_positive(owner: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value >= 1, f"{type(owner).__name__}.{name} is {value}; expected an integer of at least 1")


class LatentAttentionConfig(msgspec.Struct, frozen=True, tag="latent", tag_field="kind", forbid_unknown_fields=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values are expanded from one cached latent.

    n_heads: query heads. q_lora_rank: width of the query's latent, 0 where queries are projected without one. kv_lora_rank:
    width of the cached latent. qk_nope_head_dim, qk_rope_head_dim: unrotated and rotated part of a query head. v_head_dim: width
    of a value head. down_bias, out_bias: whether the first projection (down_split) and that of the output add a bias.
    score_factor: of the scores, beside 1 / sqrt(size of a query head). norm_eps: epsilon of the latents' RMSNorm, None for the
    model's.
    """

    n_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    down_bias: bool = False
    out_bias: bool = False
    score_factor: float = 1.0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "n_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        _require(self.q_lora_rank >= 0, f"q_lora_rank is {self.q_lora_rank}; expected 0 or more")
        _require(self.score_factor > 0, f"score_factor is {self.score_factor}; expected a number above 0")
        _require(
            self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE needs an even number"
        )

    @property
    def query_width(self) -> int:
        """Numbers of all query heads of a token."""
        return self.n_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)

    @property
    def down_split(self) -> tuple[int, int]:
        """Outputs of the first projection: the query's latent, or the queries themselves, and the cached row."""
        return self.q_lora_rank or self.query_width, self.cache_width

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        head: int = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.score_factor * float(head**-0.5)

    @property
    def cache_width(self) -> int:
        """Numbers cached a token and slot: the normalized latent and one rotated key shared by all heads."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim


class GroupedQueryAttentionConfig(msgspec.Struct, frozen=True, tag="gqa", tag_field="kind", forbid_unknown_fields=True):
    """Grouped-query attention (arXiv 2305.13245): n_heads query heads share n_kv_heads key and value heads.

    window: positions a token sees, itself included (sliding window, arXiv 2310.06825); 0 for all. qkv_bias, out_bias: whether the
    projections of queries, keys and values, and of the output, add a bias.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int = 0
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "n_heads", "n_kv_heads", "head_dim")
        _require(self.window >= 0, f"window is {self.window}; expected 0 or more")
        _require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads is {self.n_heads} and n_kv_heads {self.n_kv_heads}; the first must be a multiple of the second",
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE needs an even number")

    @property
    def cache_width(self) -> int:
        """Numbers cached a token and slot: rotated keys, then values."""
        return 2 * self.n_kv_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        return self.head_dim


class DenseConfig(msgspec.Struct, frozen=True, tag="dense", tag_field="kind", forbid_unknown_fields=True):
    """SwiGLU feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x)) over hidden_dim channels. bias: all three add one."""

    hidden_dim: int
    bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "hidden_dim")


SCORINGS = ("softmax", "sigmoid")


class RoutingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which experts a token goes to, and with what weight. The router's bias takes part in the choice only (arXiv 2408.15664).

    scoring: what an expert is weighed by: "softmax" of the logits, those that the bias is added to for the choice, or "sigmoid"
    (DeepSeek-V3, arXiv 2412.19437), that the bias is added to. normalized: weights of the chosen are divided by their sum. scale:
    of the weights. n_groups: equal runs of experts, of which top_k_groups may be chosen from (DeepSeek-V2, arXiv 2405.04434): those
    with the largest sum of their best group_top_k.
    """

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True
    scale: float = 1.0
    n_groups: int = 1
    top_k_groups: int = 1
    group_top_k: int = 1

    def __post_init__(self) -> None:
        _require_positive(self, "n_groups", "top_k_groups", "group_top_k")
        _require(self.scale > 0, f"the scale of the routed experts is {self.scale}; expected a number above 0")
        _require(
            self.top_k_groups <= self.n_groups,
            f"top_k_groups is {self.top_k_groups} but there are only {self.n_groups} groups; lower topk_group",
        )

    @property
    def attributes(self) -> dict[str, int | float]:
        """The same as numbers: attributes of the operator MixtureOfExperts, in their order."""
        return {
            "scoring": SCORINGS.index(self.scoring),
            "normalized": int(self.normalized),
            "scale": self.scale,
            "n_groups": self.n_groups,
            "top_k_groups": self.top_k_groups,
            "group_top_k": self.group_top_k,
        }

    def check(self, n_experts: int, top_k: int) -> None:
        """Raises ConfigError where so many experts cannot be grouped, or so many not be chosen."""
        _require(
            top_k <= n_experts, f"top_k is {top_k} but there are only {n_experts} experts; lower n_experts_per_tok"
        )
        _require(
            n_experts % self.n_groups == 0,
            f"n_experts is {n_experts} and n_groups {self.n_groups}; the first must be a multiple of the second",
        )
        group = n_experts // self.n_groups
        _require(
            self.group_top_k <= group,
            f"a group is ranked by its best {self.group_top_k} experts, but holds {group}; lower n_group",
        )
        _require(
            top_k <= self.top_k_groups * group,
            f"top_k is {top_k}, but the {self.top_k_groups} groups chosen from hold {self.top_k_groups * group} experts; lower "
            "num_experts_per_tok or raise topk_group",
        )


class MixtureOfExpertsConfig(msgspec.Struct, frozen=True, tag="moe", tag_field="kind", forbid_unknown_fields=True):
    """Routed SwiGLU experts (arXiv 2401.06066), top_k of n_experts a token, plus shared ones that see every token.

    expert_dim: hidden channels of an expert. n_shared_experts: shared ones of that size (a wider one is the sum of several, over
    their channels). routing: how the routed ones are chosen and weighed.
    """

    n_experts: int
    top_k: int
    expert_dim: int
    n_shared_experts: int = 0
    routing: RoutingConfig = RoutingConfig()

    def __post_init__(self) -> None:
        _require_positive(self, "n_experts", "top_k", "expert_dim")
        _require(self.n_shared_experts >= 0, f"n_shared_experts is {self.n_shared_experts}; expected 0 or more")
        self.routing.check(self.n_experts, self.top_k)


AttentionConfig = LatentAttentionConfig | GroupedQueryAttentionConfig
FeedForwardConfig = DenseConfig | MixtureOfExpertsConfig


class LayerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pre-norm transformer layer."""

    attention: AttentionConfig
    feed_forward: FeedForwardConfig


class LoopConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What surrounds the looped layers: h = A·h + B·e + Block(h, e), a loop signal, a LoRA a loop, halting.

    trained_loops: the depth trained with, default at run time. signal_dim: leading channels that carry the loop's index.
    signal_theta: base of its frequencies. lora_rank: rank of the depth-wise LoRA (arXiv 2410.20672).
    act_threshold: cumulative halting probability at which a token stops (ACT, arXiv 1603.08983).
    """

    trained_loops: int
    signal_dim: int
    lora_rank: int
    act_threshold: float
    signal_theta: float = 10000.0

    def __post_init__(self) -> None:
        _require_positive(self, "trained_loops", "lora_rank")
        _require(self.signal_dim >= 0, f"signal_dim is {self.signal_dim}; expected 0 or more channels")
        _require(self.act_threshold > 0, f"act_threshold is {self.act_threshold}; expected a number above 0")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A whole model. See the module's text for the three groups of layers.

    max_seq_len: positions the RoPE tables cover. rope_theta: base of RoPE (arXiv 2104.09864). norm_eps: epsilon of RMSNorm.
    tie_embeddings: the head reads the embedding's matrix. Raises ConfigError where fields contradict each other.
    """

    vocab_size: int
    dim: int
    max_seq_len: int
    prelude: tuple[LayerConfig, ...]
    coda: tuple[LayerConfig, ...]
    loop_layers: tuple[LayerConfig, ...] = ()
    loop: LoopConfig | None = None
    rope_theta: float = 500000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "dim", "max_seq_len")
        _require(bool(self.layers), "the model has no layers")
        _require(
            bool(self.loop_layers) == (self.loop is not None),
            "a looped model needs both `loop` and `loop_layers`, one without a loop neither",
        )
        for what in ("cache_width", "rope_dim"):
            values = sorted({getattr(layer.attention, what) for layer in self.layers})
            _require(len(values) == 1, f"all layers must share one {what}; found {values}")
        if self.loop is not None:
            _require(
                self.loop.signal_dim <= self.dim,
                f"loop.signal_dim is {self.loop.signal_dim}, more than dim {self.dim}",
            )

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self.prelude + self.loop_layers + self.coda

    @property
    def cache_width(self) -> int:
        return self.layers[0].attention.cache_width

    @property
    def rope_dim(self) -> int:
        return self.layers[0].attention.rope_dim

    @property
    def window(self) -> int:
        """Positions that are seen by the layer that sees most, itself included; 0 where one sees all."""
        windows = [getattr(layer.attention, "window", 0) for layer in self.layers]
        return max(windows) if all(windows) else 0

    def slots(self, n_loops: int) -> int:
        """Cache slots of a sequence that runs n_loops loops."""
        return len(self.prelude) + n_loops * len(self.loop_layers) + len(self.coda)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as the manifest holds them."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> ModelConfig:
        """The inverse of to_dict. Raises ConfigError with the path of the field that does not fit."""
        try:
            return msgspec.convert(plain, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"the model description does not fit: {error}") from error
