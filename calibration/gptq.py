"""GPTQ (arXiv 2210.17323): rounds a matrix column by column and lets the columns still to come make up for the error.

Columns go in order of falling second moment, with scales fixed beforehand, so a scale stays with its block of channels.

Shape letters: O output and I input channels, b blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.rounding import Format

_COLUMNS = 128  # columns between two updates of all the rest


def gptq(weight: Tensor, hessian: Tensor, form: Format, scales: Tensor, damping: float = 0.01) -> Tensor:
    """weight [O, I] with scales [O, b] and the inputs' second moments XᵀX [I, I] -> values as they are stored [O, I].

    damping: share of the mean of the diagonal that is added to it. A channel that was always 0 is rounded to nearest.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    order = torch.argsort(torch.where(dead, -1.0, diagonal), descending=True, stable=True)
    h = hessian[order][:, order].double()
    h.diagonal()[dead[order]] = 1.0
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    w = weight.float()[:, order].clone()
    s = form.each(scales, weight.shape[1])[:, order]
    levels = torch.empty_like(w)
    for start in range(0, w.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, w.shape[1])
        errors = torch.empty_like(w[:, start:stop])
        for i in range(start, stop):
            levels[:, i] = form.levels(w[:, i] / s[:, i])
            error = (w[:, i] - levels[:, i] * s[:, i]) / inverse[i, i]
            w[:, i:stop].addr_(error, inverse[i, i:stop], alpha=-1.0)
            errors[:, i - start] = error
        w[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1.0)
    restored = torch.empty_like(levels)
    restored[:, order] = levels
    return form.store(restored)
