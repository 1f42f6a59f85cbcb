"""GPTQ (arXiv 2210.17323): rounds a matrix column by column and lets the columns still to come make up for the error.

Columns go in order of falling second moment, with scales fixed beforehand, so a scale stays with its block of channels. Then scales
are fitted to the numbers found, and the numbers to the scales, column by column, as in QuantEase (arXiv 2309.01885): each step can
only lessen the error tr(D H Dᵀ) of the difference D.

Shape letters: O output and I input channels, b blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.rounding import Format

_COLUMNS = 128  # columns between two updates of all the rest
_ROWS = 64  # rows whose scales are fitted at a time
_STRETCH = 1.5  # most that fitting may change a scale by


def gptq(
    weight: Tensor, hessian: Tensor, form: Format, scales: Tensor, damping: float = 0.01, sweeps: int = 2
) -> tuple[Tensor, Tensor]:
    """weight [O, I], scales [O, b] and the inputs' second moments XᵀX [I, I] -> values as they are stored [O, I] and scales [O, b].

    damping: share of the mean of the diagonal that is added to it. sweeps: rounds of fitting scales and numbers afterwards. A
    channel that was always 0 is rounded to nearest.
    """
    h = hessian.double()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(damping * h.diagonal().mean())
    weight = weight.float()
    levels = _column_by_column(weight, h, form, scales)
    h = h.float()
    for _ in range(sweeps):
        scales = _fitted_scales(weight, h, form, scales, levels)
        levels = _descended(weight, h, form, scales, levels)
    return form.store(levels), scales


def _column_by_column(weight: Tensor, h: Tensor, form: Format, scales: Tensor) -> Tensor:
    """Levels [O, I] by GPTQ. h [I, I] float64, damped."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    ordered = h[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True).float()
    w = weight[:, order]
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
    return restored


def _fitted_scales(weight: Tensor, h: Tensor, form: Format, scales: Tensor, levels: Tensor) -> Tensor:
    """The scales [O, b] that make the error least with these levels, where they are sound; else as they were."""
    if form.whole_rows:
        return scales
    n_blocks = scales.shape[1]
    fitted = scales.float().clone()
    for row in range(0, len(weight), _ROWS):
        part = slice(row, row + _ROWS)
        by_block = torch.block_diag(*[torch.ones(1, form.block_size)] * n_blocks)[:, : weight.shape[1]]
        q = levels[part].unsqueeze(1) * by_block  # [rows, b, I]
        qh = q @ h
        normal = qh @ q.transpose(1, 2)
        normal.diagonal(dim1=1, dim2=2).add_(1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-12)
        fitted[part] = torch.linalg.solve(normal, qh @ weight[part].unsqueeze(-1)).squeeze(-1)
    old = scales.float()
    sound = torch.isfinite(fitted) & (fitted > old / _STRETCH) & (fitted < old * _STRETCH)
    return torch.where(sound, fitted, old).half()


def _descended(weight: Tensor, h: Tensor, form: Format, scales: Tensor, levels: Tensor) -> Tensor:
    """One sweep over the columns, each set to the levels that make the error least given all others."""
    s = form.each(scales, weight.shape[1])
    levels = levels.clone()
    difference = weight - levels * s
    gradient = difference @ h
    for start in range(0, weight.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, weight.shape[1])
        changes = torch.empty_like(weight[:, start:stop])
        own = h[start:stop, start:stop]
        for i in range(start, stop):
            at = i - start
            target = levels[:, i] * s[:, i] + gradient[:, i] / h[i, i]
            new = form.levels(target / s[:, i])
            changes[:, at] = (levels[:, i] - new) * s[:, i]
            levels[:, i] = new
            gradient[:, start:stop].addr_(changes[:, at], own[at])
        gradient[:, :start].addmm_(changes, h[start:stop, :start])
        gradient[:, stop:].addmm_(changes, h[start:stop, stop:])
    return levels
