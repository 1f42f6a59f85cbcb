"""How MixtureOfExperts chooses and weighs its routed experts: in torch, and as ONNX statements. See RoutingConfig.

Shape letters: N tokens, E routed experts, K top_k, G n_groups, g top_k_groups, b group_top_k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mythos_export.config import SCORINGS, RoutingConfig

SMALLEST_SUM = 1e-20  # added to the sum that sigmoid scores are divided by, as DeepSeek-V3 does: they may all be 0
LOWEST = -3.0e38  # what an expert outside the groups counts in the choice

# Of the operator: name -> (ONNX attribute type, description).
ATTRIBUTES = {
    "scoring": ("INT", "what experts are weighed by: 0 softmax of the logits, 1 sigmoid"),
    "normalized": ("INT", "1: weights of the chosen are divided by their sum"),
    "scale": ("FLOAT", "factor of the weights of routed experts"),
    "n_groups": ("INT", "equal runs of experts"),
    "top_k_groups": ("INT", "groups that may be chosen from"),
    "group_top_k": ("INT", "experts of a group whose sum ranks it"),
}
DEFAULTS = RoutingConfig().attributes  # what nodes without these attributes mean


def routing_of(
    scoring: int, normalized: int, scale: float, n_groups: int, top_k_groups: int, group_top_k: int
) -> RoutingConfig:
    """The inverse of RoutingConfig.attributes."""
    return RoutingConfig(SCORINGS[scoring], bool(normalized), scale, n_groups, top_k_groups, group_top_k)  # type: ignore[arg-type]


def route(logits: Tensor, router_bias: Tensor, top_k: int, routing: RoutingConfig) -> tuple[Tensor, Tensor]:
    """logits [N, E], router_bias [E] -> the chosen experts [N, K] int64 and their weights [N, K]."""
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits
    biased = scores + router_bias
    if routing.n_groups > 1:
        groups = biased.unflatten(-1, (routing.n_groups, -1))
        best = groups.topk(routing.group_top_k, -1).values.sum(-1).topk(routing.top_k_groups, -1).indices
        kept = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        biased = groups.masked_fill(~kept.unsqueeze(-1), LOWEST).flatten(-2)
    chosen = biased.topk(top_k, -1).indices
    if routing.scoring == "sigmoid":
        weight = scores.gather(-1, chosen)
        if routing.normalized:
            weight = weight / (weight.sum(-1, keepdim=True) + SMALLEST_SUM)
    elif routing.normalized:
        weight = torch.softmax(logits.gather(-1, chosen), -1)
    else:
        weight = torch.softmax(logits, -1).gather(-1, chosen)
    return chosen, weight * routing.scale


# From logits [N, E] to routed_chosen [N, K] and routed_weight [N, K]. Subgraphs cannot refer to attributes in every runtime.
CHOICE = f"""
  route_axis = Constant <value_ints = [0]> ()
  route_last = Constant <value_ints = [-1]> ()
  route_one = Constant <value_int = 1> ()
  scoring_int = Constant <value_int: int = @scoring> ()
  by_sigmoid = Equal(scoring_int, route_one)
  scores = If (by_sigmoid) <
    then_branch = sigmoid_scores () => (scores_sigmoid) {{
      # 1 / (1 + exp(-x)), not Sigmoid: a small score needs relative accuracy
      score_one = Constant <value_float = 1.0> ()
      minus_logits = Neg(logits)
      exponentials = Exp(minus_logits)
      denominators = Add(exponentials, score_one)
      scores_sigmoid = Reciprocal(denominators)
    }},
    else_branch = logit_scores () => (scores_logits) {{
      scores_logits = Identity(logits)
    }}>
  biased = Add(scores, router_bias)

  # of the best groups alone
  n_groups_int = Constant <value_int: int = @n_groups> ()
  n_groups_1 = Unsqueeze(n_groups_int, route_axis)
  top_k_groups_int = Constant <value_int: int = @top_k_groups> ()
  top_k_groups_1 = Unsqueeze(top_k_groups_int, route_axis)
  group_top_k_int = Constant <value_int: int = @group_top_k> ()
  group_top_k_1 = Unsqueeze(group_top_k_int, route_axis)
  has_groups = Greater(n_groups_int, route_one)
  allowed = If (has_groups) <
    then_branch = limit_to_groups () => (limited) {{
      n_of_all = Size(router_bias)
      n_of_all_1 = Unsqueeze(n_of_all, route_axis)
      group_size = Div(n_of_all_1, n_groups_1)
      groups_shape = Concat <axis = 0> (route_last, n_groups_1, group_size)
      groups = Reshape(biased, groups_shape)
      best_of_group, best_of_group_at = TopK <axis = -1> (groups, group_top_k_1)
      group_scores = ReduceSum <keepdims = 0> (best_of_group, route_last)
      best_groups, best_groups_at = TopK <axis = -1> (group_scores, top_k_groups_1)
      shape_of_groups = Shape(group_scores)
      no_group = ConstantOfShape(shape_of_groups)
      group_one = Constant <value_float = 1.0> ()
      shape_of_best = Shape(best_groups)
      marks = Expand(group_one, shape_of_best)
      marked = ScatterElements <axis = 1> (no_group, best_groups_at, marks)
      marked_column = Unsqueeze(marked, route_last)
      kept = Cast <to = 9> (marked_column)
      lowest = Constant <value_float = {LOWEST}> ()
      groups_kept = Where(kept, groups, lowest)
      shape_of_biased = Shape(biased)
      limited = Reshape(groups_kept, shape_of_biased)
    }},
    else_branch = any_expert () => (unlimited) {{
      unlimited = Identity(biased)
    }}>
  top_k_int = Constant <value_int: int = @top_k> ()
  top_k_1 = Unsqueeze(top_k_int, route_axis)
  chosen_scores, routed_chosen = TopK <axis = -1> (allowed, top_k_1)

  normalized_int = Constant <value_int: int = @normalized> ()
  is_normalized = Equal(normalized_int, route_one)
  unbiased = GatherElements <axis = 1> (scores, routed_chosen)
  unscaled = If (by_sigmoid) <
    then_branch = sigmoid_weights () => (weight_sigmoid) {{
      weight_sigmoid = If (is_normalized) <
        then_branch = divided_by_sum () => (sigmoid_share) {{
          smallest_sum = Constant <value_float = {SMALLEST_SUM}> ()
          sigmoid_sum = ReduceSum <keepdims = 1> (unbiased, route_last)
          sigmoid_total = Add(sigmoid_sum, smallest_sum)
          sigmoid_share = Div(unbiased, sigmoid_total)
        }},
        else_branch = as_scored () => (sigmoid_score) {{
          sigmoid_score = Identity(unbiased)
        }}>
    }},
    else_branch = softmax_weights () => (weight_softmax) {{
      weight_softmax = If (is_normalized) <
        then_branch = of_the_chosen () => (softmax_share) {{
          softmax_share = Softmax <axis = -1> (unbiased)
        }},
        else_branch = of_all () => (softmax_score) {{
          softmax_all = Softmax <axis = -1> (logits)
          softmax_score = GatherElements <axis = 1> (softmax_all, routed_chosen)
        }}>
    }}>
  route_scale = Constant <value_float: float = @scale> ()
  routed_weight = Mul(unscaled, route_scale)
"""

# The same for engines, of softmax over the chosen alone.
ENGINE_CHOICE = """
  biased = Add(logits, router_bias)
  top_k_int = Constant <value_int: int = @top_k> ()
  top_k_axis = Constant <value_ints = [0]> ()
  top_k_1 = Unsqueeze(top_k_int, top_k_axis)
  chosen_logits, routed_chosen = TopK <axis = -1> (biased, top_k_1)
  unbiased = GatherElements <axis = 1> (logits, routed_chosen)
  routed_weight = Softmax <axis = -1> (unbiased)
"""
