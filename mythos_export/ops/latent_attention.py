"""ai.mythos LatentAttention: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) on the cached latent itself.

Between the projections: normalizes the new latents, rotates queries and keys, attends over the cache and the new rows.
The up-projections of keys and values are absorbed: w_uk into the query, w_uv into the result, so that no key and no value
is ever expanded and each cached row is read as it is stored.

Shape letters: B batch, S new tokens, H heads, N qk_nope_head_dim, Q qk_rope_head_dim, V v_head_dim, R kv_lora_rank,
C capacity of the cache, W = R + Q its width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mythos_export.ops.cached_attention import MASK, ROTATE_HEADS, SOFTMAX, attend_rows, live_past, rms_norm, rotate
from mythos_export.ops.operator import Operator, wide


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
    kv_norm [R]: weight of the latent's RMSNorm. w_uk [H, N, R], w_uv [H, V, R]. cos, sin [B, S, Q/2]: float32, of the new
    tokens' positions. past_kv [slots, B, C, W], past_len [B] int64, slot [] int64: which slot is this layer's.
    scale: of the scores, usually (N+Q)**-0.5. epsilon: of the RMSNorm.
    Returns y [B, S, H*V] and new_kv [B, S, W], the rows to append to the cache.
    """
    n_heads, nope, rank = w_uk.shape
    heads = q.unflatten(-1, (n_heads, -1))
    latent, key = kv.split([rank, kv.shape[-1] - rank], -1)
    latent = rms_norm(wide(latent), wide(kv_norm), epsilon)
    new_kv = torch.cat([latent, rotate(key.unsqueeze(2), cos, sin).squeeze(2)], -1).to(q.dtype)
    q_latent = torch.einsum("bshn,hnr->bshr", heads[..., :nope], w_uk)
    query = torch.cat([q_latent, rotate(heads[..., nope:], cos, sin).to(q.dtype)], -1) * scale
    rows, allowed = live_past(past_kv, past_len, slot, new_kv)
    mixed = attend_rows(torch.einsum("bshw,blw->bshl", query, rows), rows.unsqueeze(2), allowed)
    return torch.einsum("bshr,hvr->bshv", mixed[..., :rank], w_uv).flatten(2), new_kv


@latent_attention.register_fake
def _(q, kv, kv_norm, w_uk, w_uv, cos, sin, past_kv, past_len, slot, scale, epsilon):  # type: ignore[no-untyped-def]
    batch, seq, _ = q.shape
    return q.new_empty(batch, seq, w_uv.shape[0] * w_uv.shape[1]), torch.empty_like(kv)


