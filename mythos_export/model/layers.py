"""The small parts every layer is made of, in export form: matrices stand [in, out], the residual stream is float32.

Shape letters: B batch, S new tokens, D dim, I and O input and output channels, F hidden channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mythos_export.config import DenseConfig


def empty(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter to be filled from a checkpoint."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Linear(nn.Module):
    """y [..., O] = x [..., I] @ weight [I, O]: the layout ONNX MatMul reads without a transposed copy."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty(n_in, n_out, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) in float32, the result in the dtype of the matrices that read it.

    Written with a division, the form onnxruntime fuses into one node.
    """

    def __init__(self, dim: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty(dim, dtype=torch.float32)
        self.epsilon = epsilon
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * self.weight).to(self.dtype)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202) of x [B, S, D]: gate and up in one matrix [D, 2F], then down [F, D]."""

    def __init__(self, dim: int, config: DenseConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * config.hidden_dim, dtype)
        self.down = Linear(config.hidden_dim, dim, dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = self.down(gate * torch.sigmoid(gate) * up)
        return y
