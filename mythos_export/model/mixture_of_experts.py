"""Mixture of experts in export form: routed experts in the ai.mythos operator, shared ones as one dense block.

Shape letters: B batch, S new tokens, D dim, E experts, F expert_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mythos_export.config import DenseConfig, MixtureOfExpertsConfig
from mythos_export.model.layers import FeedForward, empty


class MixtureOfExperts(nn.Module):
    """Routed plus shared experts of x [B, S, D]; the router stays float32."""

    def __init__(self, dim: int, config: MixtureOfExpertsConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = empty(dim, config.n_experts, dtype=torch.float32)
        self.router_bias = empty(config.n_experts, dtype=torch.float32)
        self.gate_up = empty(config.n_experts, 2 * config.expert_dim, dim, dtype=dtype)
        self.down = empty(config.n_experts, dim, config.expert_dim, dtype=dtype)
        self.shared = FeedForward(dim, DenseConfig(config.shared_dim), dtype) if config.shared_dim else None

    def forward(self, x: Tensor) -> Tensor:
        routed: Tensor = torch.ops.mythos.mixture_of_experts(
            x, self.router, self.router_bias, self.gate_up, self.down, self.top_k
        )
        return routed if self.shared is None else routed + self.shared(x)
