"""Products with weight matrices, in torch and as ONNX statements: as floats, or block-quantized.

A quantized matrix [..., O, I] is stored as numbers of few bits with a scale for every block of block_size input channels,
symmetric: int8; int4 two a byte, the first in the low half, in two's complement; or float8e4m3fn (arXiv 2209.05433).

Its input is rounded as the attribute activation_type, an ONNX element type, says: FLOAT, not at all; INT8 or FLOAT8E4M3FN, as
QuantizeLinear and DequantizeLinear do, but symmetrically. The input activation_scale holds the static scales, one for every
product of the operator in order; without any, INT8 takes a scale for every block of every token (dynamic scales).

Shape letters: T tokens, I input and O output channels, b blocks of the input channels, E any leading dimensions, n products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from mythos_export.ops.operator import Body, Operator, Shape, wide
from runtimes.errors import InputError

SMALLEST = 1e-30  # a block of nothing larger is zero
INT8_MAX, FLOAT8_MAX = 127.0, 448.0  # the largest levels; -128 is left out, so that levels are symmetric


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [E, O, I/2] -> int8 [E, O, I]: the low half of each byte first, both in two's complement."""
    pair = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    signed: Tensor = ((pair ^ 8).to(torch.int16) - 8).to(torch.int8)
    return signed


