"""What a report is asked to show, checked before any work; then the recipes tried and the report written."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.statistics import Statistics
from mythos_export.divergence import Progress
from mythos_export.quantize.bundle import QuantizableBundle, Text, calibrated_quantizer, check_text
from mythos_export.quantize.calibrate import serves
from mythos_export.quantize.compute import Quantizer
from mythos_export.quantize.judge import Judge, Trial
from mythos_export.quantize.plan import Plan, make_plan
from mythos_export.quantize.recipe import load_recipe
from mythos_export.quantize.report.write import write_report
from runtimes.errors import InputError


class ReportRequest:
    """A report on a recipe for a bundle.

    path: of the page, .html; the pictures and figures go beside it. name: of the recipe that is being applied. text: to calibrate
    the compared recipes with. eval_text: to compare with the float32 model on; None leaves that out. recipes: names of others to
    try. loops: counts to compare at, see Judge. Raises InputError for whatever cannot be done, before any work.
    """

    def __init__(
        self,
        path: str | Path,
        bundle: str | Path,
        name: str,
        *,
        text: Text | None = None,
        eval_text: Text | None = None,
        recipes: Sequence[str] = (),
        loops: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_report(path)
        self.path, self.name, self._text, self._progress = Path(path), name, text, progress
        if recipes and eval_text is None:
            raise InputError("recipes to compare need text to compare on; pass --eval-text")
        self.source = QuantizableBundle(bundle)
        self._plans = {other: make_plan(load_recipe(other), self.source.config) for other in recipes if other != name}
        for other, plan in self._plans.items():
            try:
                check_text(plan.recipe, text)
            except InputError as error:
                raise InputError(f"{other}: {error}") from error
        self._judge = Judge(self.source, eval_text, loops) if eval_text else None

    def write(self, quantizer: Quantizer) -> dict[str, Any]:
        """Tries the recipes, writes the report on a quantizer whose statistics are still there, returns its figures."""
        if self._judge is None:
            return write_report(self.path, self.source, quantizer, self.name)
        trials = self._try(self._judge, quantizer)
        return write_report(self.path, self.source, quantizer, self.name, trials, self._judge.record)

    def _try(self, judge: Judge, quantizer: Quantizer) -> list[Trial]:
        with tempfile.TemporaryDirectory(prefix="mythos-export-") as folder:
            quantizers = {self.name: quantizer}
            known = [quantizer.statistics] if quantizer.statistics else []
            # Those with full second moments first: their statistics serve the others.
            for name, plan in sorted(self._plans.items(), key=lambda item: not _wants_hessians(item[1])):
                quantizers[name] = self._quantizer(plan, Path(folder) / str(len(quantizers)), known)
                found = quantizers[name].statistics
                known += [found] if found and found not in known else []
            most = max(known, key=_n_hessians, default=None)
            for each in quantizers.values():
                each.observed = most or each.observed  # so that errors of all recipes are counted alike
            names = [self.name, *self._plans]
            return [judge.trial(name, quantizers[name], self._progress) for name in names]

    def _quantizer(self, plan: Plan, folder: Path, known: Sequence[Statistics]) -> Quantizer:
        recipe = plan.recipe
        if not (recipe.needs_statistics or recipe.needs_ranges) or self._text is None:
            return calibrated_quantizer(self.source, plan, None)
        calibration = self.source.calibration(plan, self._text, folder, progress=self._progress)
        fitting = next(
            (found for found in known if serves(found, plan, self.source.weights, self.source.n_loops)), None
        )
        return calibrated_quantizer(self.source, plan, calibration, fitting)


def check_report(path: str | Path) -> None:
    """Raises InputError where no report can be written to a path."""
    target = Path(path)
    if target.suffix != ".html":
        raise InputError(f"{path}: the report is an HTML page; expected a name that ends in .html")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder for the report; make it first")
    for package in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise InputError(
                f"the report needs the package {error.name}, which is not installed; run: pip install 'mythos-export[report]'"
            ) from error


def _wants_hessians(plan: Plan) -> bool:
    return any(matrix.algorithm == "gptq" for matrix in plan.matrices.values())


def _n_hessians(statistics: Statistics) -> int:
    wanted: dict[str, list[Any]] = (statistics.subject or {})["wanted"]
    return sum(bool(hessian) for hessian, *_ in wanted.values())
