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
    columns = weight.float().T.contiguous()  # a column of the matrix is a row here: one run of memory
    levels = _column_by_column(columns, h, form, scales)
    h = h.float()
    moved = h @ columns
    for _ in range(sweeps):
        scales = _fitted_scales(moved, h, form, scales, levels)
        levels = _descended(columns, h, form, scales, levels)
    return form.store(levels.T.contiguous()), scales


def _column_by_column(columns: Tensor, h: Tensor, form: Format, scales: Tensor) -> Tensor:
    """Levels [I, O] of columns [I, O] by GPTQ. h [I, I] float64, damped."""
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    ordered = h[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True).float()
    w, s = columns[order], _each(form, scales, columns)[order]
    levels = torch.empty_like(w)
    for start in range(0, len(w), _COLUMNS):
        stop = min(start + _COLUMNS, len(w))
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            levels[i] = form.levels(w[i] / s[i])
            errors[i - start] = (w[i] - levels[i] * s[i]) / inverse[i, i]
            w[i:stop].addr_(inverse[i, i:stop], errors[i - start], alpha=-1.0)
        w[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1.0)
    restored = torch.empty_like(levels)
    restored[order] = levels
    return restored


def _each(form: Format, scales: Tensor, columns: Tensor) -> Tensor:
    """The scale of every number of columns [I, O]."""
    return form.each(scales, len(columns)).T.contiguous()


def _fitted_scales(moved: Tensor, h: Tensor, form: Format, scales: Tensor, levels: Tensor) -> Tensor:
    """The scales [O, b] that make the error least with these levels [I, O], where they are sound; else as they were.

    moved [I, O]: h · columns.
    """
    if form.whole_rows:
        return scales
    size, n_blocks = form.block_size, scales.shape[1]

    def by_block(x: Tensor) -> Tensor:
        """[I, O] summed over each block of channels -> [b, O]."""
        return torch.stack([block.sum(0) for block in x.split(size)])

    wanted = by_block(moved * levels).T
    normal = torch.empty(n_blocks, n_blocks, len(scales))
    for block in range(n_blocks):
        start, stop = block * size, (block + 1) * size
        products = (h[start:, start:stop] @ levels[start:stop]).mul_(levels[start:])
        normal[block:, block] = normal[block, block:] = by_block(products)  # symmetric, as h is
    normal = normal.permute(2, 0, 1)
    normal = normal + torch.diag_embed(
        1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand_as(wanted) + 1e-12
    )
    fitted = torch.linalg.solve(normal, wanted)
    old = scales.float()
    sound = torch.isfinite(fitted) & (fitted > old / _STRETCH) & (fitted < old * _STRETCH)
    return torch.where(sound, fitted, old).half()


def _descended(columns: Tensor, h: Tensor, form: Format, scales: Tensor, levels: Tensor) -> Tensor:
    """Levels [I, O] after one sweep over the columns, each set to what makes the error least given all others."""
    s = _each(form, scales, columns)
    levels = levels.clone()
    gradient = h @ (columns - levels * s)
    for start in range(0, len(columns), _COLUMNS):
        stop = min(start + _COLUMNS, len(columns))
        changes = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            new = form.levels(levels[i] + gradient[i] / (h[i, i] * s[i]))
            changes[i - start] = (levels[i] - new) * s[i]
            levels[i] = new
            gradient[start:stop].addr_(h[i, start:stop], changes[i - start])
        gradient[:start].addmm_(h[:start, start:stop], changes)
        gradient[stop:].addmm_(h[stop:, start:stop], changes)
    return levels