def dequantize(weight: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """int8, packed int4 or float8 weights and scales [E, O, b] -> float32 [E, O, I] (float64 where the scales are)."""
    scale = wide(scale)
    levels = (unpack_int4(weight) if weight.dtype == torch.uint8 else weight).to(scale.dtype)
    weights: Tensor = levels * scale.repeat_interleave(block_size, -1)[..., : levels.shape[-1]]
    return weights


@dataclass(frozen=True)
class ActivationRounding:
    """What an operator of n_products products does to their inputs.

    activation_scale: [0] or [n_products], positive; not looked at for FLOAT. activation_type: FLOAT, INT8 or FLOAT8E4M3FN of
    onnx.TensorProto. Raises InputError where these do not fit each other.
    """

    activation_scale: Tensor
    n_products: int
    block_size: int
    activation_type: int

    def __post_init__(self) -> None:
        known = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
        if self.activation_type not in known:
            raise InputError(f"activation_type is {self.activation_type}; expected one of {', '.join(map(str, known))}")
        if self.activation_type == TensorProto.FLOAT:
            return
        scale, n = self.activation_scale, self.activation_scale.numel()
        if n not in (0, self.n_products):
            raise InputError(f"activation_scale holds {n} scales; expected none or {self.n_products}, one a product")
        if self.activation_type == TensorProto.FLOAT8E4M3FN and n == 0:
            raise InputError("activation_scale is empty; FLOAT8E4M3FN needs static scales, one a product")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise InputError("activation_scale holds a scale that is not positive and finite; calibrate again")

    def __call__(self, x: Tensor, product: int = 0) -> Tensor:
        """x [..., I] as product number `product` sees it."""
        if self.activation_type == TensorProto.FLOAT:
            return x
        if self.activation_scale.numel() == 0:
            return round_blocks(x, self.block_size)
        return round_static(x, self.activation_scale[product].to(x.dtype), self.activation_type)


def round_blocks(x: Tensor, block_size: int) -> Tensor:
    """x [..., I] rounded to the nearest of 255 levels of each block's largest magnitude, ties to even."""
    channels = x.shape[-1]
    blocks: Tensor = F.pad(x, (0, -channels % block_size)).unflatten(-1, (-1, block_size))
    largest = blocks.abs().amax(-1, keepdim=True)
    # A true quotient: torch computes 127.0 / x as 127 times the reciprocal.
    inverse = torch.where(largest > SMALLEST, torch.full_like(largest, INT8_MAX) / largest, 0.0)
    rounded: Tensor = ((blocks * inverse).round() * (largest / INT8_MAX)).flatten(-2)[..., :channels]
    return rounded


def round_static(x: Tensor, scale: Tensor, activation_type: int) -> Tensor:
    """x rounded to the nearest of the levels of INT8 or FLOAT8E4M3FN times scale [], ties to even; what is beyond, to the last."""
    if activation_type == TensorProto.INT8:
        return (x / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale
    levels = (x / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    return levels.to(x.dtype) * scale


class FloatForm:
    """How an operator's body multiplies with its matrices: as they are."""

    preamble = ""  # statements at the head of the body; subgraphs cannot refer to attributes in every runtime

    def stack(self, weight: str) -> str:
        """The name of stacked matrices [E, O, I] that can be gathered and scanned."""
        return weight

    def product(self, x: str, weight: str, y: str, product: int = 0) -> str:
        """y [T, O] = x [T, I] · weight [O, I]^T. The matrix stands on the left: no transposed copy of it is ever made."""
        return f"""
  {y}_in = Transpose <perm = [1, 0]> ({x})
  {y}_out = MatMul({weight}, {y}_in)
  {y} = Transpose <perm = [1, 0]> ({y}_out)
"""

    def matrix(self, weight: str, scale: str, out: str) -> str:
        """out: the matrix as floats."""
        return f"  {out} = Identity({weight})\n"

    def rounded(self, x: str, out: str, product: int = 0) -> str:
        """out [T, I]: x as product number `product` of the operator sees it."""
        return f"  {out} = Identity({x})\n"


class QuantizedForm(FloatForm):
    """The same with block-quantized matrices, each with its scales in an input NAME_scale."""

    preamble = """
  block_size_int = Constant <value_int: int = @block_size> ()
  block_size_axis = Constant <value_ints = [0]> ()
  block_size_1 = Unsqueeze(block_size_int, block_size_axis)
  activation_type_int = Constant <value_int: int = @activation_type> ()
  type_int8 = Constant <value_int = 3> ()
  type_float8 = Constant <value_int = 17> ()
  to_int8 = Equal(activation_type_int, type_int8)
  to_float8 = Equal(activation_type_int, type_float8)
  to_levels = Or(to_int8, to_float8)
  n_scales = Size(activation_scale)
  no_scales = Constant <value_int = 0> ()
  has_scales = Greater(n_scales, no_scales)
  is_static = And(to_levels, has_scales)
  # there is a scale to take in branches that are not taken as well
  spare_scales = Constant <value_floats = [1.0, 1.0]> ()
  activation_scales = Concat <axis = 0> (activation_scale, spare_scales)
"""

    def product(self, x: str, weight: str, y: str, product: int = 0) -> str:
        return (
            self.rounded(x, f"{y}_rounded", product)
            + self.matrix(weight, f"{weight}_scale", f"{y}_weight")
            + super().product(f"{y}_rounded", f"{y}_weight", y)
        )

    def matrix(self, weight: str, scale: str, out: str) -> str:
        return f"""
  {out}_scale = Cast <to = 1> ({scale})
  {out} = DequantizeLinear <axis = -1, block_size: int = @block_size> ({weight}, {out}_scale)
"""

    def rounded(self, x: str, out: str, product: int = 0) -> str:
        return _ROUND.format(x=x, out=out, product=product)


class PackedForm(QuantizedForm):
    """The same where int4 comes as uint8, which can be gathered and scanned; the attribute bits tells."""

    preamble = (
        QuantizedForm.preamble
        + """
  bits_int = Constant <value_int: int = @bits> ()
  bits_4 = Constant <value_int = 4> ()
  is_packed = Equal(bits_int, bits_4)
"""
    )

    def matrix(self, weight: str, scale: str, out: str) -> str:
        return _UNPACK.format(weight=weight, scale=scale, out=out)


class DequantizedForm(QuantizedForm):
    """The same with stacks of matrices that are dequantized as a whole, before any is picked."""

    def __init__(self, *stacks: str) -> None:
        dequantized = "".join(QuantizedForm.matrix(self, name, f"{name}_scale", self.stack(name)) for name in stacks)
        self.preamble = QuantizedForm.preamble + dequantized

    def stack(self, weight: str) -> str:
        return f"{weight}_dequantized"

    def matrix(self, weight: str, scale: str, out: str) -> str:
        return FloatForm.matrix(self, weight, scale, out)


FLOAT = FloatForm()

# {out} [E, O, I] from int8 [E, O, I], or from uint8 [E, O, I/2] where it is packed, and scales [E, O, b].
_UNPACK = """
  {out}_last = Constant <value_ints = [-1]> ()
  {out}_int = If (is_packed) <
    then_branch = unpack () => ({out}_unpacked) {{
      {out}_bytes = Cast <to = 2> ({weight})
      {out}_15 = Constant <value = uint8 {{15}}> ()
      {out}_4 = Constant <value = uint8 {{4}}> ()
      {out}_8 = Constant <value = uint8 {{8}}> ()
      {out}_8f = Constant <value_float = 8.0> ()
      {out}_low = BitwiseAnd({out}_bytes, {out}_15)
      {out}_high = BitShift <direction = "RIGHT"> ({out}_bytes, {out}_4)
      {out}_low_1 = Unsqueeze({out}_low, {out}_last)
      {out}_high_1 = Unsqueeze({out}_high, {out}_last)
      {out}_pair = Concat <axis = -1> ({out}_low_1, {out}_high_1)
      {out}_lead = Shape <end = -1> ({out}_bytes)
      {out}_shape = Concat <axis = 0> ({out}_lead, {out}_last)
      {out}_flat = Reshape({out}_pair, {out}_shape)
      {out}_turned = BitwiseXor({out}_flat, {out}_8)
      {out}_biased = Cast <to = 1> ({out}_turned)
      {out}_unpacked = Sub({out}_biased, {out}_8f)
    }},
    else_branch = keep () => ({out}_kept) {{
      {out}_kept = Cast <to = 1> ({weight})
    }}>
  {out}_scale_f = Cast <to = 1> ({scale})
  {out}_scale_1 = Unsqueeze({out}_scale_f, {out}_last)
  {out}_scale_lead = Shape({out}_scale_f)
  {out}_scale_wide = Concat <axis = 0> ({out}_scale_lead, block_size_1)
  {out}_scale_each = Expand({out}_scale_1, {out}_scale_wide)
  {out}_rows = Shape <end = -1> ({out}_int)
  {out}_rows_rest = Concat <axis = 0> ({out}_rows, {out}_last)
  {out}_scale_flat = Reshape({out}_scale_each, {out}_rows_rest)
  {out}_from = Constant <value_ints = [0]> ()
  {out}_to = Shape <start = -1> ({out}_int)
  {out}_scale_cut = Slice({out}_scale_flat, {out}_from, {out}_to, {out}_last)
  {out} = Mul({out}_int, {out}_scale_cut)
"""

# {out} [T, I]: x as it is, or rounded: with a static scale, or with one for every block of every token.
# Flatten leaves [T, I] as it is, but onnxruntime moves no DequantizeLinear past it: next to the MatMul, it would fuse it with that
# of the matrix, without a look at the blocks of its scales.
_ROUND = f"""
  {{out}} = If (is_static) <
    then_branch = static_scales () => ({{out}}_static) {{{{
      {{out}}_product = Constant <value_int = {{product}}> ()
      {{out}}_step = Gather(activation_scales, {{out}}_product)
      {{out}}_static = If (to_float8) <
        then_branch = round_to_float8 () => ({{out}}_float8) {{{{
          {{out}}_q8 = QuantizeLinear <output_dtype = 17> ({{x}}, {{out}}_step)
          {{out}}_dq8 = DequantizeLinear({{out}}_q8, {{out}}_step)
          {{out}}_float8 = Flatten <axis = 1> ({{out}}_dq8)
        }}}},
        else_branch = round_to_int8 () => ({{out}}_int8) {{{{
          {{out}}_lowest = Constant <value_float = {-INT8_MAX}> ()
          {{out}}_low = Mul({{out}}_step, {{out}}_lowest)
          {{out}}_bounded = Max({{x}}, {{out}}_low)
          {{out}}_q = QuantizeLinear <output_dtype = 3> ({{out}}_bounded, {{out}}_step)
          {{out}}_dq = DequantizeLinear({{out}}_q, {{out}}_step)
          {{out}}_int8 = Flatten <axis = 1> ({{out}}_dq)
        }}}}>
    }}}},
    else_branch = no_static_scales () => ({{out}}_other) {{{{
      {{out}}_other = If (to_int8) <
        then_branch = round_blocks () => ({{out}}_used) {{{{
          {{out}}_axis0 = Constant <value_ints = [0]> ()
          {{out}}_axis1 = Constant <value_ints = [1]> ()
          {{out}}_last = Constant <value_ints = [-1]> ()
          {{out}}_k = Shape <start = 1, end = 2> ({{x}})
          {{out}}_minus_k = Neg({{out}}_k)
          {{out}}_pad = Mod({{out}}_minus_k, block_size_1)
          {{out}}_pads = Concat <axis = 0> ({{out}}_axis0, {{out}}_axis0, {{out}}_axis0, {{out}}_pad)
          {{out}}_padded = Pad({{x}}, {{out}}_pads)
          {{out}}_blocks_shape = Concat <axis = 0> ({{out}}_axis0, {{out}}_last, block_size_1)
          {{out}}_blocks = Reshape({{out}}_padded, {{out}}_blocks_shape)
          {{out}}_size = Abs({{out}}_blocks)
          {{out}}_largest = ReduceMax <keepdims = 1> ({{out}}_size, {{out}}_last)
          {{out}}_127 = Constant <value_float = {INT8_MAX}> ()
          {{out}}_none = Constant <value_float = 0.0> ()
          {{out}}_least = Constant <value_float = {SMALLEST}> ()
          {{out}}_scale = Div({{out}}_largest, {{out}}_127)
          {{out}}_any = Greater({{out}}_largest, {{out}}_least)
          {{out}}_ratio = Div({{out}}_127, {{out}}_largest)
          {{out}}_inverse = Where({{out}}_any, {{out}}_ratio, {{out}}_none)
          {{out}}_scaled = Mul({{out}}_blocks, {{out}}_inverse)
          {{out}}_levels = Round({{out}}_scaled)
          {{out}}_values = Mul({{out}}_levels, {{out}}_scale)
          {{out}}_flat_shape = Concat <axis = 0> ({{out}}_axis0, {{out}}_last)
          {{out}}_flat = Reshape({{out}}_values, {{out}}_flat_shape)
          {{out}}_used = Slice({{out}}_flat, {{out}}_axis0, {{out}}_k, {{out}}_axis1)
        }}}},
        else_branch = pass () => ({{out}}_same) {{{{
          {{out}}_same = Identity({{x}})
        }}}}>
    }}}}>
"""


def rms_norm_text(x: str, weight: str, y: str) -> str:
    """y = RMSNorm of x by the attribute epsilon, in float32: written with a division, the form onnxruntime fuses into one node."""
    return f"""
  {y}_f = Cast <to = 1> ({x})
  {y}_two = Constant <value_float = 2.0> ()
  {y}_last = Constant <value_ints = [-1]> ()
  {y}_squared = Pow({y}_f, {y}_two)
  {y}_mean = ReduceMean <keepdims = 1> ({y}_squared, {y}_last)
  {y}_epsilon = Constant <value_float: float = @epsilon> ()
  {y}_biased = Add({y}_mean, {y}_epsilon)
  {y}_rms = Sqrt({y}_biased)
  {y}_unit = Div({y}_f, {y}_rms)
  {y} = Mul({y}_unit, {weight})
"""


def flat_text(x: str, flat: str) -> str:
    """flat [T, last dimension of x]."""
    return f"""
  {flat}_rest = Constant <value_ints = [-1]> ()
  {flat}_channels = Shape <start = -1> ({x})
  {flat}_shape = Concat <axis = 0> ({flat}_rest, {flat}_channels)
  {flat} = Reshape({x}, {flat}_shape)
"""


def quantized(
    operator: Operator,
    torch_op: object,
    body: str,
    weights: tuple[str, ...],
    *,
    packed: bool = False,
    other_bodies: Mapping[str, Body] | None = None,
) -> Operator:
    """The operator's quantized form: Quantized…, each of its `weights` followed by NAME_scale, and activation_scale last.

    Every one of `weights` is a product of its own, in that order. packed: int4 comes as uint8. body, other_bodies: its own.
    """

    def with_scales(items: tuple[tuple[str, str, str], ...]) -> tuple[tuple[str, str, str], ...]:
        out: list[tuple[str, str, str]] = []
        for name, kind, text in items:
            if name not in weights:
                out.append((name, {"T": "tensor(float)", "X": "tensor(float)"}.get(kind, kind), text))
                continue
            kind = "P" if packed else "Q" if name == weights[0] else "Q2"
            out.append((name, kind, f"{text}; int8, int4 or float8e4m3fn"))
            out.append((f"{name}_scale", "S", f"a scale for every block of input channels of {name}"))
        return tuple(out)

    n = len(weights)
    text = f"[{n}]: a static scale for the input of the product with {' and of that with '.join(weights)}; [0]: dynamic scales"
    inputs = (*with_scales(operator.inputs), ("activation_scale", "tensor(float)", text))
    names = [name for name, _, _ in inputs]
    plain = [names.index(name) for name, _, _ in operator.inputs]

    def infer_shapes(shapes: list[Shape], attributes: dict[str, object]) -> list[Shape]:
        return operator.infer_shapes([shapes[i] for i in plain], attributes)

    form = {"bits": ("INT", "4 where the weights are packed uint8, else 8")} if packed else {}
    return replace(
        operator,
        name=f"Quantized{operator.name}",
        doc=f"{operator.doc} Weights are block-quantized.",
        inputs=inputs,
        outputs=with_scales(operator.outputs),
        attributes={
            **operator.attributes,
            **form,
            "block_size": ("INT", "input channels a scale: 32, 64 or 128"),
            "activation_type": (
                "INT",
                "what inputs of products are rounded to: 1 FLOAT (not at all), 3 INT8, 17 FLOAT8E4M3FN",
            ),
        },
        torch_op=torch_op,
        infer_shapes=infer_shapes,
        body=body,
        other_bodies=other_bodies or {},
    )
