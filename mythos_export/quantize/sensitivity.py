"""How much each operator's quantization costs, and the recipe that spends bytes where they save most."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from mythos_export.divergence import Comparison, Progress
from mythos_export.model.unfolded import Unfolded
from mythos_export.quantize.bundle import QuantizableBundle, Text, check_text
from mythos_export.quantize.judge import Judge
from mythos_export.quantize.mixed import High, MixedRecipes
from mythos_export.quantize.plan import Plan, operator_of
from mythos_export.quantize.recipe import Recipe, load_recipe
from mythos_export.report import size
from runtimes.errors import InputError


@dataclass(frozen=True)
class OperatorCost:
    """One operator quantized, everything else in float32.

    operator: matrices that must go together share its name. low, high: formats; high and what belongs to it are None where the
    recipe's own format is no lower. …_kl: mean KL(float32 ‖ quantized) in nats a token, …_stderr over windows. …_bytes: of its
    matrices.
    """

    operator: str
    low: str
    low_kl: float
    low_kl_stderr: float | None
    low_bytes: int
    high: str | None = None
    high_kl: float | None = None
    high_kl_stderr: float | None = None
    high_bytes: int | None = None

    @property
    def kl_per_byte(self) -> float:
        """KL that a byte avoids when the operator is raised; 0 where there is nothing to raise."""
        if self.high_kl is None or self.high_bytes is None:
            return 0.0
        return (self.low_kl - self.high_kl) / (self.high_bytes - self.low_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kl_per_byte": self.kl_per_byte}


@dataclass(frozen=True)
class Mix:
    """A whole quantized model, measured. raised: its operators in the high format. n_bytes: of all weights."""

    raised: tuple[str, ...]
    recipe: Recipe
    n_bytes: int
    comparison: Comparison

    @property
    def kl(self) -> float:
        """Mean KL(float32 ‖ quantized) in nats a token."""
        return self.comparison.kl_mean

    def to_dict(self) -> dict[str, Any]:
        return {"raised": list(self.raised), "n_bytes": self.n_bytes, **self.comparison.to_dict()}


@dataclass(frozen=True)
class Sensitivity:
    """operators: by falling kl_per_byte. low, high: the recipe as it is, and with all raised that can be. mix: None without a
    target."""

    operators: list[OperatorCost]
    low: Mix
    high: Mix
    mix: Mix | None
    float32_bytes: int
    n_loops: int
    eval_text: dict[str, str | int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "operators": [cost.to_dict() for cost in self.operators],
            "low": self.low.to_dict(),
            "high": self.high.to_dict(),
            "mix": self.mix.to_dict() if self.mix else None,
            "float32_bytes": self.float32_bytes,
            "n_loops": self.n_loops,
            "eval_text": self.eval_text,
        }


def measure_sensitivity(
    bundle: str | Path,
    recipe: str,
    eval_text: Text,
    text: Text | None = None,
    *,
    high: High = "int8",
    target_size: float | None = None,
    target_kl: float | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measures every operator of a float32 bundle alone, at the bundle's own loop count, and mixes formats to meet the targets.

    recipe: names as load_recipe takes them, of the low formats. text: to calibrate with, where the recipe needs it. high: see
    MixedRecipes. target_size: of the weights, in bytes or, up to 1, as a share of float32's. target_kl: mean KL in nats a token.
    Operators are raised by falling KL per byte: with target_size as many as fit, with target_kl as few as bring the measured KL of
    the whole down to it, with both as few within the size. Raises InputError for bad arguments before any work, and for targets
    that cannot be met as soon as that is known, with what can be reached.
    """
    source = QuantizableBundle(bundle)
    mixed = MixedRecipes(source, load_recipe(recipe), high)
    check_text(mixed.recipe, text)
    judge = Judge(source, eval_text, [source.n_loops])
    most_bytes = _check_targets(mixed, target_size, target_kl)
    with tempfile.TemporaryDirectory(prefix="mythos-export-") as folder:
        if text and (mixed.recipe.needs_statistics or mixed.recipe.needs_ranges):
            mixed.calibrate(text, folder, progress)
        measure = _Measure(mixed, judge, progress)
        low, top = measure.mix(()), measure.mix(mixed.movable)
        if target_kl is not None and min(low.kl, top.kl) > target_kl:
            raise _unreachable(target_kl, top)
        costs = measure.costs()
        mix = None
        if most_bytes is not None or target_kl is not None:
            order = [cost.operator for cost in costs if cost.high]
            chain = order if most_bytes is None else _fitting(mixed, order, most_bytes)
            mix = measure.mix(chain) if target_kl is None else _fewest(measure, chain, low, target_kl)
    return Sensitivity(costs, low, top, mix, source.n_bytes(), source.n_loops, judge.record)


def check_recipe_file(path: Path | None, force: bool, *, has_target: bool) -> None:
    """Raises InputError where a mixed recipe cannot be written to path (None: nowhere), or there will be none."""
    if path is None:
        return
    if not has_target:
        raise InputError("--output takes the mixed recipe, which needs a target; pass --target-size or --target-kl")
    if path.suffix != ".toml":
        raise InputError(f"{path}: expected a name that ends in .toml, as `quantize --recipe` reads it")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder for the recipe; make it first")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; pass --force to replace it")


