"""ai.mythos MixtureOfExperts: routed and shared SwiGLU experts (DeepSeekMoE, arXiv 2401.06066) with the norm and the residual of
their pre-norm layer.

Experts are chosen by their logits plus router_bias (aux-loss-free balancing, arXiv 2408.15664) and weighed by the softmax of
the unbiased logits of the chosen ones; the experts after the routed ones see every token with weight 1. Weights are packed per
expert, output channels first, so an expert is one contiguous piece and a row of it one dot product.

Shape letters: N tokens, D dim, E routed experts, A all experts, K top_k, k chosen and shared ones of a token, F expert_dim,
b blocks of input channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_export.ops.operator import Operator, rms_norm, wide
from mythos_export.ops.products import (
    FLOAT,
    ActivationRounding,
    DequantizedForm,
    FloatForm,
    PackedForm,
    dequantize,
    flat_text,
    quantized,
    rms_norm_text,
)

# Gathering copies every chosen expert, walking over the experts costs a fixed time each. Where the copies exceed
# this many numbers of gate_up for every expert there is, walking is faster (measured for dim 128 to 1024 on two CPU threads).
GATHER_LIMIT = 50_000


@torch.library.custom_op("mythos::mixture_of_experts", mutates_args=())
def mixture_of_experts(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    router_bias: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    epsilon: float,
) -> Tensor:
    """x + the weighted sum of top_k routed experts and the shared ones of rms_norm(x), for every token.

    x [..., D] float32, norm [D] float32. router [E, D] float32, router_bias [E] float32: shifts the choice only. gate_up
    [A, 2F, D]: gate, then up. down [A, D, F]. Returns [..., D] float32. Router, softmax and the sum over experts are float32.
    """

    def expert(index: int, tokens: Tensor) -> Tensor:
        gate, up = F.linear(tokens.to(gate_up.dtype), gate_up[index]).chunk(2, -1)
        return wide(F.linear(F.silu(gate) * up, down[index]))

    return _mix(x, norm, router, router_bias, len(gate_up), top_k, epsilon, expert)


@mixture_of_experts.register_fake
def _(x, norm, router, router_bias, gate_up, down, top_k, epsilon):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@torch.library.custom_op("mythos::quantized_mixture_of_experts", mutates_args=())
def quantized_mixture_of_experts(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    router_bias: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    activation_scale: Tensor,
    top_k: int,
    epsilon: float,
    bits: int,
    block_size: int,
    activation_type: int,
) -> Tensor:
    """The same with gate_up and down as `dequantize` takes them, their inputs rounded as ActivationRounding says.

    bits: 4 where they are packed uint8, else 8.
    """
    rounded = ActivationRounding(activation_scale, 2, block_size, activation_type)

    def expert(index: int, tokens: Tensor) -> Tensor:
        inner = dequantize(gate_up[index], gate_up_scale[index], block_size).to(tokens.dtype)
        gate, up = F.linear(rounded(tokens, 0), inner).chunk(2, -1)
        outer = dequantize(down[index], down_scale[index], block_size).to(tokens.dtype)
        return F.linear(rounded(F.silu(gate) * up, 1), outer)

    return _mix(x, norm, router, router_bias, len(gate_up), top_k, epsilon, expert)


def _mix(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    router_bias: Tensor,
    n_experts: int,
    top_k: int,
    epsilon: float,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """expert(index, tokens [n, D]) runs one expert."""
    normed = rms_norm(wide(x), norm, epsilon).flatten(0, -2)
    logits = F.linear(normed, router)
    chosen = (logits + router_bias).topk(top_k, -1).indices
    weight = torch.softmax(logits.gather(-1, chosen), -1)
    y = torch.zeros_like(normed)
    for index in chosen.unique().tolist():
        token, rank = torch.where(chosen == index)
        y.index_add_(0, token, expert(index, normed[token]) * weight[token, rank].unsqueeze(-1))
    for index in range(len(router), n_experts):
        y += expert(index, normed)
    return x + y.reshape(x.shape)


def _body(form: FloatForm) -> str:
    cast = "CastLike(flat_f, gate_up)" if form is FLOAT else "Identity(flat_f)"
    gate_up, down = form.stack("gate_up"), form.stack("down")
    weights, scanned, scales = "gate_up_e, down_e", f"{gate_up}, {down}", ("", "")
    if isinstance(form, PackedForm):
        weights, scanned = (
            "gate_up_e, gate_up_e_scale, down_e, down_e_scale",
            "gate_up, gate_up_scale, down, down_scale",
        )
        scales = (_GATHER_SCALE.format("gate_up"), _GATHER_SCALE.format("down"))
    return f"""
  {form.preamble}
  {rms_norm_text("x", "norm", "normed")}
  {flat_text("normed", "flat_f")}
  flat_cast = {cast}
  rest = Constant <value_ints = [-1]> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  {form.rounded("flat_cast", "flat")}

  # biased choice [N, K], unbiased weights [N, K]
  {FLOAT.product("flat_f", "router", "logits")}
  biased = Add(logits, router_bias)
  top_k_int = Constant <value_int: int = @top_k> ()
  top_k_1 = Unsqueeze(top_k_int, axis_0)
  chosen_logits, routed_chosen = TopK <axis = -1> (biased, top_k_1)
  unbiased = GatherElements <axis = 1> (logits, routed_chosen)
  routed_weight = Softmax <axis = -1> (unbiased)

  # and the shared experts, with weight 1: [N, k]
  int_1 = Constant <value_int = 1> ()
  n_routed = Size(router_bias)
  n_all_1 = Shape <start = 0, end = 1> ({gate_up})
  n_all = Squeeze(n_all_1, axis_0)
  shared = Range(n_routed, n_all, int_1)
  n_tokens = Shape <start = 0, end = 1> (flat_f)
  n_shared = Shape(shared)
  shared_shape = Concat <axis = 0> (n_tokens, n_shared)
  shared_chosen = Expand(shared, shared_shape)
  one = Constant <value_float = 1.0> ()
  shared_weight = Expand(one, shared_shape)
  chosen = Concat <axis = 1> (routed_chosen, shared_chosen)
  weight = Concat <axis = 1> (routed_weight, shared_weight)

  # few tokens and small experts: gather the chosen ones; otherwise walk over the experts, each reading its own tokens
  n_pairs = Size(chosen)
  expert_shape = Shape <start = 1> ({gate_up})
  expert_size = ReduceProd <keepdims = 0> (expert_shape)
  gathered_size = Mul(expert_size, n_pairs)
  limit = Constant <value_int = {GATHER_LIMIT}> ()
  walk_cost = Mul(n_all, limit)
  gathering_pays = LessOrEqual(gathered_size, walk_cost)
  mixed = If (gathering_pays) <
    then_branch = gather_experts () => (gathered) {{
      chosen_gate_up = Gather <axis = 0> ({gate_up}, chosen)
      {scales[0]}
      {form.matrix("chosen_gate_up", "chosen_gate_up_s", "inner_w")}
      column_axes = Constant <value_ints = [1, 3]> ()
      column = Unsqueeze(flat, column_axes)
      inner = MatMul(inner_w, column)
      gate, up = Split <axis = 2, num_outputs = 2> (inner)
      gate_sigmoid = Sigmoid(gate)
      gate_silu = Mul(gate, gate_sigmoid)
      activated = Mul(gate_silu, up)
      activated_shape = Shape(activated)
      hidden = Shape <start = 2, end = 3> (activated)
      hidden_shape = Concat <axis = 0> (rest, hidden)
      activated_flat = Reshape(activated, hidden_shape)
      {form.rounded("activated_flat", "activated_rounded", product=1)}
      activated_column = Reshape(activated_rounded, activated_shape)
      chosen_down = Gather <axis = 0> ({down}, chosen)
      {scales[1]}
      {form.matrix("chosen_down", "chosen_down_s", "outer_w")}
      outer = MatMul(outer_w, activated_column)
      outer_f = Cast <to = 1> (outer)
      weight_axes = Constant <value_ints = [2, 3]> ()
      weight_column = Unsqueeze(weight, weight_axes)
      weighted = Mul(outer_f, weight_column)
      sum_axes = Constant <value_ints = [1, 3]> ()
      gathered = ReduceSum <keepdims = 0> (weighted, sum_axes)
    }},
    else_branch = walk_experts () => (walked) {{
      combine_shape = Concat <axis = 0> (n_tokens, n_all_1)
      no_weight = ConstantOfShape(combine_shape)
      combine_by_token = ScatterElements <axis = 1> (no_weight, chosen, weight)
      combine = Transpose <perm = [1, 0]> (combine_by_token)
      shape_of_flat = Shape(flat)
      nothing = ConstantOfShape(shape_of_flat)
      walked = Scan <num_scan_inputs = {scanned.count(",") + 2}, body = one_expert (sum, {weights}, combine_e) => (sum_out) {{
        most = ReduceMax <keepdims = 0> (combine_e)
        zero = Constant <value_float = 0.0> ()
        has_tokens = Greater(most, zero)
        sum_out = If (has_tokens) <
          then_branch = run_expert () => (sum_run) {{
            tokens_row = NonZero(combine_e)
            tokens = Transpose <perm = [1, 0]> (tokens_row)
            token_index = Squeeze(tokens_row, axis_0)
            x_e = Gather <axis = 0> (flat, token_index)
            {form.matrix("gate_up_e", "gate_up_e_scale", "inner_we")}
            gate_up_t = Transpose <perm = [1, 0]> (inner_we)
            inner_e = MatMul(x_e, gate_up_t)
            gate_e, up_e = Split <axis = 1, num_outputs = 2> (inner_e)
            sigmoid_e = Sigmoid(gate_e)
            silu_e = Mul(gate_e, sigmoid_e)
            activated_e = Mul(silu_e, up_e)
            {form.rounded("activated_e", "activated_er", product=1)}
            {form.matrix("down_e", "down_e_scale", "outer_we")}
            down_t = Transpose <perm = [1, 0]> (outer_we)
            outer_e = MatMul(activated_er, down_t)
            outer_e_f = Cast <to = 1> (outer_e)
            weight_e = Gather <axis = 0> (combine_e, token_index)
            weight_e_1 = Unsqueeze(weight_e, axis_1)
            weighted_e = Mul(outer_e_f, weight_e_1)
            sum_run = ScatterND <reduction = "add"> (sum, tokens, weighted_e)
          }},
          else_branch = skip_expert () => (sum_skip) {{
            sum_skip = Identity(sum)
          }}>
      }}> (nothing, {scanned}, combine)
    }}>
  x_shape = Shape(x)
  mixed_x = Reshape(mixed, x_shape)
  y = Add(x, mixed_x)
