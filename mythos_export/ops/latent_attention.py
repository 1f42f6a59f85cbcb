"""ai.mythos LatentAttention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) on the cached latent itself.

Between the projections: normalizes the new latents, rotates queries and keys, attends over the cache and the new rows.
The up-projections of keys and values are absorbed: w_uk into the query, w_uv into the result, so that no key and no value
is ever expanded and each cached row is read as it is stored.

Shape letters: B batch, S new tokens, H heads, N qk_nope_head_dim, Q qk_rope_head_dim, V v_head_dim, R kv_lora_rank,
C capacity of the cache, W = R + Q its width, b blocks of input channels.
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
    float_cache_bodies,
    live_past,
    past_text,
    rotate,
    rotate_text,
    store_rows,
    store_text,
    with_int8_cache,
)
from mythos_export.ops.engine_forms import ENGINE, ENGINE_QUANTIZED
from mythos_export.ops.operator import Body, Operator, rms_norm, wide
from mythos_export.ops.products import FLOAT, ActivationRounding, FloatForm, QuantizedForm, dequantize, quantized


@torch.library.custom_op("mythos::latent_attention", mutates_args=())
def latent_attention(
    q: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_kv: Tensor,
    past_len: Tensor,
    slot: Tensor,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Attention of S new tokens over past_len cached rows and over themselves, causally.

    q [B, S, H*(N+Q)]: queries of each head, unrotated part first. kv [B, S, R+Q]: latent and key part, as projected.
    kv_norm [R]: weight of the latent's RMSNorm. w_uk [H, R, N], w_uv [H, V, R]. cos, sin [B, S, Q/2]: float32, of the new
    tokens' positions. past_kv [slots, B, C, W], past_len [B] int64, slot [] int64: which slot is this layer's.
    scale: of the scores, usually (N+Q)**-0.5. epsilon: of the RMSNorm.
    Returns y [B, S, H*V] and new_kv [B, S, W], the rows to append to the cache, in its dtype.
    """
    y, stored = _attend(q, kv, kv_norm, w_uk, w_uv, cos, sin, Cache(past_kv, past_len, slot), scale, epsilon)
    return y, stored.new_kv


@latent_attention.register_fake
def _(q, kv, kv_norm, w_uk, w_uv, cos, sin, past_kv, past_len, slot, scale, epsilon):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:2], w_uv.shape[0] * w_uv.shape[1]), past_kv.new_empty(kv.shape)


