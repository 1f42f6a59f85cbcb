"""ai.mythos GroupedQueryAttention: grouped-query attention (arXiv 2305.13245) over a cache of rotated keys and values.

Shape letters: B batch, S new tokens, H query heads, K key/value heads, G = H / K, D head_dim, C capacity of the cache,
W = 2*K*D its width, L cached and new rows together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mythos_export import overloads
from mythos_export.ops import engine_attention
from mythos_export.ops.cached_attention import (
    SOFTMAX,
    Cache,
    CachedRows,
    attend_rows,
    live_past,
    past_text,
    rotate,
    rotate_text,
    store_rows,
    store_text,
    with_int8_cache,
)
from mythos_export.ops.operator import Body, Operator


@torch.library.custom_op("mythos::grouped_query_attention", mutates_args=())
def grouped_query_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_kv: Tensor,
    past_len: Tensor,
    slot: Tensor,
    n_heads: int,
    n_kv_heads: int,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of S new tokens over past_len cached rows and over themselves, causally.

    qkv [B, S, (H+2K)*D]: queries, keys, values as projected. cos, sin [B, S, D/2]: float32, of the new tokens' positions.
    past_kv [slots, B, C, W], past_len [B] int64, slot [] int64. window: positions a token sees, itself included (sliding window,
    arXiv 2310.06825); 0 for all. scale: of the scores, usually D**-0.5.
    Returns y [B, S, H*D] and new_kv [B, S, W]: rotated keys, then values, in the dtype of past_kv.
    """
    cache = Cache(past_kv, past_len, slot)
    y, stored = _attend(qkv, cos, sin, cache, (n_heads, n_kv_heads, window), scale)
    return y, stored.new_kv


@grouped_query_attention.register_fake
def _(qkv, cos, sin, past_kv, past_len, slot, n_heads, n_kv_heads, window, scale):  # type: ignore[no-untyped-def]
    return _empty(qkv, past_kv, n_heads, n_kv_heads)


@torch.library.custom_op("mythos::grouped_query_attention_int8_cache", mutates_args=())
def grouped_query_attention_int8_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_kv: Tensor,
    past_scale: Tensor,
    past_len: Tensor,
    slot: Tensor,
    n_heads: int,
    n_kv_heads: int,
    window: int,
    scale: float,
    row_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over int8 rows: past_scale [slots, B, C] float32; row_scale as in Cache. Also returns new_scale [B, S]."""
    cache = Cache(past_kv, past_len, slot, past_scale, row_scale)
    y, stored = _attend(qkv, cos, sin, cache, (n_heads, n_kv_heads, window), scale)
    return y, stored.new_kv, stored.present_scale


@grouped_query_attention_int8_cache.register_fake
def _(qkv, cos, sin, past_kv, past_scale, past_len, slot, n_heads, n_kv_heads, window, scale, row_scale):  # type: ignore[no-untyped-def]
    return *_empty(qkv, past_kv, n_heads, n_kv_heads), past_scale.new_empty(qkv.shape[:2])


def _empty(qkv: Tensor, past_kv: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor]:
    """y and new_kv without their numbers."""
    batch, seq, width = qkv.shape
    head_dim = width // (n_heads + 2 * n_kv_heads)
    new_kv = past_kv.new_empty(batch, seq, 2 * n_kv_heads * head_dim)
    return qkv.new_empty(batch, seq, n_heads * head_dim), new_kv


def _attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    sizes: tuple[int, int, int],
    scale: float,
) -> tuple[Tensor, CachedRows]:
    n_heads, n_kv_heads, window = sizes
    heads = qkv.unflatten(-1, (n_heads + 2 * n_kv_heads, -1))
    to_rotate, value = heads.split([n_heads + n_kv_heads, n_kv_heads], 2)
    query, key = rotate(to_rotate, cos, sin).to(qkv.dtype).split([n_heads, n_kv_heads], 2)
    stored = store_rows(torch.cat([key, value], 2).flatten(2), cache, qkv.dtype)
    rows, allowed = live_past(cache, stored.rows, window)
    keys, values = (
        half.unflatten(-1, (n_kv_heads, -1)).repeat_interleave(n_heads // n_kv_heads, 2) for half in rows.chunk(2, -1)
    )
    return attend_rows(torch.einsum("bshd,blhd->bshl", query * scale, keys), values, allowed).flatten(2), stored


# From qkv to the rows of the new tokens in float32, `rows_f`.
_NEW_ROWS = f"""
  # sizes; static, so onnxruntime folds them
  n_heads_int = Constant <value_int: int = @n_heads> ()
  n_kv_heads_int = Constant <value_int: int = @n_kv_heads> ()
  first_axis = Constant <value_ints = [0]> ()
  n_heads_1 = Unsqueeze(n_heads_int, first_axis)
  n_kv_heads_1 = Unsqueeze(n_kv_heads_int, first_axis)
  n_rotated = Add(n_heads_1, n_kv_heads_1)
  n_all = Add(n_rotated, n_kv_heads_1)
  lead = Shape <start = 0, end = 2> (qkv)
  batch = Shape <start = 0, end = 1> (qkv)
  seq = Shape <start = 1, end = 2> (qkv)
  rest = Constant <value_ints = [-1]> ()
  half_int = Shape <start = 2, end = 3> (cos)
  head_dim = Add(half_int, half_int)

  # the new rows: RoPE of queries and keys together
  heads_shape = Concat <axis = 0> (lead, n_all, rest)
  all_heads = Reshape(qkv, heads_shape)
  all_split = Concat <axis = 0> (n_rotated, n_kv_heads_1)
  heads, value = Split <axis = 2> (all_heads, all_split)
  {rotate_text("heads", "rotated")}
  rotated_split = Concat <axis = 0> (n_heads_1, n_kv_heads_1)
  query_f, key_f = Split <axis = 2> (rotated, rotated_split)
  value_f = Cast <to = 1> (value)
  new_heads = Concat <axis = 2> (key_f, value_f)
  flat_shape = Concat <axis = 0> (lead, rest)
  rows_f = Reshape(new_heads, flat_shape)
