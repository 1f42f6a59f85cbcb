"""What is kept of a module's inputs while a model runs over text: sums, extremes, second moments, histograms, one a loop.

An observer sees the input of a torch module, hooked before its forward. Everything it keeps adds up (or takes the larger), so
parts of a text can be observed apart and merged, and memory does not grow with the text.

Shape letters: T tokens of a batch, n of them that a module sees, I input channels, L loops kept, K bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runtimes.errors import InputError

BINS = 2048  # of a histogram, over 0 to a power of two: histograms of other ranges then merge exactly
Moments = dict[str, Tensor]
_EXTREMES = {"largest", "envelope", "exponent"}


@dataclass(frozen=True)
class Wanted:
    """What to keep of one module's inputs, besides the number of tokens and each channel's largest, mean and mean square.

    hessian: the full second moments XᵀX [I, I]. histogram: of all magnitudes. keep_loop: which call's second moments to keep
    where only one is wanted (-1 the last, 0 the first); "all" keeps every loop's, "sum" adds them up as they come. pairs:
    (start, stop, head_dim) of channels that hold rotated heads, pairs half a head apart, whose radius is kept as well.
    """

    hessian: bool = False
    histogram: bool = False
    keep_loop: str | int = "all"
    pairs: tuple[int, int, int] | None = None

    def n_bytes(self, channels: int, n_loops: int) -> int:
        """Memory the sums take."""
        full = channels * channels * (n_loops if self.keep_loop == "all" else 1) if self.hessian else 0
        return 4 * (full + n_loops * (4 * channels + (BINS if self.histogram else 0)))


class Observer:
    """The sums of one module's inputs.

    moments: [L] tokens and weight; [L, I] largest, magnitude, square; [L or 1, I, I] hessian; [L, K] histogram with [L] exponent of
    its range; [L, I] envelope. Sums are float32, tokens and weight float64. divisor [I]: inputs are divided by it first.
    """

    def __init__(self, name: str, channels: int, n_loops: int, wanted: Wanted, divisor: Tensor | None = None) -> None:
        self.name, self.wanted, self.n_loops, self._divisor = name, wanted, n_loops, divisor
        self.moments: Moments = {
            "tokens": torch.zeros(n_loops, dtype=torch.float64),
            "weight": torch.zeros(n_loops, dtype=torch.float64),
            **{key: torch.zeros(n_loops, channels) for key in ("largest", "magnitude", "square")},
        }
        if wanted.hessian:
            kept = n_loops if wanted.keep_loop == "all" else 1
            self.moments["hessian"] = torch.zeros(kept, channels, channels)
        if wanted.histogram:
            self.moments["histogram"] = torch.zeros(n_loops, BINS)
            self.moments["exponent"] = torch.full((n_loops,), float("-inf"))
        if wanted.pairs:
            self.moments["envelope"] = torch.zeros(n_loops, channels)

    def see(self, x: Tensor, weight: Tensor | None, loop: int) -> None:
        """Adds x [n, I] with the tokens' weights [n] (None: 1 each). Raises InputError for a NaN or an infinity."""
        if not len(x):
            return
        if self._divisor is not None:
            x = x / self._divisor
        size = x.abs()
        largest = size.amax(0)
        if not torch.isfinite(largest).all():
            raise InputError(
                f"{self.name}, loop {loop + 1}: its inputs hold NaN or infinite numbers; the model does not survive this text at "
                "this depth, check the checkpoint with `mythos-export eval`"
            )
        moments = self.moments
        moments["tokens"][loop] += len(x)
        moments["weight"][loop] += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        moments["largest"][loop] = torch.maximum(moments["largest"][loop], largest)
        moments["magnitude"][loop] += size.sum(0) if weight is None else weight @ size
        weighed = x if weight is None else x * weight.sqrt().unsqueeze(1)
        moments["square"][loop] += weighed.square().sum(0)
        if self.wanted.hessian:
            self._add_hessian(weighed, loop)
        if self.wanted.histogram:
            self._add_histogram(size, loop)
        if self.wanted.pairs:
            start, stop, head_dim = self.wanted.pairs
            moments["envelope"][loop] = torch.maximum(
                moments["envelope"][loop], rotary_envelope(size, start, stop, head_dim).amax(0)
            )

    def _add_hessian(self, weighed: Tensor, loop: int) -> None:
        keep, hessian = self.wanted.keep_loop, self.moments["hessian"]
        if isinstance(keep, int) and loop != keep % self.n_loops:
            return
        row = hessian[loop if keep == "all" else 0]
        torch.addmm(row, weighed.T, weighed, out=row)

    def _add_histogram(self, size: Tensor, loop: int) -> None:
        largest = float(size.max())
        exponent = math.frexp(largest)[1] if largest > 0 else -126
        old = float(self.moments["exponent"][loop])
        exponent = max(exponent, int(old)) if math.isfinite(old) else exponent
        counts = self.moments["histogram"][loop]
        if math.isfinite(old):
            counts.copy_(widen_histogram(counts, exponent - int(old)))
        self.moments["exponent"][loop] = exponent
        counts += torch.histc(size.flatten(), BINS, 0.0, 2.0**exponent)


def rotary_envelope(size: Tensor, start: int, stop: int, head_dim: int) -> Tensor:
    """size [n, I]: magnitudes -> the same with every channel of the rotated heads in start..stop replaced by its pair's radius.

    RoPE (arXiv 2104.09864) turns a pair with the position; no position takes either channel beyond the radius.
    """
    heads = size[:, start:stop].unflatten(1, (-1, 2, head_dim // 2))
    radius = heads.square().sum(2, keepdim=True).sqrt().expand_as(heads).reshape(len(size), -1)
    return torch.cat([size[:, :start], radius, size[:, stop:]], 1)


def widen_histogram(counts: Tensor, doublings: int) -> Tensor:
    """counts [K] over a range -> over one 2**doublings times as wide."""
    for _ in range(min(doublings, BINS.bit_length())):
        counts = torch.cat([counts.unflatten(0, (-1, 2)).sum(1), torch.zeros(BINS // 2)])
    return counts


def merge_moments(a: Moments, b: Moments) -> Moments:
    """What one observer would have kept of both texts."""
    merged: Moments = {}
    for key, value in a.items():
        if key in _EXTREMES:
            merged[key] = torch.maximum(value, b[key])
        elif key == "histogram":
            rows = []
            for loop in range(len(value)):
                exponents = [float(part["exponent"][loop]) for part in (a, b)]
                widened = [
                    widen_histogram(part["histogram"][loop], int(max(exponents) - e)) if math.isfinite(e) else 0
                    for part, e in zip((a, b), exponents, strict=True)
                ]
                rows.append(widened[0] + widened[1] + torch.zeros(BINS))
            merged[key] = torch.stack(rows)
        else:
            merged[key] = value + b[key]
    return merged
