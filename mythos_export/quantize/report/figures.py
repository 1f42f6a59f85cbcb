"""The figures of a report, as plain JSON: all that the pictures and the page show.

Shape letters: L loops, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from calibration.observers import merge_moments
from calibration.statistics import Statistics
from mythos_export import __version__, footprint
from mythos_export.config import MixtureOfExpertsConfig
from mythos_export.quantize.bundle import QuantizableBundle
from mythos_export.quantize.compute import Quantizer
from mythos_export.quantize.judge import Trial
from mythos_export.quantize.plan import Plan, is_mixture, matrix_table

NO_TEXT = "The recipe rests on no calibration text, so that nothing is known of the inputs of its products."
NO_LOOP = "No looped layer is quantized."
NO_MIXTURE = "No mixture of experts is quantized."
NO_EVAL = "No text was given to compare with the float32 model (--eval-text)."


def report_figures(
    source: QuantizableBundle,
    quantizer: Quantizer,
    name: str,
    trials: Sequence[Trial] = (),
    eval_text: Mapping[str, str | int] | None = None,
) -> dict[str, Any]:
    """What a report shows of a quantizer that has quantized every matrix. name: of its recipe. trials: of recipes, its own among
    them by name; none where nothing was compared. eval_text: where the trials' text came from, as calibration.text.Sample records
    it. A part that cannot be shown is None, with the reason in "left_out"."""
    plan, observed = quantizer.plan, quantizer.observed
    left_out: dict[str, str] = {}
    ranges: list[dict[str, Any]] | None = None
    coverage: list[dict[str, Any]] | None = None
    if observed is None:
        left_out |= dict.fromkeys(("activation_ranges", "expert_coverage"), NO_TEXT)
    else:
        ranges = _activation_ranges(plan, observed) or None
        coverage = _expert_coverage(source, quantizer, observed) or None
        if ranges is None:
            left_out["activation_ranges"] = NO_LOOP
        if coverage is None:
            left_out["expert_coverage"] = NO_MIXTURE
    if not trials:
        left_out["recipes"] = NO_EVAL
    return {
        "producer": f"mythos-export {__version__}",
        "bundle": source.folder.name,
        "recipe": name,
        "description": plan.recipe.description,
        "parameters": footprint.parameters(source.config),
        "default_loops": source.n_loops,
        "n_bytes": source.n_bytes(plan),
        "float32_bytes": source.n_bytes(),
        "matrices": _matrices(quantizer, name, trials),
        "activation_ranges": ranges,
        "expert_coverage": coverage,
        "eval_text": None if eval_text is None else dict(eval_text),
        "compared_loops": max((n_loops for trial in trials for n_loops in trial.comparisons), default=None),
        "recipes": [_recipe(trial, chosen=trial.name == name) for trial in trials],
        "left_out": left_out,
    }


def _matrices(quantizer: Quantizer, name: str, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Every quantized matrix in the order of the model; other_errors: by recipe, where that quantizes it and counts alike."""
    table = matrix_table(quantizer.plan)
    rows = []
    for matrix in quantizer.plan.matrices.values():
        outcome = quantizer.outcomes[matrix.name]
        others = {trial.name: trial.outcomes.get(matrix.name) for trial in trials if trial.name != name}
        rows.append(
            {
                "name": matrix.name,
                "shape": list(matrix.shape),
                **table[matrix.name],
                "n_bytes": matrix.n_bytes,
                "error": outcome.error,
                "error_over": outcome.over,
                "uncalibrated_experts": sorted(outcome.uncalibrated),
                "other_errors": {
                    other: found.error for other, found in others.items() if found and found.over == outcome.over
                },
            }
        )
    return rows


def _activation_ranges(plan: Plan, observed: Statistics) -> list[dict[str, Any]]:
    """Largest and rms [L] of the inputs of every looped matrix, a stack's together."""
    rows = []
    for matrix in plan.matrices.values():
        modules = [module for module in matrix.modules if module in observed]
        if not matrix.looped or not modules:
            continue
        moments = reduce(merge_moments, (observed.moments(module, "largest", "square", "weight") for module in modules))
        numbers = (moments["weight"] * matrix.shape[-1]).clamp(min=1e-9)
        rms = (moments["square"].double().sum(1) / numbers).sqrt()
        rows.append({"name": matrix.name, "largest": moments["largest"].amax(1).tolist(), "rms": rms.tolist()})
    return rows


def _expert_coverage(source: QuantizableBundle, quantizer: Quantizer, observed: Statistics) -> list[dict[str, Any]]:
    """tokens [E, L] that each expert of a mixture saw, the shared ones last; least: how many, over all loops, calibration takes;
    uncalibrated: those it left to rounding to nearest. Matrices of one mixture see the same tokens, so there is a row a mixture."""
    rows = []
    for operator, matrices in quantizer.plan.operators():
        first = matrices[0]
        if not is_mixture(first.name, first.shape) or first.modules[0] not in observed:
            continue
        tokens = [observed.moments(module, "tokens")["tokens"] for module in first.modules]
        n_loops = len(tokens[0]) if first.looped else 1
        fallen = {index for matrix in matrices for index in quantizer.outcomes[matrix.name].uncalibrated}
        rows.append(
            {
                "name": operator,
                "n_shared": _n_shared(source, operator),
                "tokens": [row[:n_loops].to(torch.int64).tolist() for row in tokens],
                "tokens_passed": observed.tokens[first.modules[0]],
                "least": max(quantizer.coverage(matrix, matrix.modules[0], observed)[1] for matrix in matrices),
                "uncalibrated": sorted(fallen),
            }
        )
    return rows


def _n_shared(source: QuantizableBundle, operator: str) -> int:
    """Shared experts of a mixture, by its name."""
    group, index = operator.removesuffix(".ffn").rsplit(".", 1)
    layers = {"prelude": source.config.prelude, "coda": source.config.coda}.get(group, source.config.loop_layers)
    config = layers[int(index)].feed_forward
    return config.n_shared_experts if isinstance(config, MixtureOfExpertsConfig) else 0


def _recipe(trial: Trial, *, chosen: bool) -> dict[str, Any]:
    loops = {str(n_loops): comparison.to_dict() for n_loops, comparison in trial.comparisons.items()}
    return {"name": trial.name, "chosen": chosen, "n_bytes": trial.n_bytes, "loops": loops}
