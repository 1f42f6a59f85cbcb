"""Block quantization of a matrix: symmetric, a scale for every block of input channels; to nearest, or with searched scales.

Shape letters: O output and I input channels, b blocks, E any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtimes.errors import InputError

BLOCK_SIZES = (32, 64, 128)
_SMALLEST_SCALE = 2.0**-20  # of float16 numbers, the least that still has some digits; no scale is ever 0
_SHRINK = torch.linspace(1.0, 0.6, 17)  # shares of the largest magnitude that a searched scale may reach


@dataclass(frozen=True)
class Format:
    """Numbers a matrix is stored in.

    kind: "int8", "int4" or "fp8" (e4m3fn, arXiv 2209.05433). block_size: input channels a scale, of BLOCK_SIZES. whole_rows: one
    scale a row, repeated for each of its blocks.
    """

    kind: str = "int8"
    block_size: int = 32
    whole_rows: bool = False

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    @property
    def limit(self) -> float:
        """Largest magnitude to both sides of 0."""
        return {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[self.kind]

    @property
    def lowest(self) -> float:
        """Least number: int4 has one more below 0. int8 keeps to ±127, as integer kernels like it."""
        return -8.0 if self.kind == "int4" else -self.limit

    def blocks(self, x: Tensor) -> Tensor:
        """[E, O, I] -> float32 [E, O, b, block_size], zeros where the last is not full."""
        blocks: Tensor = F.pad(x.float(), (0, -x.shape[-1] % self.block_size)).unflatten(-1, (-1, self.block_size))
        return blocks

    def levels(self, scaled: Tensor) -> Tensor:
        """The nearest of the format's numbers, as float32."""
        if self.kind == "fp8":
            return scaled.clamp(-self.limit, self.limit).to(torch.float8_e4m3fn).float()
        return scaled.round().clamp(self.lowest, self.limit)

    def store(self, levels: Tensor) -> Tensor:
        """Levels as they are stored: int8 (int4 too, before packing) or float8_e4m3fn."""
        return levels.to(torch.float8_e4m3fn if self.kind == "fp8" else torch.int8)

    def each(self, scales: Tensor, channels: int) -> Tensor:
        """scales [E, O, b] -> float32 [E, O, I], one for every number."""
        return scales.float().repeat_interleave(self.block_size, -1)[..., :channels]


def nearest_scales(weight: Tensor, form: Format, name: str = "weight") -> Tensor:
    """weight [E, O, I] -> scales float16 [E, O, b]: a block's largest magnitude over the format's.

    Raises InputError, naming `name`, where weight holds a NaN, an infinity, or numbers that no float16 scale reaches.
    """
    largest = form.blocks(weight).abs().amax(-1)
    if form.whole_rows:
        largest = largest.amax(-1, keepdim=True).expand_as(largest)
    if not torch.isfinite(largest).all():
        raise InputError(f"{name}: holds NaN or infinite weights; expected finite ones, check the training run")
    scales = (largest / form.limit).clamp(min=_SMALLEST_SCALE).half()
    if not torch.isfinite(scales).all():
        raise InputError(
            f"{name}: weights of up to {float(largest.max()):.3g} are too large for float16 scales; do not quantize it"
        )
    return scales


def searched_scales(weight: Tensor, form: Format, importance: Tensor, name: str = "weight") -> Tensor:
    """The same with each block's scale shrunk to where its squared rounding error, weighed by channel, is least.

    importance [I]: of the input channels, usually their mean squares.
    """
    full = nearest_scales(weight, form, name).float()
    blocks, weights = form.blocks(weight), form.blocks(importance)
    best, least = full, torch.full_like(full, float("inf"))
    for share in _SHRINK.tolist():
        scales = (full * share).clamp(min=_SMALLEST_SCALE).half().float()
        rounded = form.levels(blocks / scales.unsqueeze(-1)) * scales.unsqueeze(-1)
        error = (rounded - blocks).square_().mul_(weights).sum(-1)
        if form.whole_rows:
            error = error.sum(-1, keepdim=True).expand_as(error)
        better = error < least
        best, least = torch.where(better, scales, best), torch.where(better, error, least)
    return best.half()


def round_to_nearest(weight: Tensor, form: Format, name: str = "weight") -> tuple[Tensor, Tensor]:
    """weight [E, O, I] -> values as they are stored [E, O, I] and `nearest_scales` [E, O, b]; raises what that raises."""
    scales = nearest_scales(weight, form, name)
    return round_with(weight, form, scales), scales


def round_with(weight: Tensor, form: Format, scales: Tensor) -> Tensor:
    """weight [E, O, I] with scales [E, O, b] -> the nearest numbers, as they are stored [E, O, I]."""
    return form.store(form.levels(weight.float() / form.each(scales, weight.shape[-1])))


def restore(values: Tensor, form: Format, scales: Tensor) -> Tensor:
    """What stored values [E, O, I] with scales [E, O, b] stand for, float32."""
    return values.float() * form.each(scales, values.shape[-1])


def pack_int4(integers: Tensor) -> Tensor:
    """int8 [E, O, I] within a nibble -> uint8 [E, O, I/2]: two a byte, the first in the low half, in two's complement."""
    nibbles = integers.view(torch.uint8) & 15
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
