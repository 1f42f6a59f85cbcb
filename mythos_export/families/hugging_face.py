"""What decoders of Hugging Face checkpoints have in common: config.json, names, and, for those that have them, dense layers and
grouped-query attention (its RoPE pairs stand half a head apart already, as ours do).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from mythos_export.config import ConfigError, GroupedQueryAttentionConfig, LayerConfig, ModelConfig
from mythos_export.families import rope
from mythos_export.families.family import Family, Get, Pack
from mythos_export.families.parts import joined


class _Defaults(NamedTuple):
    """What config.json may leave out, where architectures differ in it; transformers' configuration classes."""

    num_key_value_heads: int | None = None  # the query heads'
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    windowed: bool = False  # attention has a window unless config.json says that it has none
    biases: tuple[str, ...] = ()  # which config.json may ask for


_DEFAULTS = {
    "LlamaForCausalLM": _Defaults(biases=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": _Defaults(num_key_value_heads=8, windowed=True),
    "MixtralForCausalLM": _Defaults(num_key_value_heads=8, rope_theta=1_000_000.0, rms_norm_eps=1e-5),
    "DeepseekV2ForCausalLM": _Defaults(biases=("attention_bias",)),
    "DeepseekV3ForCausalLM": _Defaults(biases=("attention_bias",)),
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ACTIVATIONS = ("silu", "swish")
_OF_ROUTER = re.compile(r"\.(mlp|block_sparse_moe)\.(gate|router)\.")
Shapes = dict[str, tuple[int, ...]]  # of tensors, by name


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
            if getattr(self, name) and name not in self._defaults.biases:
                raise ConfigError(
                    f"{name} is true; expected false: biases are not supported in {self.architectures[0]}"
                )
        if self.quantization_config is not None and self.scaled_blocks is None:
            raise ConfigError(
                "quantization_config: the checkpoint is quantized already; export the float one and use `mythos-export quantize`. "
                "Of quantized ones, float8 with a scale a block (quant_method fp8, weight_block_size) is read"
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
    def rope_dim(self) -> int:
        """Rotated numbers of a head."""
        return self.heads[2]

    @property
    def scaled_blocks(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks that have a scale each, of matrices stored as float8; None where they are not."""
        block = (self.quantization_config or {}).get("weight_block_size")
        if (self.quantization_config or {}).get("quant_method") != "fp8" or not isinstance(block, list):
            return None
        sizes = tuple(size for size in block if isinstance(size, int) and size > 0)
        return (sizes[0], sizes[1]) if len(sizes) == len(block) == 2 else None

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


def attention(settings: Settings) -> GroupedQueryAttentionConfig:
    bias = settings.attention_bias
    return GroupedQueryAttentionConfig(*settings.heads, settings.window, qkv_bias=bias, out_bias=bias)


def model_config(settings: Settings, layers: Sequence[LayerConfig]) -> ModelConfig:
    """A model of these layers."""
    settings.scaling  # noqa: B018 (refused here, before any work)
    return ModelConfig(
        vocab_size=settings.vocab_size,
        dim=settings.hidden_size,
        max_seq_len=settings.max_position_embeddings,
        prelude=tuple(layers),
        coda=(),
        rope_theta=settings.theta,
        norm_eps=settings.epsilon,
        tie_embeddings=settings.tie_word_embeddings,
    )


def tensor_shapes(settings: Settings, layers: Sequence[Shapes]) -> Shapes:
    """Names and shapes of everything; layers: of each layer's attention and feed-forward, below model.layers.N."""
    dim = settings.hidden_size
    norms: Shapes = {"input_layernorm.weight": (dim,), "post_attention_layernorm.weight": (dim,)}
    shapes: Shapes = {EMBEDDING: (settings.vocab_size, dim)}
    for index, layer in enumerate(layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in (norms | layer).items()}
    return shapes | {"model.norm.weight": (dim,), HEAD: (settings.vocab_size, dim)}


def attention_shapes(settings: Settings) -> Shapes:
    dim, (n_heads, n_kv_heads, head_dim) = settings.hidden_size, settings.heads
    shapes: Shapes = {}
    for name, heads in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads)):
        shapes |= linear_shapes(f"self_attn.{name}_proj.", heads * head_dim, dim, settings.attention_bias)
    return shapes | linear_shapes("self_attn.o_proj.", dim, n_heads * head_dim, settings.attention_bias)


def swiglu_shapes(prefix: str, dim: int, hidden: int, bias: bool = False) -> Shapes:
    shapes = linear_shapes(f"{prefix}gate_proj.", hidden, dim, bias)
    shapes |= linear_shapes(f"{prefix}up_proj.", hidden, dim, bias)
    return shapes | linear_shapes(f"{prefix}down_proj.", dim, hidden, bias)


def linear_shapes(prefix: str, n_out: int, n_in: int, bias: bool) -> Shapes:
    return {f"{prefix}weight": (n_out, n_in)} | ({f"{prefix}bias": (n_out,)} if bias else {})


def pack(settings: Settings, get: Get) -> dict[str, Pack]:
    """What stands before and after the layers."""

    def table(part: int) -> Iterator[Tensor]:
        positions, dim = settings.max_position_embeddings, settings.rope_dim
        yield rope.tables(positions, dim, settings.theta, settings.scaling)[part]

    packs: dict[str, Pack] = {
        "embed": joined(get, EMBEDDING),
        "rope_cos": lambda: table(0),
        "rope_sin": lambda: table(1),
        "norm": joined(get, "model.norm.weight"),
    }
    return packs if settings.tie_word_embeddings else packs | {"head": joined(get, HEAD)}


def pack_attention(settings: Settings, get: Get, index: int) -> dict[str, Pack]:
    theirs, ours = f"model.layers.{index}.", f"prelude.{index}.attn."
    packs = {f"{ours}qkv.norm": joined(get, f"{theirs}input_layernorm.weight")}
    for kind in ("weight", "bias") if settings.attention_bias else ("weight",):
        packs[f"{ours}qkv.{kind}"] = joined(get, *(f"{theirs}self_attn.{name}_proj.{kind}" for name in "qkv"))
        packs[f"{ours}out.{kind}"] = joined(get, f"{theirs}self_attn.o_proj.{kind}")
    return packs


def pack_swiglu(settings: Settings, get: Get, index: int) -> dict[str, Pack]:
    """A dense layer's feed-forward with its norm."""
    theirs, ours = f"model.layers.{index}.", f"prelude.{index}.ffn."
    norm = joined(get, f"{theirs}post_attention_layernorm.weight")

    def matrices(kind: str, suffix: str) -> dict[str, Pack]:
        gate, up, down = (f"{theirs}mlp.{name}_proj.{kind}" for name in ("gate", "up", "down"))
        return {f"{ours}gate_up{suffix}": joined(get, gate, up), f"{ours}down{suffix}": joined(get, down)}

    if settings.mlp_bias:
        return {f"{ours}gate_up.norm": norm} | matrices("weight", ".weight") | matrices("bias", ".bias")
    return {f"{ours}norm": norm} | matrices("weight", "")


def family(**own: Any) -> Family:
    """A family of such checkpoints: what is its own, and what they have in common."""
    common = {"ignored": _ignored, "leftover": leftover, "tied": _tied, "random_moments": _random_moments}
    return Family(**{**common, **own})


def _ignored(name: str) -> bool:
    """RoPE's frequencies, which older checkpoints store."""
    return name.endswith("rotary_emb.inv_freq")


def leftover(settings: Settings, name: str) -> bool:
    """What training keeps beside a router, as counts of its choices are: neither its matrix nor a bias."""
    return bool(_OF_ROUTER.search(name)) and not name.endswith((".weight", "bias"))


def _tied(settings: Settings) -> tuple[str, str] | None:
    """Head and embedding."""
    return (HEAD, EMBEDDING) if settings.tie_word_embeddings else None


def _random_moments(name: str) -> tuple[float, float]:
    """Norms are 1, matrices as these models begin their training, biases of routers and layers alike, so that they count."""
    return (1.0, 0.0) if name.endswith("norm.weight") else (0.0, 0.02)
