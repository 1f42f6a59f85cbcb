"""What both attention operators share: RoPE, which rows are live, who may see whom. In torch, then as ONNX statements.

The cache is a ring: the row of position p stands at p mod C. A sequence longer than C has lost its oldest rows, which only windows
allow, of at most C + 1 positions.

Shape letters: B batch, S new tokens, H heads, C capacity and W width of the cache, P = min(max(past_len), C), L = P + S,
n any number of heads, h half their size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mythos_export.ops.operator import Body, Operator, Shape, wide
from mythos_export.ops.products import SMALLEST


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (arXiv 2104.09864) of heads [B, S, n, 2h] by cos, sin [B, S, h]; pairs lie half a head apart."""
    first, second = wide(heads).chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Cache(NamedTuple):
    """What an attention operator is given of the cache.

    past_kv [slots, B, C, W], past_len [B] int64, slot [] int64: this layer's. past_scale [slots, B, C] float32: of each row where
    past_kv is int8. row_scale: of every new int8 row, numbers beyond 127 levels cut off; 0 for each row's own, its largest
    magnitude / 127.
    """

    past_kv: Tensor
    past_len: Tensor
    slot: Tensor
    past_scale: Tensor | None = None
    row_scale: float = 0.0


class CachedRows(NamedTuple):
    """The rows of new tokens as the cache holds them, and as attention reads them.

    new_kv [B, S, W] in the dtype of the cache; new_scale [B, S] float32 where that is int8, else None; rows [B, S, W]: the same
    numbers in the dtype of the queries.
    """

    new_kv: Tensor
    new_scale: Tensor | None
    rows: Tensor

    @property
    def present_scale(self) -> Tensor:
        """new_scale of an int8 cache."""
        if self.new_scale is None:
            raise TypeError("past_kv is not int8")
        return self.new_scale


def store_rows(rows: Tensor, cache: Cache, dtype: torch.dtype) -> CachedRows:
    """Rounds rows [B, S, W] to what the cache holds; dtype: of the queries."""
    if cache.past_kv.dtype != torch.int8:
        # A cache as wide as the arithmetic loses nothing, so float64 inputs stay what they are.
        new_kv = rows.to(cache.past_kv.dtype)
        return CachedRows(new_kv, None, new_kv.to(dtype))
    largest = rows.abs().amax(-1, keepdim=True)
    if cache.row_scale:
        scale = torch.full_like(largest, cache.row_scale)
        inverse = 1.0 / scale
    else:
        scale = largest / 127.0
        inverse = torch.where(largest > SMALLEST, torch.full_like(largest, 127.0) / largest, 0.0)
    levels = (rows * inverse).round().clamp(-127.0, 127.0)
    return CachedRows(levels.to(torch.int8), scale.squeeze(-1).float(), (levels * scale).to(dtype))


