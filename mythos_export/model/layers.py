"""What a parameter and a linear layer are in export form: matrices stand [out, in], the residual stream is float32.

Shape letters: B batch, S new tokens, D dim, I and O input and output channels, F hidden channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos_export.config import DenseConfig


def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter to be filled from a checkpoint."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class NormalizedLinear(nn.Module):
    """y [..., O] = rms_norm(x [..., I]) · weight [O, I]^T, in the dtype of the matrix; bias: with one [O] added."""

    def __init__(self, n_in: int, n_out: int, epsilon: float, dtype: torch.dtype, *, bias: bool = False) -> None:
        super().__init__()
        self.norm = empty(n_in, dtype=torch.float32)
        self.weight = empty(n_out, n_in, dtype=dtype)
        self.bias = empty(n_out, dtype=dtype) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mythos.normalized_linear(x, self.norm, self.weight, self.epsilon)
        return y if self.bias is None else y + self.bias


class ResidualLinear(nn.Module):
    """residual [..., O] + x [..., I] · weight [O, I]^T, float32; bias: with one [O] added."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = empty(n_out, n_in, dtype=dtype)
        self.bias = empty(n_out, dtype=dtype) if bias else None

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mythos.residual_linear(residual, x, self.weight)
        return y if self.bias is None else y + self.bias


class FeedForward(nn.Module):
    """x + SwiGLU (arXiv 2002.05202) of rms_norm(x), x [B, S, D] float32: gate and up in one matrix [2F, D], down [D, F]."""

    def __init__(self, dim: int, config: DenseConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = empty(dim, dtype=torch.float32)
        self.gate_up = empty(2 * config.hidden_dim, dim, dtype=dtype)
        self.down = empty(dim, config.hidden_dim, dtype=dtype)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mythos.feed_forward(x, self.norm, self.gate_up, self.down, self.epsilon)
        return y


class BiasedFeedForward(nn.Module):
    """The same with biases: what FeedForward does in one operator is two here, and silu(gate) * up between them."""

    def __init__(self, dim: int, config: DenseConfig, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = NormalizedLinear(dim, 2 * config.hidden_dim, epsilon, dtype, bias=True)
        self.down = ResidualLinear(config.hidden_dim, dim, dtype, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = self.down(x, F.silu(gate) * up)
        return y
