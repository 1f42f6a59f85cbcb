"""Checkpoints of the reference package open-mythos (0.5): its config, its tensor names, and how they become ours.

What changes on the way: projections that read the same input are joined; RoPE pairs
move from neighbours (2i, 2i+1) to half a head apart (i, i+h), in queries and keys alike, so scores stay the same; kv_up is
split into its key and value part; experts are packed; what depends on the loop alone becomes a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from mythos_export.config import (
    AttentionConfig,
    ConfigError,
    DenseConfig,
    GroupedQueryAttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    LoopConfig,
    MixtureOfExpertsConfig,
    ModelConfig,
)
from mythos_export.families import parts, rope
from mythos_export.families.family import Family, Get, Pack

# The one class a training checkpoint's pickle may name besides tensors.
CONFIG_CLASS = "open_mythos.main.MythosConfig"
# RoPE tables are stored as complex buffers; ours are computed, at the positions the config names.
IGNORED_TENSORS = frozenset({"freqs_cis", "freqs_cis_mla"})
TIED = ("head.weight", "embed.weight")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """MythosConfig, field by field, with the reference's defaults."""

    vocab_size: int = 32000
    dim: int = 2048
    n_heads: int = 16
    n_kv_heads: int = 4
    max_seq_len: int = 4096
    max_loop_iters: int = 16
    prelude_layers: int = 2
    coda_layers: int = 2
    attn_type: str = "mla"
    kv_lora_rank: int = 512
    q_lora_rank: int = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    n_experts: int = 64
    n_shared_experts: int = 2
    n_experts_per_tok: int = 4
    expert_dim: int = 512
    act_threshold: float = 0.99
    rope_theta: float = 500000.0
    lora_rank: int = 16
    max_output_tokens: int = 4096
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.attn_type not in ("mla", "gqa"):
            raise ConfigError(f'attn_type is "{self.attn_type}"; expected "mla" or "gqa"')
        for name in ("prelude_layers", "coda_layers", "n_shared_experts"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.n_heads < 1 or self.dim < 1:
            raise ConfigError(f"n_heads is {self.n_heads} and dim {self.dim}; expected at least 1 of each")


_LONG: dict[str, Any] = {"max_seq_len": 1_000_000, "max_output_tokens": 131_072}
_HEADS_128: dict[str, Any] = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
VARIANTS: dict[str, Settings] = {
    "mythos_1b": Settings(
        dim=2048, n_heads=16, n_kv_heads=4, max_loop_iters=16, kv_lora_rank=256, q_lora_rank=512, qk_rope_head_dim=32,
        qk_nope_head_dim=64, v_head_dim=64, expert_dim=2048, lora_rank=8,
    ),
    "mythos_3b": Settings(
        dim=3072, n_heads=24, n_kv_heads=6, max_loop_iters=16, kv_lora_rank=384, q_lora_rank=768, qk_rope_head_dim=32,
        qk_nope_head_dim=96, v_head_dim=96, expert_dim=4096, lora_rank=8,
    ),
    "mythos_10b": Settings(
        dim=4096, n_heads=32, n_kv_heads=8, max_loop_iters=24, kv_lora_rank=512, q_lora_rank=1024, n_experts=128,
        expert_dim=5632, lora_rank=16, max_seq_len=8192, **_HEADS_128,
    ),
    "mythos_50b": Settings(
        dim=6144, n_heads=48, n_kv_heads=8, max_loop_iters=32, prelude_layers=3, coda_layers=3, kv_lora_rank=512,
        q_lora_rank=1536, n_experts=256, n_shared_experts=4, expert_dim=9728, lora_rank=32, max_seq_len=8192, **_HEADS_128,
    ),
    "mythos_100b": Settings(
        dim=8192, n_heads=64, n_kv_heads=8, max_loop_iters=32, prelude_layers=4, coda_layers=4, kv_lora_rank=512,
        q_lora_rank=2048, n_experts=256, n_shared_experts=4, n_experts_per_tok=8, expert_dim=13568, lora_rank=64,
        rope_theta=1_000_000.0, **_HEADS_128, **_LONG,
    ),
    "mythos_500b": Settings(
        vocab_size=100_000, dim=12288, n_heads=96, n_kv_heads=16, max_loop_iters=48, prelude_layers=4, coda_layers=4,
        kv_lora_rank=1024, q_lora_rank=3072, n_experts=512, n_shared_experts=8, n_experts_per_tok=8, expert_dim=23040,
        lora_rank=128, rope_theta=1_000_000.0, **_HEADS_128, **_LONG,
    ),
    "mythos_1t": Settings(
        vocab_size=100_000, dim=16384, n_heads=128, n_kv_heads=16, max_loop_iters=64, prelude_layers=6, coda_layers=6,
        kv_lora_rank=1024, q_lora_rank=4096, n_experts=512, n_shared_experts=8, n_experts_per_tok=8, expert_dim=34560,
        lora_rank=256, rope_theta=2_000_000.0, **_HEADS_128, **_LONG,
    ),
}  # fmt: skip


def model_config(settings: Settings) -> ModelConfig:
    """Our description of the model that these settings make. Raises ConfigError where they contradict each other."""
    attention: AttentionConfig
    if settings.attn_type == "mla":
        attention = LatentAttentionConfig(
            settings.n_heads,
            settings.q_lora_rank,
            settings.kv_lora_rank,
            settings.qk_nope_head_dim,
            settings.qk_rope_head_dim,
            settings.v_head_dim,
        )
    else:
        attention = GroupedQueryAttentionConfig(settings.n_heads, settings.n_kv_heads, settings.dim // settings.n_heads)
    plain = LayerConfig(attention, DenseConfig(settings.dim * 4 // 3))
    experts = MixtureOfExpertsConfig(
        settings.n_experts,
        settings.n_experts_per_tok,
        settings.expert_dim,
        settings.n_shared_experts * settings.n_experts_per_tok,
    )
    return ModelConfig(
        vocab_size=settings.vocab_size,
        dim=settings.dim,
        max_seq_len=settings.max_seq_len,
        prelude=(plain,) * settings.prelude_layers,
        loop_layers=(LayerConfig(attention, experts),),
        coda=(plain,) * settings.coda_layers,
        loop=LoopConfig(settings.max_loop_iters, settings.dim // 8, settings.lora_rank, settings.act_threshold),
        rope_theta=settings.rope_theta,
    )


def tensor_shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the reference's state_dict holds for these settings, RoPE tables aside."""
    dim, heads = settings.dim, settings.n_heads

    def block(prefix: str, feed_forward: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        if settings.attn_type == "mla":
            attention: dict[str, tuple[int, ...]] = {
                "q_down.weight": (settings.q_lora_rank, dim),
                "q_norm.weight": (settings.q_lora_rank,),
                "q_up_nope.weight": (heads * settings.qk_nope_head_dim, settings.q_lora_rank),
                "q_up_rope.weight": (heads * settings.qk_rope_head_dim, settings.q_lora_rank),
                "kv_down.weight": (settings.kv_lora_rank + settings.qk_rope_head_dim, dim),
                "kv_norm.weight": (settings.kv_lora_rank,),
                "kv_up.weight": (heads * (settings.qk_nope_head_dim + settings.v_head_dim), settings.kv_lora_rank),
                "wo.weight": (dim, heads * settings.v_head_dim),
            }
        else:
            head = dim // heads
            attention = {
                "wq.weight": (heads * head, dim),
                "wk.weight": (settings.n_kv_heads * head, dim),
                "wv.weight": (settings.n_kv_heads * head, dim),
                "wo.weight": (dim, heads * head),
            }
        parts: dict[str, tuple[int, ...]] = {"attn_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
        parts |= {f"attn.{name}": shape for name, shape in attention.items()}
        parts |= {f"ffn.{name}": shape for name, shape in feed_forward.items()}
        return {f"{prefix}.{name}": shape for name, shape in parts.items()}

    def expert(prefix: str, hidden: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}gate.weight": (hidden, dim),
            f"{prefix}up.weight": (hidden, dim),
            f"{prefix}down.weight": (dim, hidden),
        }

    experts: dict[str, tuple[int, ...]] = {
        "router.weight": (settings.n_experts, dim),
        "router_bias": (settings.n_experts,),
    }
    for index in range(settings.n_experts):
        experts |= expert(f"routed_experts.{index}.", settings.expert_dim)
    for index in range(settings.n_shared_experts):
        experts |= expert(f"shared_experts.{index}.", settings.expert_dim * settings.n_experts_per_tok)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (settings.vocab_size, dim)}
    for group, count in (("prelude", settings.prelude_layers), ("coda", settings.coda_layers)):
        for index in range(count):
            shapes |= block(f"{group}.{index}", expert("", dim * 4 // 3))
    shapes |= block("recurrent.block", experts)
    return shapes | {
        "recurrent.injection.log_A": (dim,),
        "recurrent.injection.log_dt": (1,),
        "recurrent.injection.B": (dim,),
        "recurrent.act.halt.weight": (1, dim),
        "recurrent.act.halt.bias": (1,),
        "recurrent.lora.down.weight": (settings.lora_rank, dim),
        "recurrent.lora.B": (settings.lora_rank, dim),
        "recurrent.lora.scale.weight": (settings.max_loop_iters, settings.lora_rank),
        "recurrent.norm.weight": (dim,),
        "norm.weight": (dim,),
        "head.weight": (settings.vocab_size, dim),
    }


def pack(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    config = model_config(settings)

    def table(part: int) -> Iterator[Tensor]:
        yield rope.tables(config.max_seq_len, config.rope_dim, config.rope_theta)[part]

    packs: dict[str, Pack] = {
        "embed": lambda: iter([get("embed.weight")]),
        "rope_cos": lambda: table(0),
        "rope_sin": lambda: table(1),
        "norm": lambda: iter([get("norm.weight")]),
    }
    for group in ("prelude", "coda"):
        for index in range(len(getattr(config, group))):
            packs |= _pack_block(settings, get, f"{group}.{index}", f"{group}.{index}")
            packs |= _pack_dense(get, f"{group}.{index}.ffn", f"{group}.{index}.ffn")
    packs |= _pack_block(settings, get, "recurrent.block", "recurrent.layers.0")
    packs |= _pack_experts(settings, get, "recurrent.block.ffn", "recurrent.layers.0.ffn")
    return packs | _pack_loop(settings, get, max_loops)


def _pack_block(settings: Settings, get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    attn = f"{theirs}.attn."
    packs: dict[str, Pack] = {
        f"{ours}.attn.{'qkv' if settings.attn_type == 'gqa' else 'down'}.norm": lambda: iter(
            [get(f"{theirs}.attn_norm.weight")]
        ),
        f"{ours}.ffn.norm": lambda: iter([get(f"{theirs}.ffn_norm.weight")]),
        f"{ours}.attn.out.weight": lambda: iter([get(attn + "wo.weight")]),
    }
    if settings.attn_type == "gqa":

        def qkv() -> Iterator[Tensor]:
            for name in "qk":
                yield parts.halves(get(f"{attn}w{name}.weight"), settings.dim // settings.n_heads)
            yield get(attn + "wv.weight")

        return packs | {f"{ours}.attn.qkv.weight": qkv}

    rope, nope, rank = settings.qk_rope_head_dim, settings.qk_nope_head_dim, settings.kv_lora_rank

    def down() -> Iterator[Tensor]:
        kv = get(attn + "kv_down.weight")
        yield from (get(attn + "q_down.weight"), kv[:rank], parts.halves(kv[rank:], rope))

    def q_up() -> Iterator[Tensor]:
        unrotated = get(attn + "q_up_nope.weight").unflatten(0, (settings.n_heads, nope))
        rotated = parts.halves(get(attn + "q_up_rope.weight"), rope).unflatten(0, (settings.n_heads, rope))
        yield torch.cat([unrotated, rotated], 1).flatten(0, 1)

    return packs | {
        f"{ours}.attn.down.weight": down,
        f"{ours}.attn.q_up.norm": lambda: iter([get(attn + "q_norm.weight")]),
        f"{ours}.attn.q_up.weight": q_up,
        f"{ours}.attn.kv_norm": lambda: iter([get(attn + "kv_norm.weight")]),
        **parts.up_projections(get, attn + "kv_up.weight", settings.n_heads, nope, f"{ours}.attn."),
    }


def _pack_dense(get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    return {
        f"{ours}.gate_up": lambda: iter([get(f"{theirs}.gate.weight"), get(f"{theirs}.up.weight")]),
        f"{ours}.down": lambda: iter([get(f"{theirs}.down.weight")]),
    }


def _pack_experts(settings: Settings, get: Get, theirs: str, ours: str) -> dict[str, Pack]:
    """Routed experts, then the shared ones: each of those is as wide as top_k routed ones, and cut into so many."""
    names = [f"{theirs}.routed_experts.{index}." for index in range(settings.n_experts)]
    names += [f"{theirs}.shared_experts.{index}." for index in range(settings.n_shared_experts)]
    matrices = ("gate.weight", "up.weight", "down.weight")
    return {
        f"{ours}.router": lambda: iter([get(f"{theirs}.router.weight")]),
        f"{ours}.router_bias": lambda: iter([get(f"{theirs}.router_bias")]),
        **parts.experts(get, names, matrices, settings.expert_dim, f"{ours}."),
    }


def _pack_loop(settings: Settings, get: Get, max_loops: int) -> dict[str, Pack]:
    def decay() -> Iterator[Tensor]:
        exponent = get("recurrent.injection.log_dt").float() + get("recurrent.injection.log_A").float()
        yield torch.exp(-torch.exp(exponent.clamp(-20, 20)))

    def lora_scale() -> Iterator[Tensor]:
        trained = get("recurrent.lora.scale.weight")
        yield trained[torch.arange(max_loops).clamp(max=len(trained) - 1)]

    return {
        "recurrent.loop_signal": lambda: iter([_loop_signal(settings, max_loops)]),
        "recurrent.norm": lambda: iter([get("recurrent.norm.weight")]),
        "recurrent.lora_down": lambda: iter([get("recurrent.lora.down.weight")]),
        "recurrent.lora_scale": lora_scale,
        "recurrent.lora_up": lambda: iter([get("recurrent.lora.B")]),
        "recurrent.decay": decay,
        "recurrent.injection": lambda: iter([get("recurrent.injection.B")]),
        "recurrent.halt": lambda: iter([get("recurrent.act.halt.weight").flatten()]),
        "recurrent.halt_bias": lambda: iter([get("recurrent.act.halt.bias")]),
    }


def _loop_signal(settings: Settings, max_loops: int) -> Tensor:
    """Sinusoids of the loop's index in the first dim // 8 channels, 0 elsewhere: [max_loops, dim]."""
    width, loop = settings.dim // 8, model_config(settings).loop
    signal = torch.zeros(max_loops, settings.dim)
    if width and loop:
        steps = torch.arange(0, width, 2, dtype=torch.float32) / width
        angles = torch.outer(torch.arange(max_loops, dtype=torch.float32), 1.0 / loop.signal_theta**steps)
        signal[:, :width] = torch.cat([angles.sin(), angles.cos()], -1)[:, :width]
    return signal


def random_moments(name: str) -> tuple[float, float]:
    """Mean and standard deviation of a random checkpoint's tensor: the reference's initialization, but for three that would
    hide parts of the model: halting starts 3 lower (else every token halts at loop 2), routers carry a bias, LoRA scales
    are of order 1."""
    if name.endswith("norm.weight"):
        return 1.0, 0.0
    if name.endswith(("log_A", "log_dt")):
        return 0.0, 0.0
    return {
        "recurrent.injection.B": (0.1, 0.0),
        "recurrent.act.halt.bias": (-3.0, 0.02),
        "recurrent.lora.scale.weight": (0.0, 1.0),
    }.get(name, (0.0, 0.02))


FAMILY = Family(
    name="open-mythos 0.5",
    architectures=(),
    settings=Settings,
    model_config=model_config,
    tensor_shapes=tensor_shapes,
    pack=pack,
    ignored=IGNORED_TENSORS.__contains__,
    tied=lambda settings: TIED,
    variants=VARIANTS,
    random_moments=random_moments,
)
