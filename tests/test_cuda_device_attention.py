"""Decode and prefill attention on a GPU, against float64.

Outputs and workspaces are NaN before a call. Shape letters: S new tokens of a sequence, H n_heads, R kv_lora_rank, V v_head_dim.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
from cuda_device import (
    DEVICE,
    LIMITS,
    RANDOM,
    Call,
    blank,
    error,
    integers,
    norm_weight,
    normal,
    rms_norm,
    some,
    torch,
)
from cuda_device import (
    seed as seed,
)
from hypothesis import given
from hypothesis import strategies as st

# Fields of the call, and the sequences' lengths.
Attention = namedtuple("Attention", "seq n_heads n_kv_heads nope rope rank v_head_dim capacity window lengths")


def rotate(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(a: Attention, query: Any, rows: Any, scale: float) -> Any:
    """Of a sequence's queries [S, H, ...] and the rows that it has, the new ones last, in float64: [S, H, R or V]."""
    if a.n_kv_heads:
        keys, values = rows.unflatten(-1, (2, a.n_kv_heads, -1)).unbind(1)
        keys, values = (part.repeat_interleave(a.n_heads // a.n_kv_heads, 1) for part in (keys, values))
    else:
        keys = rows[:, None].expand(-1, a.n_heads, -1)
        values = keys[..., : a.rank]
    here = torch.arange(len(rows), device=DEVICE)
    last = here[-a.seq :, None]
    seen = (here <= last) & (here > last - (a.window or len(rows)))
    scores = torch.einsum("shd,nhd->hsn", query, keys) * scale
    return torch.einsum("hsn,nhd->shd", torch.softmax(scores.masked_fill(~seen, -torch.inf), -1), values)


def cached_rows(cache_dtype: str, width: int, a: Attention) -> tuple[Any, Any, Any]:
    """Rows [B, C, W], scales [B, C] of int8 ones (else empty), and what they stand for in float64. Those that hold no token, or
    their scales, are NaN; the first int8 row is zero, and so is its scale."""
    batch, int8 = len(a.lengths), cache_dtype == "int8"
    if not int8:
        past, scales = normal(batch, a.capacity, width, dtype=cache_dtype), normal(0)
    else:
        past = integers(-127, 128, batch, a.capacity, width).to(torch.int8)
        scales = (torch.rand(batch, a.capacity, device=DEVICE) + 0.5) / 64
        past[:, :1], scales[:, :1] = 0, 0
    for sequence, length in zip(scales if int8 else past, a.lengths, strict=True):
        sequence[length:] = torch.nan
    return past, scales, past.double() * (scales[..., None].double() if int8 else 1)


def check_new_rows(new_kv: Any, new_scale: Any, row: Any, row_scale: float, limit: float) -> Any:
    """What new rows stand for, in float64. Int8 ones are at most half a level from `row`, or from where it is cut off; a little
    more, as float32 is rounded before."""
    if new_kv.dtype != torch.int8:
        assert error(new_kv, row) < limit
        return new_kv.double()
    scale = torch.full_like(row[:, :1], row_scale) if row_scale else row.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(new_scale.double(), scale[:, 0], rtol=1e-5, atol=0)
    stands_for = new_kv * new_scale[:, None].double()
    assert bool(((stands_for - row.clamp(-127 * scale, 127 * scale)).abs() <= 0.51 * scale).all())
    return stands_for


def check_attention(dtype: str, cache_dtype: str, a: Attention, row_scale: float = 0.0) -> None:
    """Int8 rows are exact: what is multiplied with them is float16."""
    batch, latent = len(a.lengths), not a.n_kv_heads
    tokens, width = batch * a.seq, a.rank + a.rope if latent else 2 * a.n_kv_heads * a.v_head_dim
    head = a.nope + a.rope if latent else a.v_head_dim
    q = normal(tokens, (a.n_heads if latent else a.n_heads + 2 * a.n_kv_heads) * head)
    kv, kv_norm = normal(tokens, width if latent else 0), norm_weight(a.rank)
    w_uk = normal(a.n_heads, a.rank, a.nope, dtype=dtype, scale=max(a.nope, 1) ** -0.5)
    w_uv = normal(a.n_heads, a.v_head_dim, a.rank, dtype=dtype, scale=max(a.rank, 1) ** -0.5)
    angles = torch.rand(tokens, (a.rope if latent else a.v_head_dim) // 2, device=DEVICE) * 6
    (past, past_scale, held_rows), cos, sin = cached_rows(cache_dtype, width, a), angles.cos(), angles.sin()
    y, new_kv = blank(tokens, a.n_heads * a.v_head_dim), blank(tokens, width, dtype=past.dtype)
    new_scale = blank(tokens if cache_dtype == "int8" else 0)
    if cache_dtype == "int8" and tokens > 1:  # a row of zeros
        (kv if latent else q)[0, 0 if latent else a.n_heads * head :] = 0
    inputs = {"past_scale": past_scale, "new_scale": new_scale, "row_scale": row_scale}
    inputs |= {"q": q, "kv": kv, "kv_norm": kv_norm, "w_uk": w_uk, "w_uv": w_uv, "cos": cos, "sin": sin, "past": past}
    fields = {**a._asdict(), **inputs, "batch": batch, "scale": head**-0.5, "epsilon": 1e-6, "y": y, "new_kv": new_kv}
    fields["past_len"] = torch.tensor(fields.pop("lengths"), device=DEVICE)
    Call("attention", dtype=dtype, cache_dtype=cache_dtype, **fields).run()
    turn, turn_heads = (cos.double(), sin.double()), (cos[:, None].double(), sin[:, None].double())
    heads = q.double().view(tokens, -1, head)
    if latent:
        absorbed = torch.einsum("hrn,thn->thr", w_uk.double(), heads[..., : a.nope])
        query = torch.cat([absorbed, rotate(heads[..., a.nope :], *turn_heads)], -1)
        row = torch.cat([rms_norm(kv[:, : a.rank], kv_norm, 1e-6), rotate(kv[:, a.rank :].double(), *turn)], -1)
    else:
        query, key, value = heads.split([a.n_heads, a.n_kv_heads, a.n_kv_heads], 1)
        query, row = rotate(query, *turn_heads), torch.cat([rotate(key, *turn_heads), value], 1).flatten(1)
    limit = LIMITS["float16" if cache_dtype == "int8" else cache_dtype]
    new_rows = check_new_rows(new_kv, new_scale, row, row_scale, limit).view(batch, a.seq, -1)
    want = []
    for b, length in enumerate(a.lengths):
        held = torch.arange(max(length - a.capacity, 0), length, device=DEVICE) % max(a.capacity, 1)
        rows, new = torch.cat([held_rows[b, held], new_rows[b]]), slice(b * a.seq, (b + 1) * a.seq)
        mixed = attend(a, query[new], rows, head**-0.5)
        want.append(torch.einsum("hvr,shr->shv", w_uv.double(), mixed) if latent else mixed)
    assert error(y, torch.cat(want).flatten(1)) < 2 * max(LIMITS[dtype], limit)


ATTENTIONS = [
    Attention(7, 4, 0, 16, 8, 32, 16, 64, 0, [5, 60]),
    Attention(1, 8, 2, 0, 0, 0, 64, 32, 20, [5, 100, 32]),
    Attention(40, 16, 0, 64, 32, 256, 64, 128, 0, [30]),
    Attention(9, 6, 3, 0, 0, 0, 32, 16, 12, [200]),
    Attention(1, 16, 0, 64, 32, 256, 64, 512, 0, [0, 511, 77]),
    Attention(1, 16, 0, 64, 32, 256, 64, 256, 0, [130]),
    Attention(1, 32, 0, 128, 64, 512, 128, 2048, 0, [2000]),
    Attention(3, 8, 2, 0, 0, 0, 64, 96, 0, [90, 3]),
    Attention(1, 40, 8, 0, 0, 0, 128, 4096, 0, [4000]),
    Attention(5, 4, 4, 0, 0, 0, 18, 32, 0, [0, 20]),
    Attention(1, 40, 2, 0, 0, 0, 64, 300, 0, [299]),
    Attention(3, 16, 0, 20, 6, 40, 10, 64, 0, [33]),
    Attention(200, 8, 2, 0, 0, 0, 64, 64, 50, [0, 64, 1000]),
    Attention(300, 16, 0, 64, 32, 256, 64, 512, 0, [0]),
    Attention(5, 4, 2, 0, 0, 0, 32, 0, 0, [0]),
    Attention(70, 16, 0, 128, 64, 512, 128, 200, 0, [150]),
]
# Whose parts several blocks put together, or many.
LONG = [
    Attention(1, 16, 0, 64, 32, 256, 64, 9000, 0, [8990]),
    Attention(2, 12, 0, 16, 16, 192, 16, 9000, 7000, [8000]),  # 24 queries, of two blocks
    Attention(2, 12, 0, 16, 16, 192, 16, 9000, 7000, [50003]),  # the window begins anew in a part
    Attention(3, 5, 0, 16, 48, 320, 16, 16500, 0, [16487]),
    Attention(1, 16, 0, 128, 64, 512, 128, 40000, 0, [39990]),
    Attention(1, 16, 0, 64, 32, 256, 64, 140000, 0, [139990]),
    Attention(1, 4, 0, 16, 0, 64, 16, 30000, 0, [3, 29000]),
    Attention(1, 16, 0, 64, 32, 256, 64, 9000, 0, [0]),
    Attention(1, 5, 0, 20, 16, 272, 130, 7000, 0, [6900, 12]),
    Attention(1, 3, 0, 8, 6, 41, 7, 6500, 0, [6400]),
    Attention(2, 8, 1, 0, 0, 0, 64, 20000, 0, [19000]),
]
PAIRS = [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")]
PAIRS += [("float32", "float16"), ("float32", "bfloat16")]  # of the matrices and the cache
PAIRS += [(dtype, "int8") for dtype in ("float16", "bfloat16", "float32")]


@pytest.mark.parametrize(("dtype", "cache_dtype"), PAIRS)
@pytest.mark.parametrize("attention", some(ATTENTIONS, 4), ids=str)
def test_attention(dtype: str, cache_dtype: str, attention: Attention) -> None:
    check_attention(dtype, cache_dtype, attention)


@pytest.mark.parametrize(("dtype", "cache_dtype"), some(PAIRS, 2))
@pytest.mark.parametrize("attention", some(LONG, 1), ids=str)
def test_attention_of_many_rows(dtype: str, cache_dtype: str, attention: Attention) -> None:
    check_attention(dtype, cache_dtype, attention)


@pytest.mark.parametrize("attention", some(ATTENTIONS, 4), ids=str)
def test_attention_of_a_fixed_row_scale(attention: Attention) -> None:
    """Numbers beyond 2.54 are cut off."""
    check_attention("float16", "int8", attention, row_scale=0.02)


@RANDOM
@given(pair=st.sampled_from(PAIRS), seq=st.integers(1, 40), groups=st.integers(0, 4), data=st.data())
def test_attention_of_any_sizes(pair: tuple[str, str], seq: int, groups: int, data: st.DataObject) -> None:
    number = lambda least, most: data.draw(st.integers(least, most))  # noqa: E731
    heads, capacity, window = number(1, 6) * (groups or 1), number(1, 200), data.draw(st.sampled_from([0, 1, 17]))
    latent = (number(1, 40), 2 * number(1, 16), 8 * number(1, 20))
    dims = (0, 0, 0, 2 * number(1, 40)) if groups else (*latent, number(1, 40))
    lengths = [number(0, 2 * capacity) for _ in range(number(1, 3))]
    check_attention(*pair, Attention(seq, heads, groups, *dims, capacity, window, lengths))
