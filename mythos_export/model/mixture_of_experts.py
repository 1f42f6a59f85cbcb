"""Mixture of experts in export form: routed and shared experts in one ai.mythos operator.

Shape letters: B batch, S new tokens, D dim, E routed experts, A routed and shared experts, F expert_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mythos_export.config import MixtureOfExpertsConfig
from mythos_export.model.layers import empty


class MixtureOfExperts(nn.Module):
    """x + routed and shared experts of rms_norm(x), x [B, S, D] float32; the router stays float32."""

    def __init__(self, dim: int, config: MixtureOfExpertsConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        experts = config.n_experts + config.n_shared_experts
        self.top_k, self.routing = config.top_k, tuple(config.routing.attributes.values())
        self.epsilon = epsilon
        self.norm = empty(dim, dtype=torch.float32)
        self.router = empty(config.n_experts, dim, dtype=torch.float32)
        self.router_bias = empty(config.n_experts, dtype=torch.float32)
        self.gate_up = empty(experts, 2 * config.expert_dim, dim, dtype=dtype)
        self.down = empty(experts, dim, config.expert_dim, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mythos.mixture_of_experts(
            x,
            self.norm,
            self.router,
            self.router_bias,
            self.gate_up,
            self.down,
            self.top_k,
            self.epsilon,
            *self.routing,
        )
        return y