class _Measure:
    """Runs models against the judge."""

    def __init__(self, mixed: MixedRecipes, judge: Judge, progress: Progress | None) -> None:
        self._mixed, self._judge, self._progress = mixed, judge, progress

    def mix(self, raised: Sequence[str]) -> Mix:
        """The whole model with these operators raised."""
        mixed = self._mixed
        model = mixed.model(raised)
        name = f"{len(raised)} of {len(mixed.movable)} operators in {mixed.high}"
        comparison = self._compare(model, self._progress, f"scoring with {name}")
        n_bytes = mixed.source.n_bytes(mixed.plan(raised))
        measured = f"{name}: {size(n_bytes)}, mean KL {comparison.kl_mean:.3g} nats at {mixed.source.n_loops} loops"
        description = "; ".join(filter(None, (mixed.recipe.description, measured)))
        recipe = msgspec.structs.replace(mixed.mixture(raised), description=description)
        return Mix(tuple(raised), recipe, n_bytes, comparison)

    def costs(self) -> list[OperatorCost]:
        """Every operator alone, those first whose raising avoids most KL a byte, those that cannot be raised last."""
        total, costs = len(self._mixed.operators), []
        for done, operator in enumerate(self._mixed.operators, 1):
            costs.append(self._cost(operator))
            if self._progress:
                self._progress("measuring operators", done, total)
        return sorted(costs, key=lambda cost: (cost.high is None, -cost.kl_per_byte, -cost.low_kl))

    def _cost(self, operator: str) -> OperatorCost:
        mixed = self._mixed
        low = self._compare(mixed.model_of_one(operator, ()))
        low_format = _format(mixed.low, operator)
        low_bytes = mixed.n_bytes(mixed.low, operator)
        cost = OperatorCost(operator, low_format, low.kl_mean, low.kl_mean_stderr, low_bytes)
        if operator not in mixed.movable:
            return cost
        plan = mixed.plan(mixed.movable)
        # What stays float32 costs nothing: that is what is compared with.
        high = self._compare(mixed.model_of_one(operator, mixed.movable)) if mixed.high != "float32" else None
        return replace(
            cost,
            high=mixed.high,
            high_kl=high.kl_mean if high else 0.0,
            high_kl_stderr=high.kl_mean_stderr if high else 0.0,
            high_bytes=mixed.n_bytes(plan, operator),
        )

    def _compare(self, model: Unfolded, progress: Progress | None = None, name: str = "") -> Comparison:
        return self._judge.compare(model, progress, name)[self._mixed.source.n_loops]


def _format(plan: Plan, operator: str) -> str:
    """Formats of an operator's matrices; more than one where a rule or an odd size sets them apart."""
    kinds = [matrix.form.kind for name, matrix in plan.matrices.items() if operator_of(name) == operator]
    return ", ".join(dict.fromkeys(kinds))


def _check_targets(mixed: MixedRecipes, target_size: float | None, target_kl: float | None) -> int | None:
    """The bytes that the weights may take; None for any."""
    for name, value in (("target-size", target_size), ("target-kl", target_kl)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} is {value}; expected a number above 0")
    if target_size is None:
        return None
    whole, least = mixed.source.n_bytes(), mixed.source.n_bytes(mixed.low)
    most = int(target_size * whole if target_size <= 1 else target_size)
    if most < least:
        raise InputError(
            f"--target-size is {most} bytes, {most / whole:.3f} of float32; the recipe itself takes {least}, {least / whole:.3f}: "
            "pass at least that, or a --recipe with lower formats"
        )
    return most


def _fitting(mixed: MixedRecipes, order: Sequence[str], most_bytes: int) -> list[str]:
    """Operators in this order that can be raised together, leaving out what no longer fits."""
    high, used = mixed.plan(mixed.movable), mixed.source.n_bytes(mixed.low)
    chain = []
    for operator in order:
        more = mixed.n_bytes(high, operator) - mixed.n_bytes(mixed.low, operator)
        if used + more <= most_bytes:
            chain.append(operator)
            used += more
    return chain


def _fewest(measure: _Measure, chain: Sequence[str], low: Mix, target_kl: float) -> Mix:
    """As few operators from the start of the chain as bring the measured KL down to the target, found by halving."""
    if low.kl <= target_kl:
        return low
    best = measure.mix(chain)
    if best.kl > target_kl:
        raise _unreachable(target_kl, best)
    misses, meets = 0, len(chain)
    while meets - misses > 1:
        middle = (misses + meets) // 2
        mix = measure.mix(chain[:middle])
        if mix.kl <= target_kl:
            best, meets = mix, middle
        else:
            misses = middle
    return best


def _unreachable(target_kl: float, best: Mix) -> InputError:
    return InputError(
        f"--target-kl is {target_kl:g}; the best that can be reached is {best.kl:.4g}, with {len(best.raised)} operators raised "
        f"and {best.n_bytes} bytes of weights: pass at least that, a larger --target-size, --high float32, or another --recipe"
    )
