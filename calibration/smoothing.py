"""Factors of the channels between two layers: what one divides its outputs by, the next multiplies its weights with.

The product stays what it was; what changes is how much rounding hurts: SmoothQuant (arXiv 2211.10438) moves large activations into
weights, AWQ (arXiv 2306.00978) makes the weights of much-used channels larger and so their error smaller.

Shape letters: O output and I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_GRID = 20  # exponents tried between 0 and 1
_RANGE = 2.0**8  # most that a factor may differ from 1: activations stay far from the ends of float16


def smoothquant(largest_input: Tensor, largest_weight: Tensor, strength: float = 0.5) -> Tensor:
    """Factors [I] of the weights: largest_input ** strength / largest_weight ** (1 - strength), both [I].

    Channels that are never used keep 1.
    """
    used = (largest_input > 0) & (largest_weight > 0)
    ratio = largest_input.double().pow(strength) / largest_weight.double().pow(1 - strength)
    return _bounded(torch.where(used, ratio, torch.ones_like(ratio)))


def awq(mean_input: Tensor, loss: Callable[[Tensor], float]) -> tuple[Tensor, float]:
    """Factors [I] mean_input ** exponent that make the loss least, exponents 0 to 1, and that exponent.

    mean_input [I]: mean magnitudes. loss: what a vector of factors costs, such as `weighted_error` over the matrices concerned.
    """
    best, least, chosen = torch.ones_like(mean_input), float("inf"), 0.0
    positive = torch.where(
        mean_input > 0, mean_input, mean_input[mean_input > 0].min() if (mean_input > 0).any() else 1.0
    )
    for step in range(_GRID):
        factors = _bounded(positive.double().pow(step / _GRID))
        cost = loss(factors)
        if cost < least:
            best, least, chosen = factors, cost, step / _GRID
    return best, chosen


def weighted_error(pairs: Iterable[tuple[Tensor, Tensor]], mean_square: Tensor) -> float:
    """Sum over pairs (matrix, rounded matrix), each [O, I], of the squared difference, weighed by the channels' mean_square [I]."""
    return sum(float(((a - b).square().sum(0) * mean_square).sum(dtype=torch.float64)) for a, b in pairs)


def _bounded(factors: Tensor) -> Tensor:
    """Factors around 1 (geometric mean), not beyond the range, as float32."""
    factors = factors / torch.exp(torch.log(factors).mean())
    return factors.clamp(1 / _RANGE, _RANGE).float()
