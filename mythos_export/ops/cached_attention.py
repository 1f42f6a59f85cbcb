"""What both attention operators share: RoPE, which rows are live, who may see whom. In torch, then as ONNX statements.

Shape letters: B batch, S new tokens, H heads, P = max(past_len), L = P + S, C capacity and W width of the cache,
n any number of heads, h half their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mythos_export.ops.operator import wide


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, in the dtype of x (float32 where it matters)."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) of heads [B, S, n, 2h] by cos, sin [B, S, h]; pairs lie half a head apart."""
    first, second = wide(heads).chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def live_past(past_kv: Tensor, past_len: Tensor, slot: Tensor, new_kv: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to attend to [B, L, W], dead ones replaced by 0, and who may see whom [B, S, 1, L].

    past_kv [slots, B, C, W], past_len [B], slot [], new_kv [B, S, W].
    """
    longest, seq = int(past_len.max()), new_kv.shape[1]
    column = torch.arange(longest + seq, device=new_kv.device)
    row = torch.arange(longest, longest + seq, device=new_kv.device)
    filled = (column < past_len[:, None]) | (column >= longest)
    past = past_kv[int(slot), :, :longest]
    past = torch.where(filled[:, :longest, None], past, torch.zeros((), dtype=past.dtype, device=past.device))
    allowed = (column <= row[:, None]) & filled[:, None, :]
    return torch.cat([past, new_kv], 1), allowed.unsqueeze(2)


def attend_rows(scores: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of scores [B, S, H, L] in float32 where allowed, times rows [B, L, H or 1, W] -> [B, S, H, W]."""
    probabilities = torch.softmax(wide(scores).masked_fill(~allowed, float("-inf")), -1).to(rows.dtype)
    return torch.einsum("bshl,blhw->bshw", probabilities, rows.expand(-1, -1, scores.shape[2], -1))


# rotated = RoPE of `heads` [B, S, n, 2h] by cos, sin [B, S, h], in float32: pairs lie half a head apart (i, i + h).
ROTATE_HEADS = """
  heads_f = Cast <to = 1> (heads)
  first, second = Split <axis = -1, num_outputs = 2> (heads_f)
  axis_2 = Constant <value_ints = [2]> ()
  cos_n = Unsqueeze(cos, axis_2)
  sin_n = Unsqueeze(sin, axis_2)
  first_cos = Mul(first, cos_n)
  second_sin = Mul(second, sin_n)
  second_cos = Mul(second, cos_n)
  first_sin = Mul(first, sin_n)
  rotated_first = Sub(first_cos, second_sin)
  rotated_second = Add(second_cos, first_sin)
  rotated = Concat <axis = -1> (rotated_first, rotated_second)
"""

# allowed [B, S, 1, L]: row s sees its sequence's past_len rows and the new rows up to itself.
# live [B, P, 1]: the rows of the cache that hold something; a dead row is replaced, never added to, so its NaN is gone.
# Needs `seq` [1] = S.
MASK = """
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_last = Constant <value_ints = [-1]> ()
  scalar_shape = Constant <value_ints: ints = []> ()
  int_0 = Constant <value_int = 0> ()
  int_1 = Constant <value_int = 1> ()
  past_max = ReduceMax <keepdims = 0> (past_len)
  past_max_1 = Unsqueeze(past_max, axis_0)
  seq_scalar = Squeeze(seq, axis_0)
  total = Add(past_max, seq_scalar)
  total_1 = Unsqueeze(total, axis_0)
  column = Range(int_0, total, int_1)
  row = Range(past_max, total, int_1)
  row_1 = Unsqueeze(row, axis_1)
  past_len_1 = Unsqueeze(past_len, axis_1)
  causal = LessOrEqual(column, row_1)
  in_past = Less(column, past_len_1)
  is_new = GreaterOrEqual(column, past_max)
  filled = Or(in_past, is_new)
  filled_rows = Unsqueeze(filled, axis_1)
  allowed_3 = And(causal, filled_rows)
  allowed = Unsqueeze(allowed_3, axis_2)
  past_live = Slice(filled, axis_0, past_max_1, axis_1)
  live = Unsqueeze(past_live, axis_last)
  slot_1 = Reshape(slot, axis_1)
  slot_next = Add(slot_1, axis_1)
  slot_axes = Constant <value_ints = [0, 2]> ()
  slot_starts = Concat <axis = 0> (slot_1, axis_0)
  slot_ends = Concat <axis = 0> (slot_next, past_max_1)
  past_of_slot = Slice(past_kv, slot_starts, slot_ends, slot_axes)
  past_rows = Squeeze(past_of_slot, axis_0)
  empty = Constant <value_float = 0.0> ()
  empty_t = CastLike(empty, past_kv)
  past = Where(live, past_rows, empty_t)
"""

# probabilities [B, S, H, L] from `scores` of that shape, in float32: a mask selects, it is never added.
SOFTMAX = """
  scores_f = Cast <to = 1> (scores)
  never = Constant <value_float = -inf> ()
  masked = Where(allowed, scores_f, never)
  probabilities_f = Softmax <axis = -1> (masked)
  probabilities = CastLike(probabilities_f, past_kv)
"""
