"""ai.mythos RecurrentInput and RecurrentUpdate: what stands around the looped layers, float32 throughout.

h = A·h + B·e + Block(h, e), with e the prelude's output (Parcae-style stable injection, A = exp(-exp(log_dt + log_A))), a
depth-wise LoRA (arXiv 2410.20672) and adaptive halting (arXiv 1603.08983): the result is the halting-weighted sum of states.

Shape letters: B batch, S new tokens, D dim, L rows of the tables over loops, r lora_rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_export import overloads
from mythos_export.ops.engine_forms import small_product
from mythos_export.ops.operator import Body, Operator, rms_norm
from mythos_export.ops.products import FLOAT, flat_text, rms_norm_text


@torch.library.custom_op("mythos::recurrent_input", mutates_args=())
def recurrent_input(h: Tensor, e: Tensor, loop_signal: Tensor, norm: Tensor, loop: Tensor, epsilon: float) -> Tensor:
    """rms_norm(h + loop_signal[loop] + e). h, e [B, S, D]; loop_signal [L, D]; norm [D]; loop [] int64, from 0."""
    return rms_norm(h + loop_signal[int(loop)] + e, norm, epsilon)


@recurrent_input.register_fake
def _(h, e, loop_signal, norm, loop, epsilon):  # type: ignore[no-untyped-def]
    return torch.empty_like(h)


@torch.library.custom_op("mythos::recurrent_update", mutates_args=())
def recurrent_update(
    x: Tensor,
    h: Tensor,
    e: Tensor,
    result: Tensor,
    halted_mass: Tensor,
    exit_loop: Tensor,
    loop: Tensor,
    n_loops: Tensor,
    lora_down: Tensor,
    lora_scale: Tensor,
    lora_up: Tensor,
    decay: Tensor,
    injection: Tensor,
    halt: Tensor,
    halt_bias: Tensor,
    act_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state after a loop.

    x [B, S, D]: what the looped layers returned. h, e, result [B, S, D]; halted_mass [B, S, 1]; exit_loop [B, S, 1] int64.
    loop [] int64, from 0; n_loops [B] int64, or [1] for all rows: a row's result stands still from there on. lora_down [r, D],
    lora_scale [L, r], lora_up [r, D]; decay, injection, halt [D]; halt_bias [1].
    Returns h = decay * h + injection * e + x + LoRA(x), and with p = sigmoid(halt · h + halt_bias) the result, halted_mass and
    exit_loop advanced where the token still runs.
    """
    x = x + F.linear(x, lora_down) * lora_scale[int(loop)] @ lora_up
    h = decay * h + injection * e + x
    # Not torch.sigmoid: runtimes approximate it to 1e-7 absolute, but a small probability needs relative accuracy.
    probability = 1.0 / (1.0 + torch.exp(-((h * halt).sum(-1, keepdim=True) + halt_bias)))
    running = (halted_mass < act_threshold) & (loop < n_loops).reshape(-1, 1, 1)
    mass = halted_mass + probability
    weight = torch.where(mass >= act_threshold, torch.clamp(1.0 - halted_mass, min=0.0), probability)
    return (
        h,
        torch.where(running, result + weight * h, result),
        torch.where(running, mass, halted_mass),
        exit_loop + running.to(torch.int64),
    )


