"""RoPE (arXiv 2104.09864) as tables over positions, with the scalings that checkpoints of longer contexts carry.

Shape letters: P positions, h half the rotated size of a head.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import torch
from torch import Tensor

from mythos_export.config import ConfigError


class RopeScaling(msgspec.Struct, frozen=True):
    """How a model was taken beyond its original context, as config.json says (rope_parameters, or rope_scaling of older ones).

    linear: positions divided by factor (arXiv 2306.15595). llama3: low frequencies divided by factor, those in between blended.
    yarn: the same by rotations over the original context, and scores scaled by attention_factor (arXiv 2309.00071).
    """

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"rope scaling's factor is {self.factor}; expected at least 1")
        if self.low_freq_factor >= self.high_freq_factor or self.beta_slow >= self.beta_fast:
            raise ConfigError(
                "rope scaling's low_freq_factor and beta_slow must be below high_freq_factor and beta_fast"
            )


def tables(positions: int, dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin [P, h] float32 of the angles of dim = 2h rotated numbers. theta: base of the frequencies."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = 1.0
    if scaling is not None:
        original = scaling.original_max_position_embeddings or positions
        if scaling.rope_type == "linear":
            frequencies = frequencies / scaling.factor
        elif scaling.rope_type == "llama3":
            frequencies = _llama3(frequencies, scaling, original)
        elif scaling.rope_type == "yarn":
            frequencies, factor = _yarn(frequencies, scaling, original, theta), _attention_factor(scaling)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos() * factor, angles.sin() * factor


def _llama3(frequencies: Tensor, scaling: RopeScaling, original: int) -> Tensor:
    """Llama 3.1: whole above high_freq_factor rotations over the original context, divided below low_freq_factor."""
    rotations = original * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    whole = ((rotations - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * whole + frequencies / scaling.factor * (1 - whole)


def _yarn(frequencies: Tensor, scaling: RopeScaling, original: int, theta: float) -> Tensor:
    half = len(frequencies)

    def index_of(rotations: float) -> float:
        """Where a frequency turns so often over the original context."""
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    divided = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * divided + frequencies * (1 - divided)


def score_factor(scaling: RopeScaling) -> float:
    """What DeepSeek's models multiply scores by: the square of mscale_all_dim's growth, whatever the kind of scaling."""
    if scaling.rope_type == "default" or not scaling.mscale_all_dim:
        return 1.0
    return _grown(scaling, scaling.mscale_all_dim) ** 2


def _grown(scaling: RopeScaling, by: float) -> float:
    return 1.0 if scaling.factor <= 1 else 0.1 * by * math.log(scaling.factor) + 1.0


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _grown(scaling, scaling.mscale) / _grown(scaling, scaling.mscale_all_dim)
    return _grown(scaling, 1.0)