"""

_QUERY = """
  # queries of one group side by side: [B, K, S*G, D]
  group = Div(n_heads_1, n_kv_heads_1)
  grouped_shape = Concat <axis = 0> (lead, n_kv_heads_1, group, rest)
  query_t = CastLike(query_f, qkv)
  scale_f = Constant <value_float: float = @scale> ()
  scale_t = CastLike(scale_f, qkv)
  query_scaled = Mul(query_t, scale_t)
  query_grouped = Reshape(query_scaled, grouped_shape)
  query_by_head = Transpose <perm = [0, 2, 1, 3, 4]> (query_grouped)
  query_shape = Concat <axis = 0> (batch, n_kv_heads_1, rest, head_dim)
  query = Reshape(query_by_head, query_shape)
"""

# keys [B, K, D, L] and values [B, K, L, D] of {part}_rows [B, L, W].
_HALVES = """
  {part}_shape = Concat <axis = 0> (batch, rest, two, n_kv_heads_1, head_dim)
  {part}_by_head = Reshape({part}_rows, {part}_shape)
  {part}_keys_5, {part}_values_5 = Split <axis = 2, num_outputs = 2> ({part}_by_head)
  {part}_keys_4 = Squeeze({part}_keys_5, two)
  {part}_values_4 = Squeeze({part}_values_5, two)
  {part}_keys = Transpose <perm = [0, 2, 3, 1]> ({part}_keys_4)
  {part}_values = Transpose <perm = [0, 2, 1, 3]> ({part}_values_4)
"""

# {scores} [B, S, H, L], so that the mask is one for all heads.
_SCORES = """
  {part}_scores_by_head = MatMul(query, {part}_keys)
  {part}_split_shape = Concat <axis = 0> (batch, n_kv_heads_1, seq, group, rest)
  {part}_scores_5 = Reshape({part}_scores_by_head, {part}_split_shape)
  {part}_scores_by_token = Transpose <perm = [0, 2, 1, 3, 4]> ({part}_scores_5)
  {part}_scores_shape = Concat <axis = 0> (lead, n_heads_1, rest)
  {scores} = Reshape({part}_scores_by_token, {part}_scores_shape)
"""

# {mixed} [B, K, S*G, D] of {probabilities} [B, S, H, L].
_MIX = """
  {part}_probabilities_shape = Concat <axis = 0> (lead, n_kv_heads_1, group, rest)
  {part}_probabilities_5 = Reshape({probabilities}, {part}_probabilities_shape)
  {part}_probabilities_by_head = Transpose <perm = [0, 2, 1, 3, 4]> ({part}_probabilities_5)
  {part}_probabilities_flat_shape = Concat <axis = 0> (batch, n_kv_heads_1, rest, {n_rows})
  {part}_probabilities_flat = Reshape({part}_probabilities_by_head, {part}_probabilities_flat_shape)
  {mixed} = MatMul({part}_probabilities_flat, {part}_values)