@recurrent_update.register_fake
def _(x, h, e, result, halted_mass, exit_loop, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(h), torch.empty_like(result), torch.empty_like(halted_mass), torch.empty_like(exit_loop)


INPUT = Operator(
    name="RecurrentInput",
    doc="What enters the looped layers: rms_norm(h + loop_signal[loop] + e).",
    inputs=(
        ("h", "tensor(float)", "[batch, seq, dim]: the state"),
        ("e", "tensor(float)", "[batch, seq, dim]: the prelude's output"),
        ("loop_signal", "tensor(float)", "[loops, dim]"),
        ("norm", "tensor(float)", "[dim]: weight of the RMSNorm"),
        ("loop", "tensor(int64)", "[]: number of the loop, from 0"),
    ),
    outputs=(("y", "tensor(float)", "[batch, seq, dim]"),),
    attributes={"epsilon": ("FLOAT", "epsilon of the RMSNorm")},
    torch_op=torch.ops.mythos.recurrent_input.default,
    infer_shapes=lambda shapes, _: [list(shapes[0])],
    body=f"""
  scalar_shape = Constant <value_ints = [1]> ()
  row = Reshape(loop, scalar_shape)
  signal = Gather <axis = 0> (loop_signal, row)
  with_signal = Add(h, signal)
  sum = Add(with_signal, e)
  {rms_norm_text("sum", "norm", "y")}
""",
)


def _update_body(low: str, lora: str, logit: str) -> str:
    """low [B*S, r] = flat · lora_down^T, lora_flat [B*S, D] = low_scaled · lora_up, logit_0 [B, S, 1] = next_h · halt."""
    return f"""
  one_1 = Constant <value_ints = [1]> ()
  row = Reshape(loop, one_1)
  lora_row = Gather <axis = 0> (lora_scale, row)
  {flat_text("x", "flat")}
  {low}
  low_scaled = Mul(low, lora_row)
  {lora}
  x_shape = Shape(x)
  lora = Reshape(lora_flat, x_shape)
  x_lora = Add(x, lora)
  kept = Mul(decay, h)
  injected = Mul(injection, e)
  driven = Add(kept, injected)
  next_h = Add(driven, x_lora)

  # 1 / (1 + exp(-x)), not Sigmoid: a small probability needs relative accuracy
  {logit}
  logit = Add(logit_0, halt_bias)
  minus = Neg(logit)
  exponential = Exp(minus)
  one = Constant <value_float = 1.0> ()
  zero = Constant <value_float = 0.0> ()
  denominator = Add(exponential, one)
  probability = Reciprocal(denominator)
  threshold = Constant <value_float: float = @act_threshold> ()
  not_halted = Less(halted_mass, threshold)
  in_depth = Less(loop, n_loops)
  depth_shape = Constant <value_ints = [-1, 1, 1]> ()
  wanted = Reshape(in_depth, depth_shape)
  running = And(not_halted, wanted)
  mass = Add(halted_mass, probability)
  left = Sub(one, halted_mass)
  remainder = Max(left, zero)
  reaches = GreaterOrEqual(mass, threshold)
  weight = Where(reaches, remainder, probability)
  weighted = Mul(weight, next_h)
  more = Add(result, weighted)
  next_result = Where(running, more, result)
  next_halted_mass = Where(running, mass, halted_mass)
  step = Cast <to = 7> (running)
  next_exit_loop = Add(exit_loop, step)
"""


_PORTABLE_UPDATE = _update_body(
    FLOAT.product("flat", "lora_down", "low"),
    "lora_flat = MatMul(low_scaled, lora_up)",
    """halt_axis = Constant <value_ints = [1]> ()
  halt_column = Unsqueeze(halt, halt_axis)
  logit_0 = MatMul(next_h, halt_column)""",
)

_ENGINE_UPDATE = _update_body(
    small_product("flat", "lora_down", "low"),
    """lora_axis = Constant <value_ints = [2]> ()
  low_column = Unsqueeze(low_scaled, lora_axis)
  lora_terms = Mul(low_column, lora_up)
  lora_flat = ReduceSum <keepdims = 0> (lora_terms, one_1)""",
    """halt_last = Constant <value_ints = [-1]> ()
  halt_terms = Mul(next_h, halt)
  logit_0 = ReduceSum <keepdims = 1> (halt_terms, halt_last)""",
)

UPDATE = Operator(
    name="RecurrentUpdate",
    doc="The end of a loop: depth-wise LoRA (arXiv 2410.20672), injection h = decay * h + injection * e + x, and adaptive halting "
    "(arXiv 1603.08983).",
    inputs=(
        ("x", "tensor(float)", "[batch, seq, dim]: what the looped layers returned"),
        ("h", "tensor(float)", "[batch, seq, dim]: the state"),
        ("e", "tensor(float)", "[batch, seq, dim]: the prelude's output"),
        ("result", "tensor(float)", "[batch, seq, dim]: halting-weighted sum of states so far"),
        ("halted_mass", "tensor(float)", "[batch, seq, 1]: halting probability so far, frozen at the threshold"),
        ("exit_loop", "tensor(int64)", "[batch, seq, 1]: loops run while not halted"),
        ("loop", "tensor(int64)", "[]: number of the loop, from 0"),
        ("n_loops", "tensor(int64)", "[batch], or [1] for all: depth of each sequence"),
        ("lora_down", "tensor(float)", "[lora_rank, dim]"),
        ("lora_scale", "tensor(float)", "[loops, lora_rank]"),
        ("lora_up", "tensor(float)", "[lora_rank, dim]"),
        ("decay", "tensor(float)", "[dim]"),
        ("injection", "tensor(float)", "[dim]"),
        ("halt", "tensor(float)", "[dim]"),
        ("halt_bias", "tensor(float)", "[1]"),
    ),
    outputs=(
        ("next_h", "tensor(float)", "[batch, seq, dim]"),
        ("next_result", "tensor(float)", "[batch, seq, dim]"),
        ("next_halted_mass", "tensor(float)", "[batch, seq, 1]"),
        ("next_exit_loop", "tensor(int64)", "[batch, seq, 1]"),
    ),
    attributes={"act_threshold": ("FLOAT", "cumulative halting probability at which a token stops")},
    torch_op=torch.ops.mythos.recurrent_update.default,
    infer_shapes=lambda shapes, _: [list(shapes[1]), list(shapes[3]), list(shapes[4]), list(shapes[5])],
    body=_PORTABLE_UPDATE,
    other_bodies={overloads.ENGINE: Body(_ENGINE_UPDATE)},
)
