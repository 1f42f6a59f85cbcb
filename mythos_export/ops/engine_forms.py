"""How the bodies for engine builders multiply with matrices: one Gemm of the matrix as it is stored, in its dtype; quantized ones
through DequantizeLinear, inputs through a pair of QuantizeLinear and DequantizeLinear where they have static scales.
"""

from __future__ import annotations

from mythos_export.ops.products import FloatForm, QuantizedForm


class EngineForm(FloatForm):
    """As engine builders like it: one product of the matrix as it is stored; x in its dtype."""

    def product(self, x: str, weight: str, y: str, product: int = 0) -> str:
        return f"""
  {y}_in = CastLike({x}, {weight})
  {y} = Gemm <transB = 1> ({y}_in, {weight})
"""


class EngineQuantizedForm(QuantizedForm):
    """The same with quantized matrices, in the dtype of their scales. Inputs are rounded by static scales only."""

    def product(self, x: str, weight: str, y: str, product: int = 0) -> str:
        return (
            self.matrix(weight, f"{weight}_scale", f"{y}_weight")
            + f"  {y}_like = CastLike({x}, {y}_weight)\n"
            + self.rounded(f"{y}_like", f"{y}_rounded", product)
            + ENGINE.product(f"{y}_rounded", f"{y}_weight", y)
        )

    def matrix(self, weight: str, scale: str, out: str) -> str:
        return f"  {out} = DequantizeLinear <axis = -1, block_size: int = @block_size> ({weight}, {scale})\n"

    def rounded(self, x: str, out: str, product: int = 0) -> str:
        return _ROUND_STATIC.format(x=x, out=out, product=product)


ENGINE = EngineForm()
ENGINE_QUANTIZED = EngineQuantizedForm()

# {out}: x as it is, or rounded with a static scale, in engines.
_ROUND_STATIC = """
  {out} = If (is_static) <
    then_branch = static_scales () => ({out}_static) {{
      {out}_product = Constant <value_int = {product}> ()
      {out}_step_f = Gather(activation_scales, {out}_product)
      {out}_step = CastLike({out}_step_f, {x})
      {out}_static = If (to_float8) <
        then_branch = round_to_float8 () => ({out}_float8) {{
          {out}_q8 = QuantizeLinear <output_dtype = 17> ({x}, {out}_step)
          {out}_float8 = DequantizeLinear({out}_q8, {out}_step)
        }},
        else_branch = round_to_int8 () => ({out}_int8) {{
          {out}_q = QuantizeLinear <output_dtype = 3> ({x}, {out}_step)
          {out}_int8 = DequantizeLinear({out}_q, {out}_step)
        }}>
    }},
    else_branch = no_static_scales () => ({out}_same) {{
      {out}_same = Identity({x})
    }}>
"""


def small_product(x: str, weight: str, y: str) -> str:
    """y [T, O] = x [T, I] · weight [O, I]^T as a sum of terms, in float32: a compiler may give matrix products to units
    of fewer digits."""
    return f"""
  {y}_axis = Constant <value_ints = [1]> ()
  {y}_last = Constant <value_ints = [-1]> ()
  {y}_row = Unsqueeze({x}, {y}_axis)
  {y}_terms = Mul({y}_row, {weight})
  {y} = ReduceSum <keepdims = 0> ({y}_terms, {y}_last)
"""
