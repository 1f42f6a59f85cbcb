"""Attention over a cache as engine builders like it: over all rows there is room for, so that shapes depend on shapes alone.

The cache is read where it lies: new rows are attended to beside it, not joined to it. Its dead rows (at or past past_len) get
probability 0 and must hold finite numbers, which a runner sees to that lays the cache out itself.

Shape letters: B batch, S new tokens, H heads, C capacity and W width of the cache, R kv_lora_rank, N qk_nope_head_dim,
V v_head_dim.
"""

from __future__ import annotations

# allowed_past [B, S or 1, 1, C], allowed_new [1, S, 1, S], and past_rows [B, C, W]. Needs `seq` [1] = S.
_MASKS = """
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axes_12 = Constant <value_ints = [1, 2]> ()
  axes_02 = Constant <value_ints = [0, 2]> ()
  int_0 = Constant <value_int = 0> ()
  int_1 = Constant <value_int = 1> ()
  capacity_1 = Shape <start = 2, end = 3> (past_kv)
  capacity = Squeeze(capacity_1, axis_0)
  seq_scalar = Squeeze(seq, axis_0)
  past_column = Range(int_0, capacity, int_1)
  past_len_1 = Unsqueeze(past_len, axis_1)
  in_past = Less(past_column, past_len_1)
  in_past_4 = Unsqueeze(in_past, axes_12)
  new_column = Range(int_0, seq_scalar, int_1)
  new_row = Unsqueeze(new_column, axis_1)
  causal = LessOrEqual(new_column, new_row)
  causal_4 = Unsqueeze(causal, axes_02)
  {WINDOW}
  past_rows = Gather <axis = 0> (past_kv, slot)
"""

_NO_WINDOW = """
  allowed_past = Identity(in_past_4)
  allowed_new = Identity(causal_4)
"""

# Row s of a sequence stands at past_len + s and sees the last `window` positions, its own included.
_WINDOW = """
  window_int = Constant <value_int: int = @window> ()
  no_window = LessOrEqual(window_int, int_0)
  past_len_2 = Unsqueeze(past_len_1, axis_1)
  position = Add(past_len_2, new_row)
  first_seen = Sub(position, window_int)
  in_window = Greater(past_column, first_seen)
  in_reach = Or(in_window, no_window)
  in_reach_4 = Unsqueeze(in_reach, axes_heads)
  allowed_past = And(in_past_4, in_reach_4)
  new_first = Sub(new_row, window_int)
  new_in_window = Greater(new_column, new_first)
  new_in_reach = Or(new_in_window, no_window)
  new_in_reach_4 = Unsqueeze(new_in_reach, axes_02)
  allowed_new = And(causal_4, new_in_reach_4)
"""

# Softmax over both parts in float32, where allowed: probabilities_past [B, S, H, C], probabilities_new [B, S, H, S] in the
# dtype of `fresh`, from scores_past and scores_new.
SOFTMAX = """
  never = Constant <value_float = -inf> ()
  scores_past_f = Cast <to = 1> (scores_past)
  masked_past = Where(allowed_past, scores_past_f, never)
  scores_new_f = Cast <to = 1> (scores_new)
  masked_new = Where(allowed_new, scores_new_f, never)
  masked = Concat <axis = -1> (masked_past, masked_new)
  probabilities_f = Softmax <axis = -1> (masked)
  probabilities = CastLike(probabilities_f, fresh)
  probabilities_split = Concat <axis = 0> (capacity_1, seq)
  probabilities_past, probabilities_new = Split <axis = -1> (probabilities, probabilities_split)
"""


# mixed_rows [B, S*H, W]: all heads of a sequence over its rows, from query [B, S*H, W], past_rows and fresh.
ATTEND_LATENTS = f"""
  scores_shape = Concat <axis = 0> (lead, n_heads, rest)
  past_by_channel = Transpose <perm = [0, 2, 1]> (past_rows)
  scores_past_flat = MatMul(query, past_by_channel)
  scores_past = Reshape(scores_past_flat, scores_shape)
  fresh_by_channel = Transpose <perm = [0, 2, 1]> (fresh)
  scores_new_flat = MatMul(query, fresh_by_channel)
  scores_new = Reshape(scores_new_flat, scores_shape)
  {SOFTMAX}
  past_flat_shape = Concat <axis = 0> (batch, rest, capacity_1)
  past_flat = Reshape(probabilities_past, past_flat_shape)
  mixed_past = MatMul(past_flat, past_rows)
  new_flat_shape = Concat <axis = 0> (batch, rest, seq)
  new_flat = Reshape(probabilities_new, new_flat_shape)
  mixed_new = MatMul(new_flat, fresh)
  mixed_rows = Add(mixed_past, mixed_new)
"""


