"""What decoders of Hugging Face checkpoints with grouped-query attention have in common: config.json, names, RoPE layout.

Their RoPE pairs stand half a head apart already, as ours do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from mythos_export.config import ConfigError, FeedForwardConfig, GroupedQueryAttentionConfig, LayerConfig, ModelConfig
from mythos_export.families import rope
from mythos_export.families.family import Family, Get, Pack


class _Defaults(NamedTuple):
    """What config.json may leave out, where architectures differ in it; transformers' configuration classes."""

    num_key_value_heads: int | None = None  # the query heads'
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    windowed: bool = False  # attention has a window unless config.json says that it has none


_DEFAULTS = {
    "MistralForCausalLM": _Defaults(num_key_value_heads=8, windowed=True),
    "MixtralForCausalLM": _Defaults(num_key_value_heads=8, rope_theta=1_000_000.0, rms_norm_eps=1e-5),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ACTIVATIONS = ("silu", "swish")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of config.json that change what is computed; others are not read."""

    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    sliding_window: int | msgspec.UnsetType | None = msgspec.UNSET
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise ConfigError(f'hidden_act is "{self.hidden_act}"; expected "silu"')
        for name in ("attention_bias", "mlp_bias"):
            if getattr(self, name):
                raise ConfigError(f"{name} is true; matrices with biases are not supported")
        if self.quantization_config is not None:
            raise ConfigError(
                "quantization_config: the checkpoint is quantized already; export the float one and use `mythos-export quantize`"
            )
        if self.sliding_window is msgspec.UNSET and self._defaults.windowed:
            raise ConfigError("sliding_window is missing; expected a number of tokens, or null for none")
        if self.num_attention_heads < 1:
            raise ConfigError(f"num_attention_heads is {self.num_attention_heads}; expected at least 1")

    @property
    def _defaults(self) -> _Defaults:
        return _DEFAULTS.get(self.architectures[0], _Defaults())

    @property
    def epsilon(self) -> float:
        """Of the norms."""
        return self._defaults.rms_norm_eps if self.rms_norm_eps is None else self.rms_norm_eps

    @property
    def window(self) -> int:
        """Positions a token sees, itself included; 0 for all."""
        return self.sliding_window if isinstance(self.sliding_window, int) else 0

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key and value heads, size of each."""
        n_heads = self.num_attention_heads
        return (
            n_heads,
            self.num_key_value_heads or self._defaults.num_key_value_heads or n_heads,
            self.head_dim or self.hidden_size // n_heads,
        )

    @property
    def theta(self) -> float:
        """Base of RoPE's frequencies."""
        return float((self.rope_parameters or {}).get("rope_theta", self.rope_theta or self._defaults.rope_theta))

    @property
    def scaling(self) -> rope.RopeScaling:
        """Raises ConfigError for one that is not known."""
        fields = dict(self.rope_parameters or self.rope_scaling or {})
        fields.setdefault("rope_type", fields.get("type", "default"))
        try:
            return msgspec.convert(fields, rope.RopeScaling)
        except msgspec.ValidationError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from error
            raise ConfigError(f"rope scaling {fields}: {error}") from error


def model_config(settings: Settings, feed_forward: FeedForwardConfig) -> ModelConfig:
    """A model of plain layers, all alike."""
    layer = LayerConfig(GroupedQueryAttentionConfig(*settings.heads, settings.window), feed_forward)
    settings.scaling  # noqa: B018 (refused here, before any work)
    return ModelConfig(
        vocab_size=settings.vocab_size,
        dim=settings.hidden_size,
        max_seq_len=settings.max_position_embeddings,
        prelude=(layer,) * settings.num_hidden_layers,
        coda=(),
        rope_theta=settings.theta,
        norm_eps=settings.epsilon,
        tie_embeddings=settings.tie_word_embeddings,
    )


def tensor_shapes(settings: Settings, feed_forward: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes; feed_forward: of a layer's feed-forward, below model.layers.N."""
    dim, (n_heads, n_kv_heads, head_dim) = settings.hidden_size, settings.heads
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (dim,),
        "self_attn.q_proj.weight": (n_heads * head_dim, dim),
        "self_attn.k_proj.weight": (n_kv_heads * head_dim, dim),
        "self_attn.v_proj.weight": (n_kv_heads * head_dim, dim),
        "self_attn.o_proj.weight": (dim, n_heads * head_dim),
        "post_attention_layernorm.weight": (dim,),
        **feed_forward,
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (settings.vocab_size, dim)}
    for index in range(settings.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (dim,), HEAD: (settings.vocab_size, dim)}


def pack(settings: Settings, get: Get) -> dict[str, Pack]:
    """Everything but the feed-forwards' matrices."""
    dim = settings.heads[2]

    def table(part: int) -> Iterator[Tensor]:
        yield rope.tables(settings.max_position_embeddings, dim, settings.theta, settings.scaling)[part]

    packs: dict[str, Pack] = {
        "embed": lambda: iter([get(EMBEDDING)]),
        "rope_cos": lambda: table(0),
        "rope_sin": lambda: table(1),
        "norm": lambda: iter([get("model.norm.weight")]),
    }
    if not settings.tie_word_embeddings:
        packs["head"] = lambda: iter([get(HEAD)])
    for index in range(settings.num_hidden_layers):
        packs |= _pack_layer(get, f"model.layers.{index}.", f"prelude.{index}.")
    return packs


def _pack_layer(get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    def qkv() -> Iterator[Tensor]:
        for name in "qkv":
            yield get(f"{theirs}self_attn.{name}_proj.weight")

    return {
        f"{ours}attn.qkv.norm": lambda: iter([get(f"{theirs}input_layernorm.weight")]),
        f"{ours}attn.qkv.weight": qkv,
        f"{ours}attn.out.weight": lambda: iter([get(f"{theirs}self_attn.o_proj.weight")]),
        f"{ours}ffn.norm": lambda: iter([get(f"{theirs}post_attention_layernorm.weight")]),
    }


def joined(get: Get, *names: str) -> Pack:
    """Matrices one below another."""
    return lambda: (get(name) for name in names)


def zeros(*shape: int) -> Pack:
    """What a family's checkpoints have none of."""
    return lambda: iter([torch.zeros(*shape)])


def family(**own: Any) -> Family:
    """A family of such checkpoints: what is its own, and what they have in common."""
    return Family(ignored=_ignored, tied=_tied, random_moments=_random_moments, **own)


def _ignored(name: str) -> bool:
    """RoPE's frequencies, which older checkpoints store."""
    return name.endswith("rotary_emb.inv_freq")


def _tied(settings: Settings) -> tuple[str, str] | None:
    """Head and embedding."""
    return (HEAD, EMBEDDING) if settings.tie_word_embeddings else None


def _random_moments(name: str) -> tuple[float, float]:
    """Norms are 1, matrices as these models begin their training."""
    return (1.0, 0.0) if name.endswith("norm.weight") else (0.0, 0.02)