"""


_GATHER_SCALE = "chosen_{0}_s = Gather <axis = 0> ({0}_scale, chosen)"

OPERATOR = Operator(
    name="MixtureOfExperts",
    doc="Routed and shared SwiGLU experts on rms_norm(x), added to x. Routed ones are chosen by logits + router_bias and weighed "
    "by the softmax of the unbiased logits of the chosen (arXiv 2401.06066, 2408.15664). Router, softmax and the sum are float32.",
    inputs=(
        ("x", "tensor(float)", "[batch, seq, dim]"),
        ("norm", "tensor(float)", "[dim]: weight of the RMSNorm"),
        ("router", "tensor(float)", "[n_experts, dim]"),
        ("router_bias", "tensor(float)", "[n_experts]: added for the choice only"),
        ("gate_up", "T", "[n_experts + n_shared_experts, 2 * expert_dim, dim]: rows of gate, then of up"),
        ("down", "T", "[n_experts + n_shared_experts, dim, expert_dim]"),
    ),
    outputs=(("y", "tensor(float)", "[batch, seq, dim]"),),
    attributes={"top_k": ("INT", "routed experts a token"), "epsilon": ("FLOAT", "epsilon of the RMSNorm")},
    torch_op=torch.ops.mythos.mixture_of_experts.default,
    infer_shapes=lambda shapes, _: [list(shapes[0])],
    body=_body(FLOAT),
)

_WEIGHTS = ("gate_up", "down")
QUANTIZED = quantized(
    OPERATOR,
    torch.ops.mythos.quantized_mixture_of_experts.default,
    _body(PackedForm()),
    weights=_WEIGHTS,
    packed=True,
    dequantized_body=_body(DequantizedForm(*_WEIGHTS)),
)
