"""ai.mythos MixtureOfExperts: routed SwiGLU experts (DeepSeekMoE, arXiv 2401.06066).

Experts are chosen by their logits plus router_bias (aux-loss-free balancing, arXiv 2408.15664) and weighed by the softmax of
the unbiased logits of the chosen ones. Weights are packed per expert, output channels first, so an expert is one
contiguous piece and a row of it one dot product.

Shape letters: N tokens, D dim, E experts, K top_k, F expert_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_export.ops.operator import Operator, wide

# Gathering copies every chosen expert, walking over the experts costs a fixed time each. Where the copies exceed
# this many numbers of gate_up for every expert there is, walking is faster (measured for dim 128 to 1024 on two CPU threads).
GATHER_LIMIT = 50_000


@torch.library.custom_op("mythos::mixture_of_experts", mutates_args=())
def mixture_of_experts(
    x: Tensor, router: Tensor, router_bias: Tensor, gate_up: Tensor, down: Tensor, top_k: int
) -> Tensor:
    """Weighted sum of top_k experts for every token.

    x [..., D]. router [D, E] float32, router_bias [E] float32: shifts the choice only. gate_up [E, 2F, D]: gate, then up.
    down [E, D, F]. Returns [..., D]. Router, softmax and the sum over experts are float32.
    """
    flat = x.reshape(-1, x.shape[-1])
    logits = wide(flat) @ router
    chosen = (logits + router_bias).topk(top_k, -1).indices
    weight = torch.softmax(logits.gather(-1, chosen), -1)
    y = torch.zeros(flat.shape, dtype=logits.dtype, device=x.device)
    for expert in chosen.unique().tolist():
        token, rank = torch.where(chosen == expert)
        gate, up = F.linear(flat[token], gate_up[expert]).chunk(2, -1)
        out = wide(F.linear(F.silu(gate) * up, down[expert]))
        y.index_add_(0, token, out * weight[token, rank].unsqueeze(-1))
    return y.to(x.dtype).reshape(x.shape)


@mixture_of_experts.register_fake
def _(x, router, router_bias, gate_up, down, top_k):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


BODY = f"""
  dim = Shape <start = 2, end = 3> (gate_up)
  rest = Constant <value_ints = [-1]> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  flat_shape = Concat <axis = 0> (rest, dim)
  flat = Reshape(x, flat_shape)

  # biased choice [N, K], unbiased weights [N, K]
  flat_f = Cast <to = 1> (flat)
  logits = MatMul(flat_f, router)
  biased = Add(logits, router_bias)
  top_k_int = Constant <value_int: int = @top_k> ()
  top_k_1 = Unsqueeze(top_k_int, axis_0)
  chosen_logits, chosen = TopK <axis = -1> (biased, top_k_1)
  unbiased = GatherElements <axis = 1> (logits, chosen)
  weight = Softmax <axis = -1> (unbiased)

  # few tokens and small experts: gather the chosen ones; otherwise walk over the experts, each reading its own tokens
  n_pairs = Size(chosen)
  n_experts = Size(router_bias)
  expert_shape = Shape <start = 1> (gate_up)
  expert_size = ReduceProd <keepdims = 0> (expert_shape)
  gathered_size = Mul(expert_size, n_pairs)
  limit = Constant <value_int = {GATHER_LIMIT}> ()
  walk_cost = Mul(n_experts, limit)
  gathering_pays = LessOrEqual(gathered_size, walk_cost)
  routed = If (gathering_pays) <
    then_branch = gather_experts () => (gathered) {{
      chosen_gate_up = Gather <axis = 0> (gate_up, chosen)
      column_axes = Constant <value_ints = [1, 3]> ()
      column = Unsqueeze(flat, column_axes)
      inner = MatMul(chosen_gate_up, column)
      gate, up = Split <axis = 2, num_outputs = 2> (inner)
      gate_sigmoid = Sigmoid(gate)
      gate_silu = Mul(gate, gate_sigmoid)
      activated = Mul(gate_silu, up)
      chosen_down = Gather <axis = 0> (down, chosen)
      outer = MatMul(chosen_down, activated)
      outer_f = Cast <to = 1> (outer)
      weight_axes = Constant <value_ints = [2, 3]> ()
      weight_column = Unsqueeze(weight, weight_axes)
      weighted = Mul(outer_f, weight_column)
      sum_axes = Constant <value_ints = [1, 3]> ()
      gathered = ReduceSum <keepdims = 0> (weighted, sum_axes)
    }},
    else_branch = walk_experts () => (walked) {{
      logits_shape = Shape(logits)
      no_weight = ConstantOfShape(logits_shape)
      combine_by_token = ScatterElements <axis = 1> (no_weight, chosen, weight)
      combine = Transpose <perm = [1, 0]> (combine_by_token)
      shape_of_flat = Shape(flat)
      nothing = ConstantOfShape(shape_of_flat)
      walked = Scan <num_scan_inputs = 3, body = one_expert (sum, gate_up_e, down_e, combine_e) => (sum_out) {{
        most = ReduceMax <keepdims = 0> (combine_e)
        zero = Constant <value_float = 0.0> ()
        has_tokens = Greater(most, zero)
        sum_out = If (has_tokens) <
          then_branch = run_expert () => (sum_run) {{
            tokens_row = NonZero(combine_e)
            tokens = Transpose <perm = [1, 0]> (tokens_row)
            token_index = Squeeze(tokens_row, axis_0)
            x_e = Gather <axis = 0> (flat, token_index)
            gate_up_t = Transpose <perm = [1, 0]> (gate_up_e)
            inner_e = MatMul(x_e, gate_up_t)
            gate_e, up_e = Split <axis = 1, num_outputs = 2> (inner_e)
            sigmoid_e = Sigmoid(gate_e)
            silu_e = Mul(gate_e, sigmoid_e)
            activated_e = Mul(silu_e, up_e)
            down_t = Transpose <perm = [1, 0]> (down_e)
            outer_e = MatMul(activated_e, down_t)
            outer_e_f = Cast <to = 1> (outer_e)
            weight_e = Gather <axis = 0> (combine_e, token_index)
            weight_e_1 = Unsqueeze(weight_e, axis_1)
            weighted_e = Mul(outer_e_f, weight_e_1)
            sum_run = ScatterND <reduction = "add"> (sum, tokens, weighted_e)
          }},
          else_branch = skip_expert () => (sum_skip) {{
            sum_skip = Identity(sum)
          }}>
      }}> (nothing, gate_up, down, combine)
    }}>
  routed_t = CastLike(routed, x)
  x_shape = Shape(x)
  y = Reshape(routed_t, x_shape)
"""

OPERATOR = Operator(
    name="MixtureOfExperts",
    doc="Routed SwiGLU experts: chosen by logits + router_bias, weighed by the softmax of the unbiased logits of the chosen ones "
    "(arXiv 2401.06066, 2408.15664). Router, softmax and the sum over experts are float32.",
    inputs=(
        ("x", "T", "[batch, seq, dim]"),
        ("router", "tensor(float)", "[dim, n_experts]"),
        ("router_bias", "tensor(float)", "[n_experts]: added for the choice only"),
        ("gate_up", "T", "[n_experts, 2 * expert_dim, dim]: rows of gate, then of up"),
        ("down", "T", "[n_experts, dim, expert_dim]"),
    ),
    outputs=(("y", "T", "[batch, seq, dim]"),),
    attributes={"top_k": ("INT", "experts a token")},
    torch_op=torch.ops.mythos.mixture_of_experts.default,
    infer_shapes=lambda shapes, _: [list(shapes[0])],
    body=BODY,
)
