"""Block quantization by rounding to nearest: symmetric, a scale for every block of input channels, no data needed.

Shape letters: O output and I input channels, b blocks, E any leading dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.errors import InputError

BITS = (8, 4)
BLOCK_SIZES = (32, 64, 128)
_SMALLEST_SCALE = 2.0**-20  # of float16 numbers, the least that still has some digits; no scale is ever 0


def round_to_nearest(weight: Tensor, bits: int, block_size: int, name: str = "weight") -> tuple[Tensor, Tensor]:
    """weight [E, O, I] -> integers int8 [E, O, I] within ±(2**(bits-1) - 1) and scales float16 [E, O, b].

    The scale of a block is its largest magnitude over that limit. Raises InputError, naming `name`, where weight holds a NaN, an
    infinity, or numbers that no float16 scale reaches.
    """
    limit = 2 ** (bits - 1) - 1
    channels = weight.shape[-1]
    blocks = F.pad(weight.float(), (0, -channels % block_size)).unflatten(-1, (-1, block_size))
    largest = blocks.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise InputError(f"{name}: holds NaN or infinite weights; expected finite ones, check the training run")
    scales = (largest / limit).clamp(min=_SMALLEST_SCALE).half()
    if not torch.isfinite(scales).all():
        raise InputError(
            f"{name}: weights of up to {float(largest.max()):.3g} are too large for float16 scales; do not quantize it"
        )
    integers = (blocks / scales.float().unsqueeze(-1)).round().clamp(-limit, limit)
    return integers.to(torch.int8).flatten(-2)[..., :channels], scales


def pack_int4(integers: Tensor) -> Tensor:
    """int8 [E, O, I] within a nibble -> uint8 [E, O, I/2]: two a byte, the first in the low half, in two's complement."""
    nibbles = integers.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
