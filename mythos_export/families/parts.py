"""What families have in common in how their tensors become ours.

Shape letters: E experts, D dim, F expert_dim, H heads, N qk_nope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mythos_export.families.family import Get, Pack


def joined(get: Get, *names: str) -> Pack:
    """Tensors one below another."""
    return lambda: (get(name) for name in names)


def zeros(*shape: int) -> Pack:
    """What a family's checkpoints have none of."""
    return lambda: iter([torch.zeros(*shape)])


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """Output channels [n*head_dim, ...] of rotated heads, from neighbouring RoPE pairs to pairs half a head apart."""
    pairs: Tensor = rows.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def experts(get: Get, names: Sequence[str], matrices: tuple[str, str, str], width: int, ours: str) -> dict[str, Pack]:
    """gate_up [E, 2F, D] and down [E, D, F] of the experts whose names, each followed by one of `matrices` (gate, up, down), are
    given. One that is wider than width = F, as shared ones are, becomes several."""

    def gate_up() -> Iterator[Tensor]:
        for name in names:
            gates, ups = (get(name + matrix).split(width) for matrix in matrices[:2])
            for gate, up in zip(gates, ups, strict=True):
                yield torch.cat([gate, up]).unsqueeze(0)

    def down() -> Iterator[Tensor]:
        for name in names:
            for part in get(name + matrices[2]).split(width, 1):
                yield part.unsqueeze(0)

    return {f"{ours}gate_up": gate_up, f"{ours}down": down}


def up_projections(get: Get, name: str, n_heads: int, nope: int, ours: str) -> dict[str, Pack]:
    """w_uk [H, R, N] and w_uv [H, V, R] of a matrix [H * (N + V), R], keys before values in every head."""

    def rows(part: slice) -> Tensor:
        of_heads: Tensor = get(name).unflatten(0, (n_heads, -1))[:, part]
        return of_heads

    return {
        f"{ours}w_uk": lambda: iter([rows(slice(None, nope)).transpose(1, 2)]),
        f"{ours}w_uv": lambda: iter([rows(slice(nope, None))]),
    }
