"""Applies a plan to weights: folds factors, finds scales, rounds, and says how well it went.

Shape letters: O output and I input channels, b blocks, L loops, n products of an operator, E matrices of a stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calibration.activation_scales import activation_limit
from calibration.gptq import gptq
from calibration.observers import merge_moments
from calibration.rounding import (
    Format,
    restore,
    round_to_nearest,
    round_with,
    searched_scales,
)
from calibration.smoothing import awq, smoothquant, weighted_error
from calibration.statistics import Statistics
from mythos_export.quantize.errors import ErrorOver, OutputError
from mythos_export.quantize.folds import Factors, Fold, cache_folds, folds
from mythos_export.quantize.plan import MatrixPlan, Plan, is_mixture

_PIECE = 16 * 2**20  # numbers rounded at a time
_LOSS_ROWS = 1024  # of a matrix, evenly taken, that tell how good a choice of factors is
_LEAST_SHARE = 0.005  # of the tokens: an expert that saw fewer is not calibrated
_LEAST_TOKENS = 2  # times the input dimension
CACHE_LIMIT = 127.0  # levels of an int8 cache


class Inputs(NamedTuple):
    """What is known of a module's inputs, loops merged: tokens; mean magnitude, mean square and largest [I]; hessian [I, I]."""

    tokens: float
    magnitude: Tensor
    square: Tensor
    largest: Tensor
    hessian: Tensor | None


@dataclass
class Outcome:
    """What happened to a matrix. error: relative, as OutputError counts it. over: what that rests on. uncalibrated: experts rounded
    to nearest because they saw too few tokens, with how many."""

    error: float = 0.0
    over: ErrorOver = "weights"
    uncalibrated: dict[int, int] = field(default_factory=dict)