def live_past(cache: Cache, rows: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to attend to [B, L, W], dead ones replaced by 0, and who may see whom [B, S, 1, L].

    rows [B, S, W]: the new ones. window: positions a token sees, itself included; 0 for all.
    """
    past_len, slot, (seq, capacity) = cache.past_len[:, None], int(cache.slot), (rows.shape[1], cache.past_kv.shape[2])
    count = min(int(past_len.max()), capacity)
    behind = past_len - 1 - torch.arange(count, device=rows.device)
    past_position = past_len - 1 - behind.remainder(max(capacity, 1))  # [B, P]: below 0 where a row holds nothing
    new_position = past_len + torch.arange(seq, device=rows.device)  # [B, S]
    live = (past_position >= 0).unsqueeze(2)
    past = wide(cache.past_kv[slot, :, :count])
    if cache.past_scale is not None:
        past = past * cache.past_scale[slot, :, :count, None]
    past = past.to(rows.dtype)
    past = torch.where(live, past, torch.zeros((), dtype=past.dtype, device=past.device))
    seen, row = torch.cat([past_position, new_position], 1).unsqueeze(1), new_position.unsqueeze(2)
    allowed = (seen >= 0) & (seen <= row)
    if window:
        allowed = allowed & (seen > row - window)
    return torch.cat([past, rows], 1), allowed.unsqueeze(2)


def attend_rows(scores: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of scores [B, S, H, L] in float32 where allowed, times rows [B, L, H or 1, W] -> [B, S, H, W]."""
    probabilities = torch.softmax(wide(scores).masked_fill(~allowed, float("-inf")), -1).to(rows.dtype)
    return torch.einsum("bshl,blhw->bshw", probabilities, rows.expand(-1, -1, scores.shape[2], -1))


# {y} = RoPE of {x} [B, S, n, 2h] by cos, sin [B, S, h], in float32: pairs lie half a head apart (i, i + h).
_ROTATE = """
  {x}_f = Cast <to = 1> ({x})
  {x}_first, {x}_second = Split <axis = -1, num_outputs = 2> ({x}_f)
  {x}_axis = Constant <value_ints = [2]> ()
  {x}_cos = Unsqueeze(cos, {x}_axis)
  {x}_sin = Unsqueeze(sin, {x}_axis)
  {x}_first_cos = Mul({x}_first, {x}_cos)
  {x}_second_sin = Mul({x}_second, {x}_sin)
  {x}_second_cos = Mul({x}_second, {x}_cos)
  {x}_first_sin = Mul({x}_first, {x}_sin)
  {x}_rotated_first = Sub({x}_first_cos, {x}_second_sin)
  {x}_rotated_second = Add({x}_second_cos, {x}_first_sin)
  {y} = Concat <axis = -1> ({x}_rotated_first, {x}_rotated_second)
"""


def rotate_text(x: str, y: str) -> str:
    """Statements that rotate x; see above."""
    return _ROTATE.format(x=x, y=y)


# allowed [B, S, 1, L]: row s sees its sequence's past_len rows and the new rows up to itself, of those the last `window`.
# past [B, P, W] in the dtype of `fresh`: rows of the cache, as many as the longest sequence has; a dead one is replaced, never
# added to, so its NaN is gone. total_1 [1] = L.
# Needs `seq` [1] = S, `fresh` [B, S, W] and, with a window, the attribute of that name.
_PAST = """
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  axis_last = Constant <value_ints = [-1]> ()
  int_0 = Constant <value_int = 0> ()
  int_1 = Constant <value_int = 1> ()
  {POSITIONS}
  slot_1 = Reshape(slot, axis_1)
  slot_next = Add(slot_1, axis_1)
  slot_axes = Constant <value_ints = [0, 2]> ()
  slot_starts = Concat <axis = 0> (slot_1, axis_0)
  slot_ends = Concat <axis = 0> (slot_next, past_max_1)
  past_of_slot = Slice(past_kv, slot_starts, slot_ends, slot_axes)
  past_stored = Squeeze(past_of_slot, axis_0)
  {VALUES}
  empty = Constant <value_float = 0.0> ()
  empty_t = CastLike(empty, fresh)
  past = Where(live, past_rows, empty_t)
"""

# Which rows are live and who may see whom, where the cache holds every position: column and row stand at their own place.
_ALL_POSITIONS = """
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
"""

# The same where it may hold the last ones only. past_position is below 0 where a row holds nothing; Mod is never negative.
_LAST_POSITIONS = """
  capacity = Shape <start = 2, end = 3> (past_kv)
  longest = ReduceMax <keepdims = 0> (past_len)
  past_max_1 = Min(longest, capacity)
  past_max = Squeeze(past_max_1, axis_0)
  seq_scalar = Squeeze(seq, axis_0)
  total_1 = Add(past_max_1, seq)
  past_column = Range(int_0, past_max, int_1)
  new_column = Range(int_0, seq_scalar, int_1)
  past_len_1 = Unsqueeze(past_len, axis_1)
  last = Sub(past_len_1, int_1)
  behind = Sub(last, past_column)
  behind_in_ring = Mod(behind, capacity)
  past_position = Sub(last, behind_in_ring)
  new_position = Add(past_len_1, new_column)
  position = Concat <axis = 1> (past_position, new_position)
  seen = Unsqueeze(position, axis_1)
  row = Unsqueeze(new_position, axis_2)
  causal = LessOrEqual(seen, row)
  filled = GreaterOrEqual(seen, int_0)
  allowed_3 = And(causal, filled)
  window_int = Constant <value_int: int = @window> ()
  no_window = LessOrEqual(window_int, int_0)
  first_seen = Sub(row, window_int)
  in_window = Greater(seen, first_seen)
  in_reach = Or(in_window, no_window)
  allowed_w = And(allowed_3, in_reach)
  allowed = Unsqueeze(allowed_w, axis_2)
  past_live = GreaterOrEqual(past_position, int_0)
  live = Unsqueeze(past_live, axis_last)
"""

_INT8_VALUES = """
  scale_of_slot = Slice(past_scale, slot_starts, slot_ends, slot_axes)
  scale_rows = Squeeze(scale_of_slot, axis_0)
  scale_column = Unsqueeze(scale_rows, axis_last)
  past_levels = Cast <to = 1> (past_stored)
  past_wide = Mul(past_levels, scale_column)
  past_rows = CastLike(past_wide, fresh)
"""


def past_text(*, int8: bool, window: bool) -> str:
    """Statements that give `allowed` and `past`; see above. int8: past_kv holds int8 rows, with past_scale."""
    text = _PAST.replace("{POSITIONS}", _LAST_POSITIONS if window else _ALL_POSITIONS)
    return text.replace("{VALUES}", _INT8_VALUES if int8 else "past_rows = CastLike(past_stored, fresh)")


# From rows [B, S, W] in float32: new_kv as the cache holds them, fresh as attention reads them (in the dtype of `like`).
_STORE = """
  new_kv = CastLike(rows_f, past_kv)
  fresh = CastLike(new_kv, {like})
"""

_STORE_INT8 = f"""
  store_last = Constant <value_ints = [-1]> ()
  row_size = Abs(rows_f)
  row_largest = ReduceMax <keepdims = 1> (row_size, store_last)
  store_127 = Constant <value_float = 127.0> ()
  store_none = Constant <value_float = 0.0> ()
  store_least = Constant <value_float = {SMALLEST}> ()
  own_scale = Div(row_largest, store_127)
  own_any = Greater(row_largest, store_least)
  own_ratio = Div(store_127, row_largest)
  own_inverse = Where(own_any, own_ratio, store_none)
  fixed_scale = Constant <value_float: float = @row_scale> ()
  fixed_inverse = Reciprocal(fixed_scale)
  is_fixed = Greater(fixed_scale, store_none)
  row_scales = Where(is_fixed, fixed_scale, own_scale)
  row_inverse = Where(is_fixed, fixed_inverse, own_inverse)
  row_scaled = Mul(rows_f, row_inverse)
  row_rounded = Round(row_scaled)
  store_minus_127 = Neg(store_127)
  row_levels = Clip(row_rounded, store_minus_127, store_127)
  new_kv = Cast <to = 3> (row_levels)
  new_scale = Squeeze(row_scales, store_last)
  fresh_f = Mul(row_levels, row_scales)
  fresh = CastLike(fresh_f, {{like}})
"""


def store_text(like: str, *, int8: bool) -> str:
    """Statements that give `new_kv` (and `new_scale`) and `fresh` from `rows_f`."""
    return (_STORE_INT8 if int8 else _STORE).replace("{like}", like)


# probabilities [B, S, H, L] from `scores` of that shape, in float32: a mask selects, it is never added.
SOFTMAX = """
  scores_f = Cast <to = 1> (scores)
  never = Constant <value_float = -inf> ()
  masked = Where(allowed, scores_f, never)
  probabilities_f = Softmax <axis = -1> (masked)
  probabilities = CastLike(probabilities_f, fresh)
"""


def with_int8_cache(operator: Operator, torch_op: Any, body: str) -> Operator:
    """The operator's form for an int8 cache: …Int8Cache, with past_scale after past_kv and new_scale after new_kv."""
    inputs: list[tuple[str, str, str]] = []
    for name, kind, text in operator.inputs:
        inputs.append((name, "tensor(int8)" if name == "past_kv" else kind, text))
        if name == "past_kv":
            inputs.append(("past_scale", "tensor(float)", "[slots, batch, capacity]: of each row"))
    at = [name for name, _, _ in inputs].index("past_scale")

    def infer_shapes(shapes: list[Shape], attributes: dict[str, Any]) -> list[Shape]:
        y, new_kv = operator.infer_shapes([*shapes[:at], *shapes[at + 1 :]], attributes)
        return [y, new_kv, list(new_kv)[:2]]

    return replace(
        operator,
        name=f"{operator.name}Int8Cache",
        doc=f"{operator.doc} The cache holds int8 rows, each with a scale.",
        inputs=tuple(inputs),
        outputs=(
            operator.outputs[0],
            ("new_kv", "tensor(int8)", operator.outputs[1][2]),
            ("new_scale", "tensor(float)", "[batch, seq]: of each new row"),
        ),
        attributes={
            **operator.attributes,
            "row_scale": ("FLOAT", "of all new rows, larger numbers cut off; 0: each its own, largest magnitude / 127"),
        },
        torch_op=torch_op,
        infer_shapes=infer_shapes,
        body=body,
        other_bodies=float_cache_bodies(operator),
    )


def float_cache_bodies(operator: Operator) -> dict[str, Body]:
    """The bodies for engines of an operator's int8-cache form: as over float rows, which is what caches of engines hold. new_scale
    is there for loops to hand on, and 0."""
    zeros = """
  scale_shape = Shape <start = 0, end = 2> (new_kv)
  new_scale = ConstantOfShape(scale_shape)
"""
    inputs = tuple(name for name, _, _ in operator.inputs)
    return {name: Body(body.text + zeros, inputs) for name, body in operator.other_bodies.items()}