BODY = f"""
  # sizes; of weights, so onnxruntime folds them
  n_heads = Shape <start = 0, end = 1> (w_uk)
  nope = Shape <start = 1, end = 2> (w_uk)
  rank = Shape <start = 2, end = 3> (w_uk)
  width = Shape <start = 3, end = 4> (past_kv)
  rope = Sub(width, rank)
  lead = Shape <start = 0, end = 2> (q)
  batch = Shape <start = 0, end = 1> (q)
  seq = Shape <start = 1, end = 2> (q)
  rest = Constant <value_ints = [-1]> ()

  # the new rows: RMSNorm of the latent, RoPE of the one key and of every query head together
  q_head_shape = Concat <axis = 0> (lead, n_heads, rest)
  q_heads = Reshape(q, q_head_shape)
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
  heads = Concat <axis = 2> (q_rope, key_head)
  {ROTATE_HEADS}
  one = Constant <value_ints = [1]> ()
  rotated_split = Concat <axis = 0> (n_heads, one)
  q_rotated_f, key_rotated = Split <axis = 2> (rotated, rotated_split)
  key = Squeeze(key_rotated, axis_heads)
  new_rows = Concat <axis = -1> (latent, key)
  new_kv = CastLike(new_rows, q)

  # w_uk absorbed into the query: [H, B*S, N] x [H, N, R]
  q_by_head = Transpose <perm = [2, 0, 1, 3]> (q_nope)
  q_flat_shape = Concat <axis = 0> (n_heads, rest, nope)
  q_flat = Reshape(q_by_head, q_flat_shape)
  q_absorbed = MatMul(q_flat, w_uk)
  q_by_token = Transpose <perm = [1, 0, 2]> (q_absorbed)
  q_latent_shape = Concat <axis = 0> (batch, rest, rank)
  q_latent = Reshape(q_by_token, q_latent_shape)
  q_rotated = CastLike(q_rotated_f, q)
  q_rope_shape = Concat <axis = 0> (batch, rest, rope)
  q_rope_flat = Reshape(q_rotated, q_rope_shape)
  query_unscaled = Concat <axis = -1> (q_latent, q_rope_flat)
  scale_f = Constant <value_float: float = @scale> ()
  scale_t = CastLike(scale_f, q)
  query = Mul(query_unscaled, scale_t)

  # all heads of a sequence against its rows, each row read once: [B, S*H, W] x [B, W, L]
  {MASK}
  rows = Concat <axis = 1> (past, new_kv)
  rows_by_channel = Transpose <perm = [0, 2, 1]> (rows)
  scores_flat = MatMul(query, rows_by_channel)
  scores_shape = Concat <axis = 0> (lead, n_heads, rest)
  scores = Reshape(scores_flat, scores_shape)
  {SOFTMAX}
  probabilities_shape = Concat <axis = 0> (batch, rest, total_1)
  probabilities_flat = Reshape(probabilities, probabilities_shape)
  mixed_rows = MatMul(probabilities_flat, rows)

  # w_uv applied to the mixed latent: [H, V, R] x [H, R, B*S]
  mixed_latent, mixed_key = Split <axis = -1> (mixed_rows, kv_split)
  mixed_shape = Concat <axis = 0> (rest, n_heads, rank)
  mixed = Reshape(mixed_latent, mixed_shape)
  mixed_by_head = Transpose <perm = [1, 2, 0]> (mixed)
  values = MatMul(w_uv, mixed_by_head)
  values_by_token = Transpose <perm = [2, 0, 1]> (values)
  y_shape = Concat <axis = 0> (lead, rest)
  y = Reshape(values_by_token, y_shape)
"""

OPERATOR = Operator(
    name="LatentAttention",
    doc="Multi-head latent attention over a cache of latents, w_uk and w_uv absorbed (arXiv 2405.04434). Normalizes the new "
    "latents, rotates queries and keys, returns the rows to append. Rows at or past past_len never reach a result.",
    inputs=(
        ("q", "T", "[batch, seq, n_heads * (qk_nope_head_dim + qk_rope_head_dim)]"),
        ("kv", "T", "[batch, seq, kv_lora_rank + qk_rope_head_dim]: latent and key part as projected"),
        ("kv_norm", "tensor(float)", "[kv_lora_rank]: weight of the latent's RMSNorm"),
        ("w_uk", "T", "[n_heads, qk_nope_head_dim, kv_lora_rank]: up-projection of the keys"),
        ("w_uv", "T", "[n_heads, v_head_dim, kv_lora_rank]: up-projection of the values"),
        ("cos", "tensor(float)", "[batch, seq, qk_rope_head_dim / 2]: of the new tokens' positions"),
        ("sin", "tensor(float)", "[batch, seq, qk_rope_head_dim / 2]"),
        ("past_kv", "T", "[slots, batch, capacity, kv_lora_rank + qk_rope_head_dim]"),
        ("past_len", "tensor(int64)", "[batch]: valid rows of each sequence"),
        ("slot", "tensor(int64)", "[]: this layer's slot"),
    ),
    outputs=(
        ("y", "T", "[batch, seq, n_heads * v_head_dim]"),
        ("new_kv", "T", "[batch, seq, kv_lora_rank + qk_rope_head_dim]: the new tokens' rows"),
    ),
    attributes={"scale": ("FLOAT", "factor of the scores"), "epsilon": ("FLOAT", "epsilon of the latent's RMSNorm")},
    torch_op=torch.ops.mythos.latent_attention.default,
    infer_shapes=lambda shapes, _: [
        [*shapes[0][:2], _product(shapes[4][0], shapes[4][1])],
        list(shapes[1]),
    ],
    body=BODY,
)


def _product(a: int | str | None, b: int | str | None) -> int | None:
    return a * b if isinstance(a, int) and isinstance(b, int) else None
