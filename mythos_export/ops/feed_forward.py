"""ai.mythos FeedForward: the dense SwiGLU block (arXiv 2002.05202) of a pre-norm layer, with its norm and residual.

Shape letters: D dim, F hidden channels, b blocks of input channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_export import overloads
from mythos_export.ops.engine_forms import ENGINE, ENGINE_QUANTIZED
from mythos_export.ops.operator import Body, Operator, rms_norm, wide
from mythos_export.ops.products import (
    FLOAT,
    ActivationRounding,
    FloatForm,
    QuantizedForm,
    dequantize,
    flat_text,
    quantized,
    rms_norm_text,
)


@torch.library.custom_op("mythos::feed_forward", mutates_args=())
def feed_forward(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, epsilon: float) -> Tensor:
    """x + SwiGLU(rms_norm(x)). x [..., D] float32, norm [D] float32, gate_up [2F, D]: gate, then up; down [D, F]."""
    gate, up = F.linear(rms_norm(wide(x), norm, epsilon).to(gate_up.dtype), gate_up).chunk(2, -1)
    return x + wide(F.linear(F.silu(gate) * up, down))


@feed_forward.register_fake
def _(x, norm, gate_up, down, epsilon):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("mythos::quantized_feed_forward", mutates_args=())
def quantized_feed_forward(
    x: Tensor,
    norm: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    activation_scale: Tensor,
    epsilon: float,
    block_size: int,
    activation_type: int,
) -> Tensor:
    """The same with gate_up and down as `dequantize` takes them, their inputs rounded as ActivationRounding says."""
    rounded = ActivationRounding(activation_scale, 2, block_size, activation_type)
    normed = rounded(rms_norm(wide(x), norm, epsilon), 0)
    gate, up = F.linear(normed, dequantize(gate_up, gate_up_scale, block_size).to(x.dtype)).chunk(2, -1)
    activated = rounded(F.silu(gate) * up, 1)
    return x + F.linear(activated, dequantize(down, down_scale, block_size).to(x.dtype))


def _body(form: FloatForm) -> str:
    cast = "CastLike(normed, gate_up)" if form is FLOAT else "Identity(normed)"
    return f"""
  {form.preamble}
  {rms_norm_text("x", "norm", "normed")}
  normed_t = {cast}
  {flat_text("normed_t", "flat")}
  {form.product("flat", "gate_up", "inner")}
  gate, up = Split <axis = 1, num_outputs = 2> (inner)
  sigmoid = Sigmoid(gate)
  silu = Mul(gate, sigmoid)
  activated = Mul(silu, up)
  {form.product("activated", "down", "outer_flat", product=1)}
  y_shape = Shape(x)
  outer = Reshape(outer_flat, y_shape)
  outer_f = Cast <to = 1> (outer)
  y = Add(x, outer_f)
"""


OPERATOR = Operator(
    name="FeedForward",
    doc="The dense SwiGLU block of a pre-norm layer: x + down(silu(gate(n)) * up(n)) with n = rms_norm(x) (arXiv 2002.05202).",
    inputs=(
        ("x", "tensor(float)", "[batch, seq, dim]"),
        ("norm", "tensor(float)", "[dim]: weight of the RMSNorm"),
        ("gate_up", "T", "[2 * hidden_dim, dim]: rows of gate, then of up"),
        ("down", "T", "[dim, hidden_dim]"),
    ),
    outputs=(("y", "tensor(float)", "[batch, seq, dim]"),),
    attributes={"epsilon": ("FLOAT", "epsilon of the RMSNorm")},
    torch_op=torch.ops.mythos.feed_forward.default,
    infer_shapes=lambda shapes, _: [list(shapes[0])],
    body=_body(FLOAT),
    other_bodies={overloads.ENGINE: Body(_body(ENGINE))},
)

QUANTIZED = quantized(
    OPERATOR,
    torch.ops.mythos.quantized_feed_forward.default,
    _body(QuantizedForm()),
    weights=("gate_up", "down"),
    other_bodies={overloads.ENGINE: Body(_body(ENGINE_QUANTIZED))},
)
