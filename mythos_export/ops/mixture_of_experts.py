"""ai.mythos MixtureOfExperts: routed and shared SwiGLU experts (DeepSeekMoE, arXiv 2401.06066) with the norm and the residual of
their pre-norm layer.

Experts are chosen and weighed as mythos_export.ops.routing says; the experts after the routed ones see every token with weight 1.
Weights are packed per expert, output channels first, so an expert is one contiguous piece and a row of it one dot product.

Shape letters: N tokens, D dim, E routed experts, A all experts, K top_k, k chosen and shared ones of a token, F expert_dim,
b blocks of input channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos_export import overloads
from mythos_export.config import RoutingConfig
from mythos_export.ops import routing
from mythos_export.ops.engine_forms import ENGINE, ENGINE_QUANTIZED
from mythos_export.ops.expert_bodies import engine_bodies, portable_body
from mythos_export.ops.operator import Body, Operator, rms_norm, wide
from mythos_export.ops.products import (
    FLOAT,
    ActivationRounding,
    DequantizedForm,
    PackedForm,
    dequantize,
    quantized,
)


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
    scoring: int,
    normalized: int,
    scale: float,
    n_groups: int,
    top_k_groups: int,
    group_top_k: int,
) -> Tensor:
    """x + the weighted sum of top_k routed experts and the shared ones of rms_norm(x), for every token.

    x [..., D] float32, norm [D] float32. router [E, D] float32, router_bias [E] float32: shifts the choice only. gate_up
    [A, 2F, D]: gate, then up. down [A, D, F]. scoring to group_top_k: see routing.ATTRIBUTES. Returns [..., D] float32. Router,
    scores and the sum over experts are float32.
    """
    how = routing.routing_of(scoring, normalized, scale, n_groups, top_k_groups, group_top_k)

    def expert(index: int, tokens: Tensor) -> Tensor:
        gate, up = F.linear(tokens.to(gate_up.dtype), gate_up[index]).chunk(2, -1)
        return wide(F.linear(F.silu(gate) * up, down[index]))

    return _mix(x, norm, router, router_bias, len(gate_up), top_k, how, epsilon, expert)


@mixture_of_experts.register_fake
def _(x, *_):  # type: ignore[no-untyped-def]
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
    scoring: int,
    normalized: int,
    scale: float,
    n_groups: int,
    top_k_groups: int,
    group_top_k: int,
    bits: int,
    block_size: int,
    activation_type: int,
) -> Tensor:
    """The same with gate_up and down as `dequantize` takes them, their inputs rounded as ActivationRounding says.

    bits: 4 where they are packed uint8, else 8.
    """
    how = routing.routing_of(scoring, normalized, scale, n_groups, top_k_groups, group_top_k)
    rounded = ActivationRounding(activation_scale, 2, block_size, activation_type)

    def expert(index: int, tokens: Tensor) -> Tensor:
        inner = dequantize(gate_up[index], gate_up_scale[index], block_size).to(tokens.dtype)
        gate, up = F.linear(rounded(tokens, 0), inner).chunk(2, -1)
        outer = dequantize(down[index], down_scale[index], block_size).to(tokens.dtype)
        return F.linear(rounded(F.silu(gate) * up, 1), outer)

    return _mix(x, norm, router, router_bias, len(gate_up), top_k, how, epsilon, expert)


def _mix(
    x: Tensor,
    norm: Tensor,
    router: Tensor,
    router_bias: Tensor,
    n_experts: int,
    top_k: int,
    how: RoutingConfig,
    epsilon: float,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """expert(index, tokens [n, D]) runs one expert."""
    normed = rms_norm(wide(x), norm, epsilon).flatten(0, -2)
    chosen, weight = routing.route(F.linear(normed, router), router_bias, top_k, how)
    y = torch.zeros_like(normed)
    for index in chosen.unique().tolist():
        token, rank = torch.where(chosen == index)
        y.index_add_(0, token, expert(index, normed[token]) * weight[token, rank].unsqueeze(-1))
    for index in range(len(router), n_experts):
        y += expert(index, normed)
    return x + y.reshape(x.shape)


OPERATOR = Operator(
    name="MixtureOfExperts",
    doc="Routed and shared SwiGLU experts on rms_norm(x), added to x (arXiv 2401.06066). Routed ones are chosen by logits, or "
    "their sigmoid, plus router_bias (arXiv 2408.15664), where there are groups out of the best of them, and weighed by the "
    "softmax or sigmoid of the logits without it. Router, scores and the sum are float32.",
    inputs=(
        ("x", "tensor(float)", "[batch, seq, dim]"),
        ("norm", "tensor(float)", "[dim]: weight of the RMSNorm"),
        ("router", "tensor(float)", "[n_experts, dim]"),
        ("router_bias", "tensor(float)", "[n_experts]: added for the choice only"),
        ("gate_up", "T", "[n_experts + n_shared_experts, 2 * expert_dim, dim]: rows of gate, then of up"),
        ("down", "T", "[n_experts + n_shared_experts, dim, expert_dim]"),
    ),
    outputs=(("y", "tensor(float)", "[batch, seq, dim]"),),
    attributes={
        "top_k": ("INT", "routed experts a token"),
        "epsilon": ("FLOAT", "epsilon of the RMSNorm"),
        **routing.ATTRIBUTES,
    },
    defaults=routing.DEFAULTS,
    torch_op=torch.ops.mythos.mixture_of_experts.default,
    infer_shapes=lambda shapes, _: [list(shapes[0])],
    body=portable_body(FLOAT),
    other_bodies=engine_bodies(ENGINE),
)

_WEIGHTS = ("gate_up", "down")
QUANTIZED = quantized(
    OPERATOR,
    torch.ops.mythos.quantized_mixture_of_experts.default,
    portable_body(PackedForm()),
    weights=_WEIGHTS,
    packed=True,
    other_bodies={
        overloads.DEQUANTIZED: Body(portable_body(DequantizedForm(*_WEIGHTS))),
        **engine_bodies(ENGINE_QUANTIZED, quantized=True),
    },
)
