"""Mixed recipes: one that leaves every operator in its low format, and some operators raised to a high one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor

from calibration.rounding import Format, restore
from calibration.statistics import Statistics
from mythos_export.divergence import Progress
from mythos_export.model.unfolded import Unfolded
from mythos_export.quantize.bundle import QuantizableBundle, Text, calibrated_quantizer
from mythos_export.quantize.calibrate import Calibration
from mythos_export.quantize.compute import Quantizer
from mythos_export.quantize.plan import MatrixPlan, Plan, make_plan
from mythos_export.quantize.recipe import Recipe, WeightRule
from mythos_export.quantize.simulation import simulated_model, static_scales
from runtimes.errors import InputError

High = Literal["int8", "float32"]
_Pieces = list[tuple[Tensor, Tensor]]


class MixedRecipes:
    """A recipe and its mixtures with a higher format.

    high: what operators are raised to: int8, in the block size and by the algorithm that the recipe gives them, or float32.
    operators: by name, their matrices. movable: those that raising makes larger. Raises InputError where there are none.
    """

    def __init__(self, source: QuantizableBundle, recipe: Recipe, high: High) -> None:
        self.source, self.recipe, self.high = source, recipe, high
        self.low = make_plan(recipe, source.config)
        self.operators: dict[str, list[MatrixPlan]] = dict(self.low.operators())
        everything = self.plan(self.operators)
        # Embeddings of int4 recipes and odd matrices are in the high format already.
        self.movable = [
            name for name in self.operators if self.n_bytes(everything, name) > self.n_bytes(self.low, name)
        ]
        if not self.movable:
            formats = ", ".join(sorted({matrix.form.kind for matrix in self.low.matrices.values()})) or "no matrices"
            raise InputError(
                f"the recipe quantizes to {formats}, of which {high} makes nothing larger; pass another --recipe"
                + ("" if high == "float32" else ", or --high float32")
            )
        self._calibration: Calibration | None = None
        self._statistics: Statistics | None = None
        self._quantizers: dict[frozenset[str], Quantizer] = {}
        self._made: dict[tuple[str, Format], tuple[str, _Pieces]] = {}

    def calibrate(self, text: Text, folder: str | Path, progress: Progress | None = None) -> None:
        """Gathers, once for all mixtures, what the recipe rests on. folder: must outlive the quantizers."""
        self._calibration = self.source.calibration(self.low, text, folder, progress=progress)
        if self.recipe.needs_statistics:
            self._statistics = self._calibration.statistics()

    def mixture(self, raised: Collection[str]) -> Recipe:
        """The recipe with these operators raised: rules at its end that name their matrices."""
        rules: dict[tuple[object, ...], list[str]] = {}
        for name in self.operators:
            for matrix in self.operators[name] if name in raised else []:
                form = matrix.form
                kind = ("channel" if form.whole_rows else form.block_size, matrix.algorithm)
                rules.setdefault(kind if self.high != "float32" else (32, "round-to-nearest"), []).append(matrix.name)
        added = [
            WeightRule(tuple(names), format=self.high, block=block, algorithm=algorithm)  # type: ignore[arg-type]
            for (block, algorithm), names in rules.items()
        ]
        return msgspec.structs.replace(self.recipe, weights=(*self.recipe.weights, *added))

    def plan(self, raised: Collection[str]) -> Plan:
        return make_plan(self.mixture(raised), self.source.config)

    def n_bytes(self, plan: Plan, operator: str) -> int:
        """Size of an operator's matrices."""
        sizes = {matrix.name: matrix.n_bytes for matrix in plan.matrices.values()}
        return sum(
            sizes.get(matrix.name, self.source.weights[matrix.name].nbytes) for matrix in self.operators[operator]
        )

    def quantizer(self, raised: Collection[str]) -> Quantizer:
        """Of a mixture."""
        key = frozenset(raised)
        if key not in self._quantizers:
            plan = self.plan(raised)
            self._quantizers[key] = calibrated_quantizer(self.source, plan, self._calibration, self._statistics)
        return self._quantizers[key]

    def model(self, raised: Collection[str]) -> Unfolded:
        """The whole quantized model of a mixture."""
        quantizer = self.quantizer(raised)
        return self._model(quantizer, quantizer.plan)

    def model_of_one(self, operator: str, raised: Collection[str]) -> Unfolded:
        """The model with one operator as a mixture quantizes it, and everything else in float32, cache included."""
        quantizer = self.quantizer(raised)
        names = {matrix.name for matrix in self.operators[operator]}
        matrices = {name: matrix for name, matrix in quantizer.plan.matrices.items() if name in names}
        recipe = msgspec.structs.replace(quantizer.plan.recipe, kv_cache=None)
        return self._model(quantizer, replace(quantizer.plan, recipe=recipe, matrices=matrices))

    def _model(self, quantizer: Quantizer, plan: Plan) -> Unfolded:
        restored = {name: self._restored(quantizer, matrix) for name, matrix in plan.matrices.items()}
        weights = {**quantizer.folded(), **restored}
        return simulated_model(plan, weights, static_scales(quantizer, plan), self.source.n_loops)

    def _restored(self, quantizer: Quantizer, matrix: MatrixPlan) -> Tensor:
        """What is rounded to the same format with the same factors again and again is kept, in its integers."""
        key, factors = (matrix.name, matrix.form), _digest(quantizer, matrix.name)
        if key not in self._made or self._made[key][0] != factors:
            self._made[key] = factors, list(quantizer.quantized(matrix.name))
        return torch.cat([restore(values, matrix.form, scales) for values, scales in self._made[key][1]])


def _digest(quantizer: Quantizer, name: str) -> str:
    digest = hashlib.sha256()
    for factors in quantizer.factors.of(name):
        digest.update(b"" if factors is None else factors.contiguous().numpy().tobytes())
        digest.update(b"|")
    return digest.hexdigest()