# Latent attention's w_uk [H, R, N] absorbed into the query: [H, B*S, N] x [H, N, R].
ABSORB = """
  q_nope_by_head = Transpose <perm = [2, 0, 1, 3]> (q_nope)
  q_nope_flat_shape = Concat <axis = 0> (rest, nope)
  q_nope_flat = Reshape(q_nope_by_head, q_nope_flat_shape)
  {round_q}
  by_head_shape = Concat <axis = 0> (n_heads, rest, nope)
  q_nope_heads = Reshape(q_nope_rounded, by_head_shape)
  {uk_matrix}
  uk_columns = Transpose <perm = [0, 2, 1]> (uk)
  q_absorbed = MatMul(q_nope_heads, uk_columns)
  q_by_token = Transpose <perm = [1, 0, 2]> (q_absorbed)
  q_latent_shape = Concat <axis = 0> (batch, rest, rank)
  q_latent = Reshape(q_by_token, q_latent_shape)
"""

# Its w_uv [H, V, R] applied to the mixed latents: [H, B*S, R] x [H, R, V].
EXPAND = """
  mixed_latent, mixed_key = Split <axis = -1> (mixed_rows, kv_split)
  mixed_flat_shape = Concat <axis = 0> (rest, rank)
  mixed_flat = Reshape(mixed_latent, mixed_flat_shape)
  {round_mixed}
  mixed_shape = Concat <axis = 0> (rest, n_heads, rank)
  mixed = Reshape(mixed_rounded, mixed_shape)
  mixed_by_head = Transpose <perm = [1, 0, 2]> (mixed)
  {uv_matrix}
  uv_columns = Transpose <perm = [0, 2, 1]> (uv)
  values = MatMul(mixed_by_head, uv_columns)
  values_by_token = Transpose <perm = [1, 0, 2]> (values)
  y_shape = Concat <axis = 0> (lead, rest)
  y = Reshape(values_by_token, y_shape)
"""

# The same for few tokens: rows of the matrices times the token, summed, which a compiler fuses into one pass over a matrix.
ABSORB_FEW = """
  q_nope_flat = Identity(q_nope)
  {round_q}
  {uk_matrix}
  q_nope_axis = Constant <value_ints = [3]> ()
  q_nope_rows = Unsqueeze(q_nope_rounded, q_nope_axis)
  absorbed_terms_t = Mul(q_nope_rows, uk)
  absorbed_terms = Cast <to = 1> (absorbed_terms_t)
  q_absorbed_f = ReduceSum <keepdims = 0> (absorbed_terms, rest)
  q_absorbed = CastLike(q_absorbed_f, q)
  q_latent_shape = Concat <axis = 0> (batch, rest, rank)
  q_latent = Reshape(q_absorbed, q_latent_shape)
"""

EXPAND_FEW = """
  mixed_latent, mixed_key = Split <axis = -1> (mixed_rows, kv_split)
  mixed_heads_shape = Concat <axis = 0> (lead, n_heads, rank)
  mixed_flat = Reshape(mixed_latent, mixed_heads_shape)
  {round_mixed}
  {uv_matrix}
  mixed_axis = Constant <value_ints = [3]> ()
  mixed_columns = Unsqueeze(mixed_rounded, mixed_axis)
  value_terms_t = Mul(mixed_columns, uv)
  value_terms = Cast <to = 1> (value_terms_t)
  values_f = ReduceSum <keepdims = 0> (value_terms, rest)
  values = CastLike(values_f, q)
  y_shape = Concat <axis = 0> (lead, rest)
  y = Reshape(values, y_shape)
"""


def masks_text(*, window: bool) -> str:
    """Statements that give the masks and `past_rows`; see above."""
    axes = "\n  axes_heads = Constant <value_ints = [2]> ()"
    return _MASKS.replace("{WINDOW}", axes + _WINDOW if window else _NO_WINDOW)
