"""ai.mythos NormalizedLinear and ResidualLinear: the linear layers of a pre-norm transformer with what stands around them.

Shape letters: I input and O output channels, b blocks of the input channels.
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


@torch.library.custom_op("mythos::normalized_linear", mutates_args=())
def normalized_linear(x: Tensor, norm: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """rms_norm(x) · weight^T. x [..., I], norm [I] float32, weight [O, I]. Returns [..., O] in the dtype of weight."""
    return F.linear(rms_norm(wide(x), norm, epsilon).to(weight.dtype), weight)


@normalized_linear.register_fake
def _(x, norm, weight, epsilon):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype)


@torch.library.custom_op("mythos::quantized_normalized_linear", mutates_args=())
def quantized_normalized_linear(
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    epsilon: float,
    block_size: int,
    activation_type: int,
) -> Tensor:
    """The same with weight as `dequantize` takes it, x rounded as ActivationRounding says."""
    rounded = ActivationRounding(activation_scale, 1, block_size, activation_type)
    normed = rounded(rms_norm(wide(x), norm, epsilon))
    return F.linear(normed, dequantize(weight, weight_scale, block_size).to(normed.dtype))


@torch.library.custom_op("mythos::residual_linear", mutates_args=())
def residual_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x · weight^T. residual [..., O] float32, x [..., I], weight [O, I]. Returns [..., O] float32."""
    return residual + wide(F.linear(x, weight))


@residual_linear.register_fake
def _(residual, x, weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(residual)


@torch.library.custom_op("mythos::quantized_residual_linear", mutates_args=())
def quantized_residual_linear(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activation_scale: Tensor,
    block_size: int,
    activation_type: int,
) -> Tensor:
    """The same with weight as `dequantize` takes it, x rounded as ActivationRounding says."""
    rounded = ActivationRounding(activation_scale, 1, block_size, activation_type)(x)
    return residual + F.linear(rounded, dequantize(weight, weight_scale, block_size).to(rounded.dtype))


def _normalized(form: FloatForm) -> str:
    cast = "CastLike(normed, weight)" if form is FLOAT else "Identity(normed)"
    return f"""
  {form.preamble}
  {rms_norm_text("x", "norm", "normed")}
  normed_t = {cast}
  {flat_text("normed_t", "flat")}
  {form.product("flat", "weight", "y_flat")}
  lead = Shape <end = -1> (x)
  n_out = Shape <start = 0, end = 1> (weight)
  y_shape = Concat <axis = 0> (lead, n_out)
  y = Reshape(y_flat, y_shape)
"""


def _residual(form: FloatForm) -> str:
    return f"""
  {form.preamble}
  {flat_text("x", "flat")}
  {form.product("flat", "weight", "product_flat")}
  y_shape = Shape(residual)
  product = Reshape(product_flat, y_shape)
  product_f = Cast <to = 1> (product)
  y = Add(residual, product_f)
"""


NORMALIZED_LINEAR = Operator(
    name="NormalizedLinear",
    doc="A linear layer on RMS-normalized input: rms_norm(x) times weight transposed (arXiv 1910.07467). The norm is float32.",
    inputs=(
        ("x", "X", "[..., in]"),
        ("norm", "tensor(float)", "[in]: weight of the RMSNorm"),
        ("weight", "T", "[out, in]"),
    ),
    outputs=(("y", "T", "[..., out]"),),
    attributes={"epsilon": ("FLOAT", "epsilon of the RMSNorm")},
    torch_op=torch.ops.mythos.normalized_linear.default,
    infer_shapes=lambda shapes, _: [[*shapes[0][:-1], shapes[2][0]]],
    body=_normalized(FLOAT),
    other_bodies={overloads.ENGINE: Body(_normalized(ENGINE))},
)

RESIDUAL_LINEAR = Operator(
    name="ResidualLinear",
    doc="A linear layer added to the residual stream: residual + x times weight transposed.",
    inputs=(
        ("residual", "tensor(float)", "[..., out]"),
        ("x", "T", "[..., in]"),
        ("weight", "T", "[out, in]"),
    ),
    outputs=(("y", "tensor(float)", "[..., out]"),),
    attributes={},
    torch_op=torch.ops.mythos.residual_linear.default,
    infer_shapes=lambda shapes, _: [list(shapes[0])],
    body=_residual(FLOAT),
    other_bodies={overloads.ENGINE: Body(_residual(ENGINE))},
)

QUANTIZED_NORMALIZED_LINEAR = quantized(
    NORMALIZED_LINEAR,
    torch.ops.mythos.quantized_normalized_linear.default,
    _normalized(QuantizedForm()),
    weights=("weight",),
    other_bodies={overloads.ENGINE: Body(_normalized(ENGINE_QUANTIZED))},
)

QUANTIZED_RESIDUAL_LINEAR = quantized(
    RESIDUAL_LINEAR,
    torch.ops.mythos.quantized_residual_linear.default,
    _residual(QuantizedForm()),
    weights=("weight",),
    other_bodies={overloads.ENGINE: Body(_residual(ENGINE_QUANTIZED))},
)
