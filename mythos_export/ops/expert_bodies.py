"""The bodies of MixtureOfExperts as ONNX statements: the portable one, and those for engine builders.

Shape letters: N tokens, D dim, E routed experts, A all experts, K top_k, k chosen and shared ones of a token, F expert_dim.
"""

from __future__ import annotations

from mythos_export import overloads
from mythos_export.ops.engine_forms import small_product
from mythos_export.ops.operator import Body
from mythos_export.ops.products import FLOAT, FloatForm, PackedForm, QuantizedForm, flat_text, rms_norm_text
from mythos_export.ops.routing import CHOICE, ENGINE_CHOICE

# Gathering copies every chosen expert, walking over the experts costs a fixed time each. Where the copies exceed
# this many numbers of gate_up for every expert there is, walking is faster (measured for dim 128 to 1024 on two CPU threads).
GATHER_LIMIT = 50_000

# From x: its tokens flat_f [N, D], normalized.
_TOKENS = f"""
  {rms_norm_text("x", "norm", "normed")}
  {flat_text("normed", "flat_f")}
"""


def portable_body(form: FloatForm) -> str:
    """Few tokens and small experts are gathered; otherwise each expert reads its own tokens."""
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
  {_TOKENS}
  {FLOAT.product("flat_f", "router", "logits")}
  {CHOICE}
  flat_cast = {cast}
  rest = Constant <value_ints = [-1]> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  {form.rounded("flat_cast", "flat")}

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

# routed [N, D]: a chosen expert's rows times the token, summed in float32; a compiler that fuses the three never writes what it
# gathers. A cast before the product would make TensorRT 8.6 cast all experts in every step.
_FEW_TOKENS = """
  gathered_gate_up = Gather <axis = 0> (routed_inner_w, routed_chosen)
  token_axes = Constant <value_ints = [1, 2]> ()
  token_row = Unsqueeze(token_rounded, token_axes)
  gate_up_terms_t = Mul(gathered_gate_up, token_row)
  gate_up_terms = Cast <to = 1> (gate_up_terms_t)
  term_axis = Constant <value_ints = [-1]> ()
  inner = ReduceSum <keepdims = 0> (gate_up_terms, term_axis)
  gate, up = Split <axis = 2, num_outputs = 2> (inner)
  gate_sigmoid = Sigmoid(gate)
  gate_silu = Mul(gate, gate_sigmoid)
  activated_f = Mul(gate_silu, up)
  activated = CastLike(activated_f, routed_inner_w)
  {round_activated}
  gathered_down = Gather <axis = 0> (routed_outer_w, routed_chosen)
  activated_axis = Constant <value_ints = [2]> ()
  activated_row = Unsqueeze(activated_rounded, activated_axis)
  down_terms_t = Mul(gathered_down, activated_row)
  down_terms = Cast <to = 1> (down_terms_t)
  outer = ReduceSum <keepdims = 0> (down_terms, term_axis)
  weight_column = Unsqueeze(routed_weight, term_axis)
  weighted = Mul(outer, weight_column)
  rank_axis = Constant <value_ints = [1]> ()
  routed = ReduceSum <keepdims = 0> (weighted, rank_axis)
"""

# routed [N, D]: every expert on every token, then weighed; 0 where it was not chosen.
_MANY_TOKENS = """
  n_routed = Size(router_bias)
  from_0 = Constant <value_int = 0> ()
  by_1 = Constant <value_int = 1> ()
  expert_ids = Range(from_0, n_routed, by_1)
  id_axis = Constant <value_ints = [2]> ()
  chosen_ids = Unsqueeze(routed_chosen, id_axis)
  is_chosen = Equal(chosen_ids, expert_ids)
  weight_ids = Unsqueeze(routed_weight, id_axis)
  no_weight = Constant <value_float = 0.0> ()
  weight_if_chosen = Where(is_chosen, weight_ids, no_weight)
  rank_axis = Constant <value_ints = [1]> ()
  combine = ReduceSum <keepdims = 0> (weight_if_chosen, rank_axis)
  combine_by_expert = Transpose <perm = [1, 0]> (combine)
  combine_axis = Constant <value_ints = [2]> ()
  combine_column = Unsqueeze(combine_by_expert, combine_axis)
  routed_weighted = Mul(routed_outer, combine_column)
  expert_axis = Constant <value_ints = [0]> ()
  routed = ReduceSum <keepdims = 0> (routed_weighted, expert_axis)
"""

