"""Static scales of activations from histograms of their magnitudes: how much of the range to keep.

Shape letters: K bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = 0.9999
_LEVELS = 128  # of magnitudes, 0 included
_STEPS = 64  # ranges tried


def activation_limit(histogram: Tensor, exponent: float, largest: float, method: str = "minmax") -> float:
    """The magnitude to represent, at most the largest; what lies above saturates.

    histogram [K]: counts over 0 to 2**exponent. method: minmax, all; percentile, the magnitude that 99.99 % stay below; mse, where
    the squared error of rounding to 8 bits is least; entropy, where the rounded distribution is closest to the kept one
    (Kullback-Leibler, as in NVIDIA's "8-bit inference with TensorRT", 2017). 0 where nothing was seen.
    """
    if method == "minmax" or largest <= 0:
        return largest
    counts = histogram.double()
    width = 2.0**exponent / len(counts)
    if method == "percentile":
        below = counts.cumsum(0) / counts.sum()
        return float(min(largest, (int((below < PERCENTILE).sum()) + 1) * width))
    cost = _squared_error if method == "mse" else _divergence
    used = int(torch.nonzero(counts).max()) + 1
    first = min(used, _LEVELS)
    kept = sorted({first + (used - first) * step // _STEPS for step in range(1, _STEPS + 1)})
    best = min(kept, key=lambda bins: cost(counts, bins))
    return float(min(largest, best * width))


def _squared_error(counts: Tensor, bins: int) -> float:
    centre = torch.arange(len(counts), dtype=torch.float64) + 0.5
    step = bins / (_LEVELS - 1)
    rounded = (centre / step).round().clamp(max=_LEVELS - 1) * step
    return float((counts * (centre - rounded).square()).sum())


def _divergence(counts: Tensor, bins: int) -> float:
    """KL of the kept bins, the rest added to the last, from the same spread over the levels."""
    kept = counts[:bins].clone()
    kept[-1] += counts[bins:].sum()
    level = torch.arange(bins) * _LEVELS // bins
    filled = (counts[:bins] > 0).double()
    mass = torch.zeros(_LEVELS, dtype=torch.float64).index_add_(0, level, counts[:bins])
    share = torch.zeros(_LEVELS, dtype=torch.float64).index_add_(0, level, filled)
    spread = torch.where(filled > 0, (mass / share.clamp(min=1.0))[level], 0.0)
    p, q = kept / kept.sum(), spread / spread.sum().clamp(min=1e-300)
    return float(torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum())