"""

_ATTEND = (
    "  all_rows = Concat <axis = 1> (past, fresh)"
    + _HALVES.format(part="all")
    + _SCORES.format(part="all", scores="scores")
    + SOFTMAX
    + _MIX.format(part="all", probabilities="probabilities", n_rows="total_1", mixed="mixed")
)

# The same, cache and new rows apart.
_ATTEND_WHOLE = (
    "  fresh_rows = Identity(fresh)"
    + _HALVES.format(part="past")
    + _HALVES.format(part="fresh")
    + _SCORES.format(part="past", scores="scores_past")
    + _SCORES.format(part="fresh", scores="scores_new")
    + engine_attention.SOFTMAX
    + _MIX.format(part="past", probabilities="probabilities_past", n_rows="capacity_1", mixed="mixed_past")
    + _MIX.format(part="fresh", probabilities="probabilities_new", n_rows="seq", mixed="mixed_new")
    + "  mixed = Add(mixed_past, mixed_new)"
)


def _body(*, int8: bool = False, engine: bool = False) -> str:
    """engine: as engine builders like it."""
    return f"""
  {_NEW_ROWS}
  {store_text("qkv", int8=int8)}
  {_QUERY}
  {engine_attention.masks_text(window=True) if engine else past_text(int8=int8, window=True)}
  two = Constant <value_ints = [2]> ()
  {_ATTEND_WHOLE if engine else _ATTEND}
  mixed_shape = Concat <axis = 0> (batch, n_kv_heads_1, seq, group, head_dim)
  mixed_5 = Reshape(mixed, mixed_shape)
  mixed_by_token = Transpose <perm = [0, 2, 1, 3, 4]> (mixed_5)
  y = Reshape(mixed_by_token, flat_shape)
"""


def _per_head(width: int | str | None, attributes: dict[str, int], n: int) -> int | None:
    if not isinstance(width, int):
        return None
    return width // (attributes["n_heads"] + 2 * attributes["n_kv_heads"]) * n


OPERATOR = Operator(
    name="GroupedQueryAttention",
    doc="Grouped-query attention (arXiv 2305.13245) over a cache of rotated keys and values. Rotates queries and keys, returns "
    "the rows to append. Rows at or past past_len never reach a result.",
    inputs=(
        ("qkv", "T", "[batch, seq, (n_heads + 2 * n_kv_heads) * head_dim]: queries, keys, values as projected"),
        ("cos", "tensor(float)", "[batch, seq, head_dim / 2]: of the new tokens' positions"),
        ("sin", "tensor(float)", "[batch, seq, head_dim / 2]"),
        ("past_kv", "C", "[slots, batch, capacity, 2 * n_kv_heads * head_dim]: rotated keys, then values"),
        ("past_len", "tensor(int64)", "[batch]: valid rows of each sequence"),
        ("slot", "tensor(int64)", "[]: this layer's slot"),
    ),
    outputs=(
        ("y", "T", "[batch, seq, n_heads * head_dim]"),
        ("new_kv", "C", "[batch, seq, 2 * n_kv_heads * head_dim]: the new tokens' rows"),
    ),
    attributes={
        "n_heads": ("INT", "query heads"),
        "n_kv_heads": ("INT", "key and value heads"),
        "window": ("INT", "positions a token sees, itself included; 0 for all"),
        "scale": ("FLOAT", "factor of the scores"),
    },
    torch_op=torch.ops.mythos.grouped_query_attention.default,
    infer_shapes=lambda shapes, attributes: [
        [*shapes[0][:2], _per_head(shapes[0][2], attributes, attributes["n_heads"])],
        [*shapes[0][:2], _per_head(shapes[0][2], attributes, 2 * attributes["n_kv_heads"])],
    ],
    body=_body(),
    other_bodies={overloads.ENGINE: Body(_body(engine=True))},
)

INT8_CACHE = with_int8_cache(OPERATOR, torch.ops.mythos.grouped_query_attention_int8_cache.default, _body(int8=True))