# {part}_outer [E, N, D] in float32: experts of one part on all tokens, the first product of all of them in one.
_DENSE = """
  {part}_rest = Constant <value_ints = [-1]> ()
  {part}_dim = Shape <start = 2, end = 3> ({part}_inner_w)
  {part}_rows_shape = Concat <axis = 0> ({part}_rest, {part}_dim)
  {part}_rows = Reshape({part}_inner_w, {part}_rows_shape)
  {part}_inner_flat = Gemm <transB = 1> (token_rounded, {part}_rows)
  {part}_matrix = Shape <start = 0, end = 2> ({part}_inner_w)
  {part}_inner_shape = Concat <axis = 0> ({part}_rest, {part}_matrix)
  {part}_inner = Reshape({part}_inner_flat, {part}_inner_shape)
  {part}_gate, {part}_up = Split <axis = 2, num_outputs = 2> ({part}_inner)
  {part}_sigmoid = Sigmoid({part}_gate)
  {part}_silu = Mul({part}_gate, {part}_sigmoid)
  {part}_activated_by_token = Mul({part}_silu, {part}_up)
  {part}_activated = Transpose <perm = [1, 0, 2]> ({part}_activated_by_token)
  {round_activated}
  {outer}
"""

_OUTER_PRODUCT = """
  {part}_columns = Transpose <perm = [0, 2, 1]> ({part}_outer_w)
  {part}_outer_t = MatMul({part}_rounded, {part}_columns)
  {part}_outer = Cast <to = 1> ({part}_outer_t)
"""

# The same for few tokens: a compiler that fuses it reads quantized experts as they are stored, where it would dequantize them in
# memory for a product of stacks.
_OUTER_TERMS = """
  {part}_outer_axis = Constant <value_ints = [1]> ()
  {part}_outer_rows = Unsqueeze({part}_outer_w, {part}_outer_axis)
  {part}_hidden_axis = Constant <value_ints = [2]> ()
  {part}_hidden_row = Unsqueeze({part}_rounded, {part}_hidden_axis)
  {part}_outer_terms_t = Mul({part}_outer_rows, {part}_hidden_row)
  {part}_outer_terms = Cast <to = 1> ({part}_outer_terms_t)
  {part}_outer_last = Constant <value_ints = [-1]> ()
  {part}_outer = ReduceSum <keepdims = 0> ({part}_outer_terms, {part}_outer_last)
"""

_SHARED = """
  shared_axis = Constant <value_ints = [0]> ()
  shared = ReduceSum <keepdims = 0> (shared_outer, shared_axis)
"""


def _dense(part: str, form: FloatForm, outer: str = _OUTER_PRODUCT) -> str:
    rounded = form.rounded(f"{part}_activated", f"{part}_rounded", product=1)
    return _DENSE.format(part=part, round_activated=rounded, outer=outer.format(part=part))


def _engine_text(form: FloatForm, *, few: bool, shared: bool) -> str:
    parts = ("routed", "shared") if shared else ("routed",)
    matrices = "".join(
        form.matrix(f"gate_up_{part}", f"gate_up_{part}_scale", f"{part}_inner_w")
        + form.matrix(f"down_{part}", f"down_{part}_scale", f"{part}_outer_w")
        for part in parts
    )
    outer = _OUTER_TERMS if few and isinstance(form, QuantizedForm) else _OUTER_PRODUCT
    if few:
        routed = _FEW_TOKENS.format(round_activated=form.rounded("activated", "activated_rounded", product=1))
    else:
        routed = _dense("routed", form) + _MANY_TOKENS
    return f"""
  {form.preamble}
  {_TOKENS}
  {small_product("flat_f", "router", "logits")}
  {ENGINE_CHOICE}
  {matrices}
  token = CastLike(flat_f, routed_inner_w)
  {form.rounded("token", "token_rounded")}
  {routed}
  {_dense("shared", form, outer) + _SHARED if shared else ""}
  mixed = {"Add(routed, shared)" if shared else "Identity(routed)"}
  x_shape = Shape(x)
  mixed_x = Reshape(mixed, x_shape)
  y = Add(x, mixed_x)
"""


def engine_bodies(form: FloatForm, *, quantized: bool = False) -> dict[str, Body]:
    """For few and for many tokens, with and without shared experts. A stack NAME is two inputs, NAME_routed and NAME_shared."""
    bodies = {}
    for name, few in ((overloads.FEW_TOKENS, True), (overloads.MANY_TOKENS, False)):
        for suffix, shared in (("", False), (overloads.WITH_SHARED, True)):
            stacks = [f"{stack}_{part}" for stack in ("gate_up", "down") for part in ("routed", "shared")[: 1 + shared]]
            inputs = ["x", "norm", "router", "router_bias"]
            for stack in stacks:
                inputs += [stack, f"{stack}_scale"] if quantized else [stack]
            inputs += ["activation_scale"] if quantized else []
            bodies[name + suffix] = Body(_engine_text(form, few=few, shared=shared), tuple(inputs))
    return bodies