class Quantizer:
    """weights: every tensor by name, float32. statistics: None where the recipe needs none. observed: what is known of the inputs
    of products, and errors are counted over; the statistics, else the ranges, unless set."""

    def __init__(self, plan: Plan, weights: Mapping[str, Tensor], statistics: Statistics | None) -> None:
        self.plan, self._weights, self.statistics = plan, weights, statistics
        self.observed = statistics
        self._ranges: Statistics | None = None
        self.factors = Factors({name: weight.shape for name, weight in weights.items()})
        self.outcomes: dict[str, Outcome] = {}
        if plan.recipe.kv_cache and plan.recipe.kv_cache.scale == "channel":
            self._fold_cache()
        if plan.recipe.smoothing:
            for fold in folds(plan.config):
                self._smooth(fold)

    def set_ranges(self, ranges: Statistics) -> None:
        """Histograms of the inputs, gathered with `factors`: what static scales are chosen from."""
        self._ranges = ranges
        self.observed = self.observed or ranges

    @property
    def changed(self) -> set[str]:
        """Tensors that carry factors and are not quantized."""
        return (set(self.factors.rows) | set(self.factors.columns)) - set(self.plan.matrices)

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is before rounding, with its factors."""
        return self.factors.scaled(name, self._weights[name])

    def folded(self) -> dict[str, Tensor]:
        """Every tensor with its factors and nothing rounded: float32's results, by the weights that are rounded otherwise."""
        return {**self._weights, **{name: self.tensor(name) for name in {*self.factors.rows, *self.factors.columns}}}

    def quantized(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """A matrix in pieces along its first dimension: values as they are stored (int4 unpacked) and scales."""
        matrix = self.plan.matrices[name]
        outcome = self.outcomes[name] = Outcome()
        error = OutputError(self.observed, self.factors)
        for index, piece in self._pieces(matrix):
            weight = self.factors.scaled(name, self._weights[name][piece], piece)
            inputs = self._inputs(matrix, index, outcome)
            values, scales = _round(name, weight, matrix, inputs)
            error.add(matrix, index, weight, restore(values, matrix.form, scales))
            yield (values, scales) if index is None else (values.unsqueeze(0), scales.unsqueeze(0))
        outcome.error, outcome.over = error.relative, error.over

    def restored(self) -> dict[str, Tensor]:
        """Every tensor as the quantized model computes with it, float32; for models that fit into memory twice."""
        changed = {name: self.tensor(name) for name in self.changed}
        for name, matrix in self.plan.matrices.items():
            changed[name] = torch.cat([restore(v, matrix.form, s) for v, s in self.quantized(name)])
        return {**self._weights, **changed}

    def _pieces(self, matrix: MatrixPlan) -> Iterator[tuple[int | None, Any]]:
        """(index, where): the matrices of a stack, or runs of rows."""
        if len(matrix.shape) == 3:
            yield from ((index, index) for index in range(matrix.shape[0]))
            return
        rows = matrix.shape[0] if matrix.algorithm == "gptq" else max(1, _PIECE // matrix.shape[1])
        for start in range(0, matrix.shape[0], rows):
            yield None, slice(start, start + rows)

    def _inputs(self, matrix: MatrixPlan, index: int | None, outcome: Outcome) -> Inputs | None:
        """Statistics of a matrix's inputs; None where none are needed or an expert saw too few tokens."""
        if matrix.algorithm == "round-to-nearest" or self.statistics is None:
            return None
        module = matrix.modules[index or 0]
        inputs = self._merged(module, matrix.algorithm == "gptq")
        if index is not None and is_mixture(matrix.name, matrix.shape):
            seen, least = self.coverage(matrix, module, self.statistics)
            if seen < least or inputs.tokens == 0:
                outcome.uncalibrated[index] = int(seen)
                return None
        return self._rescaled(inputs, matrix.name, index)

    @staticmethod
    def coverage(matrix: MatrixPlan, module: str, statistics: Statistics) -> tuple[float, float]:
        """Tokens an expert saw in all loops, and how many it needs to be calibrated."""
        seen = statistics.moments(module, "tokens")["tokens"]
        passed = statistics.tokens[module] * (len(seen) if matrix.looped else 1)
        return float(seen.sum()), max(_LEAST_SHARE * passed, _LEAST_TOKENS * matrix.shape[-1])

    def _moments(self, module: str, *keys: str) -> dict[str, Tensor]:
        if self.statistics is None:
            raise TypeError("the recipe needs statistics")
        return self.statistics.moments(module, *keys)

    def _merged(self, module: str, with_hessian: bool) -> Inputs:
        """The loops of one module made one, by the recipe's rule."""
        keys = ("tokens", "weight", "magnitude", "square", "largest", *(("hessian",) if with_hessian else ()))
        moments = self._moments(module, *keys)
        rule = self.plan.recipe.calibration.loops
        weight = moments["weight"]
        ran = torch.nonzero(moments["tokens"] > 0).flatten().tolist() or [0]
        picked = {"last": ran[-1:], "first": ran[:1]}.get(rule, ran)
        hessian = moments.get("hessian")
        if rule == "max":
            # The loop with the largest inputs, by mean square.
            mean = moments["square"].sum(1) / weight.clamp(min=1e-9)
            picked = [int(mean.argmax())]
        total = float(weight[picked].sum())
        if hessian is not None:
            hessian = hessian[picked].sum(0) if len(hessian) > 1 else hessian[0]
        scale = 1.0 / total if total > 0 else 0.0
        return Inputs(
            total,
            moments["magnitude"][picked].sum(0) * scale,
            moments["square"][picked].sum(0) * scale,
            moments["largest"][picked].amax(0),
            hessian,
        )

    def _rescaled(self, inputs: Inputs, name: str, index: int | None) -> Inputs:
        """As the matrix's inputs are once its factors are folded in."""
        _, columns = self.factors.of(name, index)
        if columns is None:
            return inputs
        hessian = None if inputs.hessian is None else inputs.hessian / columns / columns.unsqueeze(1)
        return Inputs(
            inputs.tokens,
            inputs.magnitude / columns,
            inputs.square / columns.square(),
            inputs.largest / columns,
            hessian,
        )

    def _fold_cache(self) -> None:
        """Divides every cached channel by its largest magnitude, of a rotated pair the radius, so rows reach from -1 to 1."""
        for module, part, fold in cache_folds(self.plan.config):
            largest = self._moments(module, "envelope")["envelope"].amax(0)[part]
            self.factors.apply(fold, torch.where(largest > 0, largest, torch.ones_like(largest)))

    def _smooth(self, fold: Fold) -> None:
        smoothing = self.plan.recipe.smoothing
        readers = [self.plan.matrices[name] for name, _ in fold.columns if name in self.plan.matrices]
        if smoothing is None or not readers or not all(matrix.smoothed for matrix in readers):
            return
        parts = [
            self._part(matrix, module) for matrix in readers for module in matrix.modules if module in fold.modules
        ]
        inputs = [self._rescaled(self._merged(module, False), matrix.name, index) for matrix, module, index in parts]
        seen = [item for item in inputs if item.tokens > 0]
        if not seen:
            return
        weights = [
            self.factors.scaled(
                matrix.name, self._weights[matrix.name][index if index is not None else slice(None)], index
            )
            for matrix, _, index in parts
        ]
        if smoothing.method == "smoothquant":
            largest = torch.stack([item.largest for item in seen]).amax(0)
            heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
            self.factors.apply(fold, smoothquant(fold.shared(largest), fold.shared(heaviest), smoothing.strength))
            return
        total = sum(item.tokens for item in seen)
        magnitude = torch.stack([item.magnitude * (item.tokens / total) for item in seen]).sum(0)
        forms = [matrix.form for matrix, _, _ in parts]
        weights = [weight[:: max(1, len(weight) // _LOSS_ROWS)] for weight in weights]

        def loss(factors: Tensor) -> float:
            cost = 0.0
            for weight, form, item in zip(weights, forms, inputs, strict=True):
                scaled = weight * factors
                rounded, scales = round_to_nearest(scaled, form)
                difference = [(weight, restore(rounded, form, scales) / factors)]
                cost += item.tokens * weighted_error(difference, item.square)
            return cost

        factors, _ = awq(fold.shared(magnitude), loss)
        self.factors.apply(fold, factors)

    @staticmethod
    def _part(matrix: MatrixPlan, module: str) -> tuple[MatrixPlan, str, int | None]:
        return matrix, module, matrix.modules.index(module) if len(matrix.shape) == 3 else None

    def activation_scales(self, matrices: list[MatrixPlan], max_loops: int = 1) -> Tensor | None:
        """Static scales of an operator's products [L, n], or [1, n] where loops share them; None where there are none.

        max_loops: rows there must be, at least; loops deeper than calibration ran take the scales of its last.
        """
        activations = matrices[0].activations
        if activations.scale == "block" or activations.type == "float32":
            return None
        columns = []
        for matrix in matrices:
            limits = self._limits(matrix, activations.method, apart=activations.scale == "loop" and matrix.looped)
            levels = 448.0 if activations.type == "fp8" else CACHE_LIMIT
            smallest = max(limits.max().item(), 1.0) * 1e-6
            columns.append(limits.clamp(min=smallest) / levels)
        table = torch.stack(columns, 1).float()
        missing = max_loops - len(table)
        return table if len(table) == 1 or missing <= 0 else torch.cat([table, table[-1:].expand(missing, -1)])

    def _limits(self, matrix: MatrixPlan, method: str, *, apart: bool) -> Tensor:
        """Magnitudes to represent [L or 1] in the inputs of a matrix, all matrices of a stack together."""
        merged = reduce(merge_moments, (self._ranged(module) for module in matrix.modules))
        rows = range(len(merged["tokens"]))
        loops = [{key: value[i : i + 1] for key, value in merged.items()} for i in rows]
        if not apart:
            loops = [reduce(merge_moments, loops)]
        limits = [
            activation_limit(m["histogram"][0], float(m["exponent"]), float(m["largest"].max()), method) for m in loops
        ]
        return torch.tensor(limits)

    def _ranged(self, module: str) -> dict[str, Tensor]:
        if self._ranges is None:
            raise TypeError("the recipe has no static scales")
        return self._ranges.moments(module, "tokens", "histogram", "largest")


def _round(name: str, weight: Tensor, matrix: MatrixPlan, inputs: Inputs | None) -> tuple[Tensor, Tensor]:
    """One matrix, or rows of one, by its algorithm; to nearest without statistics."""
    form: Format = matrix.form
    if inputs is None:
        return round_to_nearest(weight, form, name)
    least = float(inputs.square.max()) * 1e-9
    scales = searched_scales(weight, form, inputs.square.clamp(min=max(least, 1e-30)), name)
    if matrix.algorithm == "gptq" and inputs.hessian is not None:
        return gptq(weight, inputs.hessian, form, scales)
    return round_with(weight, form, scales), scales