@torch.library.custom_op("mythos::latent_attention_int8_cache", mutates_args=())
def latent_attention_int8_cache(
    q: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_kv: Tensor,
    past_scale: Tensor,
    past_len: Tensor,
    slot: Tensor,
    scale: float,
    epsilon: float,
    row_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over int8 rows: past_scale [slots, B, C] float32; row_scale as in Cache. Also returns new_scale [B, S]."""
    cache = Cache(past_kv, past_len, slot, past_scale, row_scale)
    y, stored = _attend(q, kv, kv_norm, w_uk, w_uv, cos, sin, cache, scale, epsilon)
    return y, stored.new_kv, stored.present_scale


@latent_attention_int8_cache.register_fake
def _(q, kv, kv_norm, w_uk, w_uv, cos, sin, past_kv, past_scale, past_len, slot, scale, epsilon, row_scale):  # type: ignore[no-untyped-def]
    y = q.new_empty(*q.shape[:2], w_uv.shape[0] * w_uv.shape[1])
    return y, past_kv.new_empty(kv.shape), past_scale.new_empty(kv.shape[:2])


@torch.library.custom_op("mythos::quantized_latent_attention", mutates_args=())
def quantized_latent_attention(
    q: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    w_uk: Tensor,
    w_uk_scale: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_kv: Tensor,
    past_len: Tensor,
    slot: Tensor,
    activation_scale: Tensor,
    scale: float,
    epsilon: float,
    block_size: int,
    activation_type: int,
) -> tuple[Tensor, Tensor]:
    """The same with w_uk and w_uv as `dequantize` takes them, their inputs rounded as ActivationRounding says."""
    w_uk, w_uv = dequantize(w_uk, w_uk_scale, block_size), dequantize(w_uv, w_uv_scale, block_size)
    cache = Cache(past_kv, past_len, slot)
    rounding = ActivationRounding(activation_scale, 2, block_size, activation_type)
    y, stored = _attend(q, kv, kv_norm, w_uk, w_uv, cos, sin, cache, scale, epsilon, rounding)
    return y, stored.new_kv


@torch.library.custom_op("mythos::quantized_latent_attention_int8_cache", mutates_args=())
def quantized_latent_attention_int8_cache(
    q: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    w_uk: Tensor,
    w_uk_scale: Tensor,
    w_uv: Tensor,
    w_uv_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_kv: Tensor,
    past_scale: Tensor,
    past_len: Tensor,
    slot: Tensor,
    activation_scale: Tensor,
    scale: float,
    epsilon: float,
    row_scale: float,
    block_size: int,
    activation_type: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both: quantized w_uk and w_uv, int8 rows."""
    w_uk, w_uv = dequantize(w_uk, w_uk_scale, block_size), dequantize(w_uv, w_uv_scale, block_size)
    cache = Cache(past_kv, past_len, slot, past_scale, row_scale)
    rounding = ActivationRounding(activation_scale, 2, block_size, activation_type)
    y, stored = _attend(q, kv, kv_norm, w_uk, w_uv, cos, sin, cache, scale, epsilon, rounding)
    return y, stored.new_kv, stored.present_scale


def _attend(
    q: Tensor,
    kv: Tensor,
    kv_norm: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Cache,
    scale: float,
    epsilon: float,
    rounding: ActivationRounding | None = None,
) -> tuple[Tensor, CachedRows]:
    """rounding: of the inputs of w_uk and w_uv."""
    n_heads, rank, nope = w_uk.shape
    heads = q.unflatten(-1, (n_heads, -1))
    latent, key = kv.split([rank, kv.shape[-1] - rank], -1)
    latent = rms_norm(wide(latent), wide(kv_norm), epsilon)
    stored = store_rows(torch.cat([latent, rotate(key.unsqueeze(2), cos, sin).squeeze(2)], -1), cache, q.dtype)
    q_nope = rounding(heads[..., :nope], 0) if rounding else heads[..., :nope]
    q_latent = torch.einsum("bshn,hrn->bshr", q_nope, w_uk.to(q.dtype))
    query = torch.cat([q_latent, rotate(heads[..., nope:], cos, sin).to(q.dtype)], -1) * scale
    rows, allowed = live_past(cache, stored.rows)
    mixed = attend_rows(torch.einsum("bshw,blw->bshl", query, rows), rows.unsqueeze(2), allowed)[..., :rank]
    mixed = rounding(mixed, 1) if rounding else mixed
    return torch.einsum("bshr,hvr->bshv", mixed, w_uv.to(q.dtype)).flatten(2), stored


_ABSORB = """
  # w_uk absorbed into the query: [H, R, N] x [H, N, B*S]
  q_nope_by_head = Transpose <perm = [2, 0, 1, 3]> (q_nope)
  q_nope_flat_shape = Concat <axis = 0> (rest, nope)
  q_nope_flat = Reshape(q_nope_by_head, q_nope_flat_shape)
  {round_q}
  by_head_shape = Concat <axis = 0> (n_heads, rest, nope)
  q_nope_heads = Reshape(q_nope_rounded, by_head_shape)
  q_nope_columns = Transpose <perm = [0, 2, 1]> (q_nope_heads)
  {uk_matrix}
  q_absorbed = MatMul(uk, q_nope_columns)
  q_by_token = Transpose <perm = [2, 0, 1]> (q_absorbed)
  q_latent_shape = Concat <axis = 0> (batch, rest, rank)
  q_latent = Reshape(q_by_token, q_latent_shape)
"""

_EXPAND = """
  # w_uv applied to the mixed latent: [H, V, R] x [H, R, B*S]
  mixed_latent, mixed_key = Split <axis = -1> (mixed_rows, kv_split)
  mixed_flat_shape = Concat <axis = 0> (rest, rank)
  mixed_flat = Reshape(mixed_latent, mixed_flat_shape)
  {round_mixed}
  mixed_shape = Concat <axis = 0> (rest, n_heads, rank)
  mixed = Reshape(mixed_rounded, mixed_shape)
  mixed_by_head = Transpose <perm = [1, 2, 0]> (mixed)
  {uv_matrix}
  values = MatMul(uv, mixed_by_head)
  values_by_token = Transpose <perm = [2, 0, 1]> (values)
  y_shape = Concat <axis = 0> (lead, rest)
  y = Reshape(values_by_token, y_shape)
"""

# From q and kv to the parts of the query and of the rows of the new tokens.
_NEW_ROWS = """
  # sizes; of weights, so onnxruntime folds them
  n_heads = Shape <start = 0, end = 1> (w_uk)
  rank = Shape <start = 1, end = 2> (w_uk)
  width = Shape <start = 3, end = 4> (past_kv)
  rope = Sub(width, rank)
  lead = Shape <start = 0, end = 2> (q)
  batch = Shape <start = 0, end = 1> (q)
  seq = Shape <start = 1, end = 2> (q)
  rest = Constant <value_ints = [-1]> ()

  # RMSNorm of the latent
  q_head_shape = Concat <axis = 0> (lead, n_heads, rest)
  q_heads = Reshape(q, q_head_shape)
  q_width = Shape <start = 3> (q_heads)
  nope = Sub(q_width, rope)
  q_split = Concat <axis = 0> (nope, rope)
  q_nope, q_rope = Split <axis = -1> (q_heads, q_split)
  kv_split = Concat <axis = 0> (rank, rope)
  latent_t, key_t = Split <axis = -1> (kv, kv_split)
  latent_f = Cast <to = 1> (latent_t)
  two = Constant <value_float = 2.0> ()
  squared = Pow(latent_f, two)
  mean = ReduceMean <keepdims = 1> (squared, rest)
  eps = Constant <value_float: float = @epsilon> ()
  mean_eps = Add(mean, eps)
  rms = Sqrt(mean_eps)
  normalized = Div(latent_f, rms)
  kv_norm_f = Cast <to = 1> (kv_norm)
  latent = Mul(normalized, kv_norm_f)
  axis_heads = Constant <value_ints = [2]> ()
  key_head = Unsqueeze(key_t, axis_heads)
"""

# q_rotated_f [B, S, H, 2h] and key [B, S, 2h]: query heads and key rotated together, ...
_ROTATION = f"""
  heads = Concat <axis = 2> (q_rope, key_head)
  {rotate_text("heads", "rotated")}
  one = Constant <value_ints = [1]> ()
  rotated_split = Concat <axis = 0> (n_heads, one)
  q_rotated_f, key_rotated = Split <axis = 2> (rotated, rotated_split)
  key = Squeeze(key_rotated, axis_heads)
  rows_f = Concat <axis = -1> (latent, key)
"""

# ... or one by one: TensorRT 8.6 compiles no graph in which they are joined.
_ROTATION_APART = f"""
  {rotate_text("q_rope", "q_rotated_f")}
  {rotate_text("key_head", "key_rotated")}
  key = Squeeze(key_rotated, axis_heads)
  rows_f = Concat <axis = -1> (latent, key)
"""

# query [B, S*H, W]: absorbed and rotated, scaled.
_QUERY = """
  q_rotated = CastLike(q_rotated_f, q)
  q_rope_shape = Concat <axis = 0> (batch, rest, rope)
  q_rope_flat = Reshape(q_rotated, q_rope_shape)
  query_unscaled = Concat <axis = -1> (q_latent, q_rope_flat)
  scale_f = Constant <value_float: float = @scale> ()
  scale_t = CastLike(scale_f, q)
  query = Mul(query_unscaled, scale_t)
"""

# All heads of a sequence against its rows, each row read once: [B, S*H, W] x [B, W, L].
_ATTEND = f"""
  rows = Concat <axis = 1> (past, fresh)
  rows_by_channel = Transpose <perm = [0, 2, 1]> (rows)
  scores_flat = MatMul(query, rows_by_channel)
  scores_shape = Concat <axis = 0> (lead, n_heads, rest)
  scores = Reshape(scores_flat, scores_shape)
  {SOFTMAX}
  probabilities_shape = Concat <axis = 0> (batch, rest, total_1)
  probabilities_flat = Reshape(probabilities, probabilities_shape)
  mixed_rows = MatMul(probabilities_flat, rows)
"""


def _body(form: FloatForm, *, int8: bool = False) -> str:
    absorb, expand = _ABSORB.format(**_parts(form)), _EXPAND.format(**_parts(form))
    return f"""
  {form.preamble}
  {_NEW_ROWS}
  {_ROTATION}
  {store_text("q", int8=int8)}
  {absorb}
  {_QUERY}
  {past_text(int8=int8, window=False)}
  {_ATTEND}
  {expand}
"""


def _parts(form: FloatForm) -> dict[str, str]:
    return {
        "round_q": form.rounded("q_nope_flat", "q_nope_rounded"),
        "uk_matrix": form.matrix("w_uk", "w_uk_scale", "uk"),
        "round_mixed": form.rounded("mixed_flat", "mixed_rounded", product=1),
        "uv_matrix": form.matrix("w_uv", "w_uv_scale", "uv"),
    }


def _engine_body(form: FloatForm, absorb: str, expand: str) -> Body:
    return Body(f"""
  {form.preamble}
  {_NEW_ROWS}
  {_ROTATION_APART}
  {store_text("q", int8=False)}
  {absorb.format(**_parts(form))}
  {_QUERY}
  {engine_attention.masks_text(window=False)}
  {engine_attention.ATTEND_LATENTS}
  {expand.format(**_parts(form))}
""")


def _engine_bodies(form: FloatForm) -> dict[str, Body]:
    return {
        overloads.ENGINE: _engine_body(form, engine_attention.ABSORB, engine_attention.EXPAND),
        overloads.FEW_TOKENS: _engine_body(form, engine_attention.ABSORB_FEW, engine_attention.EXPAND_FEW),
    }


def _product(a: int | str | None, b: int | str | None) -> int | None:
    return a * b if isinstance(a, int) and isinstance(b, int) else None


OPERATOR = Operator(
    name="LatentAttention",
    doc="Multi-head latent attention over a cache of latents, w_uk and w_uv absorbed (arXiv 2405.04434). Normalizes the new "
    "latents, rotates queries and keys, returns the rows to append. Rows at or past past_len never reach a result.",
    inputs=(
        ("q", "T", "[batch, seq, n_heads * (qk_nope_head_dim + qk_rope_head_dim)]"),
        ("kv", "T", "[batch, seq, kv_lora_rank + qk_rope_head_dim]: latent and key part as projected"),
        ("kv_norm", "tensor(float)", "[kv_lora_rank]: weight of the latent's RMSNorm"),
        ("w_uk", "T", "[n_heads, kv_lora_rank, qk_nope_head_dim]: up-projection of the keys, transposed"),
        ("w_uv", "T", "[n_heads, v_head_dim, kv_lora_rank]: up-projection of the values"),
        ("cos", "tensor(float)", "[batch, seq, qk_rope_head_dim / 2]: of the new tokens' positions"),
        ("sin", "tensor(float)", "[batch, seq, qk_rope_head_dim / 2]"),
        ("past_kv", "C", "[slots, batch, capacity, kv_lora_rank + qk_rope_head_dim]"),
        ("past_len", "tensor(int64)", "[batch]: valid rows of each sequence"),
        ("slot", "tensor(int64)", "[]: this layer's slot"),
    ),
    outputs=(
        ("y", "T", "[batch, seq, n_heads * v_head_dim]"),
        ("new_kv", "C", "[batch, seq, kv_lora_rank + qk_rope_head_dim]: the new tokens' rows"),
    ),
    attributes={"scale": ("FLOAT", "factor of the scores"), "epsilon": ("FLOAT", "epsilon of the latent's RMSNorm")},
    torch_op=torch.ops.mythos.latent_attention.default,
    infer_shapes=lambda shapes, _: [
        [*shapes[0][:2], _product(shapes[4][0], shapes[4][1])],
        list(shapes[1]),
    ],
    body=_body(FLOAT),
    other_bodies=_engine_bodies(ENGINE),
)

_WEIGHTS = ("w_uk", "w_uv")
INT8_CACHE = with_int8_cache(OPERATOR, torch.ops.mythos.latent_attention_int8_cache.default, _body(FLOAT, int8=True))
QUANTIZED = quantized(
    OPERATOR,
    torch.ops.mythos.quantized_latent_attention.default,
    _body(QuantizedForm()),
    weights=_WEIGHTS,
    other_bodies=_engine_bodies(ENGINE_QUANTIZED),
)
QUANTIZED_INT8_CACHE = quantized(
    INT8_CACHE,
    torch.ops.mythos.quantized_latent_attention_int8_cache.default,
    _body(QuantizedForm(), int8=True),
    weights=_WEIGHTS,
    other_bodies=float_cache_bodies(QUANTIZED),
)
