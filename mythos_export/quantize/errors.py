"""How far a quantized matrix's outputs are from what they should be, over the text that statistics were gathered from.

Shape letters: O output and I input channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from calibration.smoothing import weighted_error
from calibration.statistics import Statistics
from mythos_export.quantize.folds import Factors
from mythos_export.quantize.plan import MatrixPlan

ErrorOver = Literal["outputs", "channels", "weights"]


class OutputError:
    """Root of the squared error of a matrix's outputs over their squares, all loops and the matrices of a stack together.

    over: "outputs" where statistics hold the inputs' full second moments; "channels" where they hold mean squares alone, as if
    channels were independent; "weights" without statistics, as if all channels were alike. Experts without tokens do not count.
    """

    def __init__(self, statistics: Statistics | None, factors: Factors) -> None:
        self._statistics, self._factors = statistics, factors
        self._error, self._result = 0.0, 0.0
        self.over: ErrorOver = "weights"

    def add(self, matrix: MatrixPlan, index: int | None, weight: Tensor, restored: Tensor) -> None:
        """weight [O, I] with its factors, and what became of it: matrix `index` of a stack, or rows of a matrix."""
        _, columns = self._factors.of(matrix.name, index)
        read_by = matrix.modules  # none where rows are looked up only
        square, hessian = self._inputs(read_by[index or 0]) if read_by else (None, None)
        if hessian is not None:
            self.over = "outputs"
            if columns is not None:
                hessian = hessian / columns / columns.unsqueeze(1)
            self._error += _quadratic(weight - restored, hessian)
            self._result += _quadratic(weight, hessian)
            return
        if square is None:
            square = torch.ones(weight.shape[-1])
        else:
            self.over = "channels"
            square = square if columns is None else square / columns.square()
        self._error += weighted_error([(weight, restored)], square)
        self._result += weighted_error([(weight, torch.zeros_like(weight))], square)

    @property
    def relative(self) -> float:
        """0 where there was nothing to go wrong."""
        return (max(self._error, 0.0) / self._result) ** 0.5 if self._result > 0 else 0.0

    def _inputs(self, module: str) -> tuple[Tensor | None, Tensor | None]:
        """Sums over tokens and loops: squares [I], second moments [I, I]; None for what is not known."""
        if self._statistics is None or module not in self._statistics:
            return None, None
        moments = self._statistics.moments(module, "square", "hessian")
        hessian = moments.get("hessian")
        return moments["square"].sum(0), None if hessian is None else hessian.sum(0)


def _quadratic(matrix: Tensor, hessian: Tensor) -> float:
    """Sum of squares of the outputs of matrix [O, I] for inputs of these second moments [I, I]."""
    return float(((matrix @ hessian) * matrix).sum(dtype=torch.float64))
