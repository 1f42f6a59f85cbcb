"""Checkpoints of DeepseekV2ForCausalLM and DeepseekV3ForCausalLM: latent attention and, after the first layers, mixtures of experts
with shared ones (arXiv 2405.04434, 2412.19437).

RoPE pairs are neighbours (2i, 2i+1), in V3 unless rope_interleave is false, and move to half a head apart. YaRN's correction of
the scores is theirs alone: mscale_all_dim counts in the scores, what mscale has beyond it in the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor

from mythos_export.config import (
    ConfigError,
    DenseConfig,
    LatentAttentionConfig,
    LayerConfig,
    MixtureOfExpertsConfig,
    ModelConfig,
    RoutingConfig,
)
from mythos_export.families import hugging_face, parts, rope
from mythos_export.families.family import Get, Pack
from mythos_export.families.hugging_face import Shapes, linear_shapes

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
_LATENT_EPSILON = 1e-6  # of the norms of latents, whatever rms_norm_eps is
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class _Version(NamedTuple):
    """What the two differ in: values of what config.json leaves out, as transformers has them, and how experts are chosen."""

    scoring_func: str
    topk_methods: dict[str, int]  # by name: how many of its best experts rank a group, 0 where there are no groups
    n_shared_experts: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    n_group: int | None
    topk_group: int | None
    num_nextn_predict_layers: int


_VERSIONS = {
    V2: _Version("softmax", {"greedy": 0, "group_limited_greedy": 1}, 2, 0, 1.0, False, None, None, 0),
    V3: _Version("sigmoid", {"noaux_tc": 2}, 1, 3, 2.5, True, 8, 4, 1),
}


class Settings(hugging_face.Settings, frozen=True, kw_only=True):
    """The fields of DeepseekV2Config and DeepseekV3Config that change what is computed."""

    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | msgspec.UnsetType | None = msgspec.UNSET
    n_shared_experts: int | None = None
    first_k_dense_replace: int | None = None
    moe_layer_freq: int = 1
    routed_scaling_factor: float | None = None
    norm_topk_prob: bool | None = None
    scoring_func: str | None = None
    topk_method: str | None = None
    n_group: int | None = None
    topk_group: int | None = None
    rope_interleave: bool | None = None
    num_nextn_predict_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        version = self.version
        if self.q_lora_rank is msgspec.UNSET:
            raise ConfigError("q_lora_rank is missing; expected a number, or null for queries without a latent")
        if self.scoring_func not in (None, version.scoring_func):
            raise ConfigError(
                f'scoring_func is "{self.scoring_func}"; expected "{version.scoring_func}" of {self.architectures[0]}'
            )
        if self.topk_method not in (None, *version.topk_methods):
            known = '" or "'.join(version.topk_methods)
            raise ConfigError(f'topk_method is "{self.topk_method}"; expected "{known}" of {self.architectures[0]}')
        if version.scoring_func == "softmax" and self.norm_topk_prob:
            raise ConfigError(
                "norm_topk_prob is true; expected false: transformers and DeepSeek's own code differ in what it means for "
                f"{self.architectures[0]}"
            )
        if self.moe_layer_freq < 1:
            raise ConfigError(f"moe_layer_freq is {self.moe_layer_freq}; expected at least 1")

    @property
    def version(self) -> _Version:
        return _VERSIONS[self.architectures[0]]

    def value(self, name: str) -> Any:
        """A field, or what it is where config.json leaves it out."""
        found = getattr(self, name)
        return getattr(self.version, name) if found is None else found

    @property
    def query_rank(self) -> int:
        """Width of the query's latent; 0 where there is none."""
        return self.q_lora_rank if isinstance(self.q_lora_rank, int) else 0

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim

    def rotated(self, rows: Tensor) -> Tensor:
        """Output channels [n * qk_rope_head_dim, ...] with RoPE pairs half a head apart."""
        return (
            rows if self.rope_interleave is False and self.architectures[0] == V3 else parts.halves(rows, self.rope_dim)
        )

    @property
    def routing(self) -> RoutingConfig:
        version = self.version
        ranks = version.topk_methods[self.topk_method or next(iter(version.topk_methods))]
        groups = (1, 1, 1)
        if ranks:
            n_group, topk_group = self.value("n_group"), self.value("topk_group")
            if n_group is None or topk_group is None:
                raise ConfigError(f'n_group or topk_group is missing, which topk_method "{self.topk_method}" needs')
            groups = (n_group, topk_group, ranks)
        scoring, normalized = version.scoring_func, self.value("norm_topk_prob")
        return RoutingConfig(scoring, normalized, self.value("routed_scaling_factor"), *groups)  # type: ignore[arg-type]

    @property
    def is_mixture(self) -> list[bool]:
        """Of every layer, whether its feed-forward is a mixture of experts."""
        first, every = self.value("first_k_dense_replace"), self.moe_layer_freq
        return [index >= first and index % every == 0 for index in range(self.num_hidden_layers)]


_YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
_HEADS: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
VARIANTS = {
    "deepseek_v2_lite": Settings(
        architectures=(V2,), vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, n_routed_experts=64, num_experts_per_tok=6, first_k_dense_replace=1,
        q_lora_rank=None, max_position_embeddings=163840, rope_scaling={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        **_HEADS,
    ),
    "deepseek_v3": Settings(
        architectures=(V3,), vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, q_lora_rank=1536,
        max_position_embeddings=163840, rope_scaling={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, **_HEADS,
    ),
}  # fmt: skip


def model_config(settings: Settings) -> ModelConfig:
    attention = LatentAttentionConfig(
        settings.num_attention_heads,
        settings.query_rank,
        settings.kv_lora_rank,
        settings.qk_nope_head_dim,
        settings.qk_rope_head_dim,
        settings.v_head_dim,
        down_bias=settings.attention_bias,
        out_bias=settings.attention_bias,
        score_factor=rope.score_factor(settings.scaling),
        norm_eps=_LATENT_EPSILON,
    )
    experts = MixtureOfExpertsConfig(
        settings.n_routed_experts,
        settings.num_experts_per_tok,
        settings.moe_intermediate_size,
        settings.value("n_shared_experts"),
        settings.routing,
    )
    dense = DenseConfig(settings.intermediate_size)
    layers = [LayerConfig(attention, experts if mixture else dense) for mixture in settings.is_mixture]
    return hugging_face.model_config(settings, layers)


def tensor_shapes(settings: Settings) -> Shapes:
    attention, experts = _attention_shapes(settings), _expert_shapes(settings)
    dense = hugging_face.swiglu_shapes("mlp.", settings.hidden_size, settings.intermediate_size)
    layers = [attention | (experts if mixture else dense) for mixture in settings.is_mixture]
    return hugging_face.tensor_shapes(settings, layers)


def _attention_shapes(settings: Settings) -> Shapes:
    dim, n_heads, rank, bias = (
        settings.hidden_size,
        settings.num_attention_heads,
        settings.kv_lora_rank,
        settings.attention_bias,
    )
    nope, queries, prefix = settings.qk_nope_head_dim, settings.query_rank, "self_attn."
    width = n_heads * (nope + settings.rope_dim)
    if queries:
        shapes = linear_shapes(f"{prefix}q_a_proj.", queries, dim, bias) | {f"{prefix}q_a_layernorm.weight": (queries,)}
        shapes |= linear_shapes(f"{prefix}q_b_proj.", width, queries, False)
    else:
        shapes = linear_shapes(f"{prefix}q_proj.", width, dim, False)
    shapes |= linear_shapes(f"{prefix}kv_a_proj_with_mqa.", rank + settings.rope_dim, dim, bias)
    shapes |= {f"{prefix}kv_a_layernorm.weight": (rank,)}
    shapes |= linear_shapes(f"{prefix}kv_b_proj.", n_heads * (nope + settings.v_head_dim), rank, False)
    return shapes | linear_shapes(f"{prefix}o_proj.", dim, n_heads * settings.v_head_dim, bias)


def _expert_shapes(settings: Settings) -> Shapes:
    dim, width, shared = settings.hidden_size, settings.moe_intermediate_size, settings.value("n_shared_experts")
    shapes: Shapes = {"mlp.gate.weight": (settings.n_routed_experts, dim)}
    if settings.architectures[0] == V3:
        shapes["mlp.gate.e_score_correction_bias"] = (settings.n_routed_experts,)
    for expert in range(settings.n_routed_experts):
        shapes |= hugging_face.swiglu_shapes(f"mlp.experts.{expert}.", dim, width)
    return shapes | (hugging_face.swiglu_shapes("mlp.shared_experts.", dim, width * shared) if shared else {})


def pack(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    packs = hugging_face.pack(settings, get)
    for index, mixture in enumerate(settings.is_mixture):
        theirs, ours = f"model.layers.{index}.", f"prelude.{index}."
        packs |= _pack_attention(settings, get, f"{theirs}self_attn.", f"{ours}attn.")
        packs[f"{ours}attn.down.norm"] = parts.joined(get, f"{theirs}input_layernorm.weight")
        if mixture:
            packs[f"{ours}ffn.norm"] = parts.joined(get, f"{theirs}post_attention_layernorm.weight")
            packs |= _pack_experts(settings, get, f"{theirs}mlp.", f"{ours}ffn.")
        else:
            packs |= hugging_face.pack_swiglu(settings, get, index)
    return packs


def _pack_attention(settings: Settings, get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    nope, rank, n_heads = settings.qk_nope_head_dim, settings.kv_lora_rank, settings.num_attention_heads

    def queries(name: str) -> Tensor:
        heads = get(theirs + name).unflatten(0, (n_heads, -1))
        rotated = settings.rotated(heads[:, nope:].flatten(0, 1)).unflatten(0, (n_heads, -1))
        return torch.cat([heads[:, :nope], rotated], 1).flatten(0, 1)

    def down(kind: str) -> Callable[[], Iterator[Tensor]]:
        def pieces() -> Iterator[Tensor]:
            kv = get(f"{theirs}kv_a_proj_with_mqa.{kind}")
            if settings.query_rank:
                yield get(f"{theirs}q_a_proj.{kind}")
            elif kind == "weight":
                yield queries("q_proj.weight")
            else:
                yield torch.zeros(
                    n_heads * (nope + settings.rope_dim)
                )  # transformers gives queries without a latent none
            yield from (kv[:rank], settings.rotated(kv[rank:]))

        return pieces

    packs: dict[str, Pack] = {
        f"{ours}kv_norm": parts.joined(get, f"{theirs}kv_a_layernorm.weight"),
        **parts.up_projections(get, f"{theirs}kv_b_proj.weight", n_heads, nope, ours),
    }
    for kind in ("weight", "bias") if settings.attention_bias else ("weight",):
        packs |= {f"{ours}down.{kind}": down(kind), f"{ours}out.{kind}": parts.joined(get, f"{theirs}o_proj.{kind}")}
    if settings.query_rank:
        packs[f"{ours}q_up.norm"] = parts.joined(get, f"{theirs}q_a_layernorm.weight")
        packs[f"{ours}q_up.weight"] = lambda: iter([queries("q_b_proj.weight")])
    return packs


def _pack_experts(settings: Settings, get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    n_experts, bias = settings.n_routed_experts, f"{theirs}gate.e_score_correction_bias"
    names = [f"{theirs}experts.{index}." for index in range(n_experts)]
    names += [f"{theirs}shared_experts."] if settings.value("n_shared_experts") else []
    matrices = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    return {
        f"{ours}router": parts.joined(get, f"{theirs}gate.weight"),
        f"{ours}router_bias": parts.joined(get, bias) if settings.architectures[0] == V3 else parts.zeros(n_experts),
        **parts.experts(get, names, matrices, settings.moe_intermediate_size, ours),
    }


def _leftover(settings: Settings, name: str) -> bool:
    """Also the layers after the last that predict tokens further ahead (V3's multi-token prediction)."""
    layer = _LAYER.match(name)
    beyond = int(layer[1]) - settings.num_hidden_layers if layer else -1
    return 0 <= beyond < settings.value("num_nextn_predict_layers") or hugging_face.leftover(settings, name)


FAMILY = hugging_face.family(
    name="deepseek",
    architectures=(V2, V3),
    settings=Settings,
    model_config=model_config,
    tensor_shapes=tensor_shapes,
    pack=pack,
    variants=VARIANTS,
    leftover=_leftover,
)
