"""Which statistics a plan needs, and gathering them over a bundle's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from calibration.observers import Wanted
from calibration.statistics import Progress, Statistics, channels, gather
from calibration.text import Sample
from mythos_export.model.unfolded import CachedRows, MixtureOfExperts, Unfolded
from mythos_export.quantize.folds import Factors
from mythos_export.quantize.plan import Plan

STATISTICS = "statistics"  # the folder, within one of calibration, of what weights and cache rest on
MEMORY = 2**30  # bytes of sums held at once


def unfolded(plan: Plan, weights: Mapping[str, Tensor], n_loops: int) -> Unfolded:
    """The model over these weights, its experts fed as the recipe says."""
    model = Unfolded(plan.config, weights, n_loops)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.every_token = plan.recipe.calibration.every_token
    return model


def wanted(plan: Plan, model: nn.Module, n_loops: int) -> dict[str, Wanted]:
    """What to keep of which module. Second moments stay apart by loop where they all fit into memory together; otherwise only what
    the recipe's rule for loops takes is kept."""
    modules = dict(model.named_modules())
    rule = plan.recipe.calibration.loops
    keeps: dict[str, str | int] = {"last": -1, "first": 0, "max": "all"}
    keep = keeps.get(rule, "sum")
    needs, apart = (
        {
            name: Wanted(hessian=matrix.algorithm == "gptq", keep_loop=of_looped if matrix.looped else "sum")
            for matrix in plan.matrices.values()
            for name in matrix.modules
        }
        for of_looped in (keep, "all")
    )
    if plan.recipe.kv_cache and plan.recipe.kv_cache.scale == "channel":
        rows = {name: Wanted(pairs=module.pairs) for name, module in modules.items() if isinstance(module, CachedRows)}
        needs, apart = needs | rows, apart | rows
    size = sum(want.n_bytes(channels(modules[name]), n_loops) for name, want in apart.items())
    return apart if size <= MEMORY else needs


def serves(found: Statistics, plan: Plan, weights: Mapping[str, Tensor], n_loops: int) -> bool:
    """Whether statistics of these weights, over whatever text, hold all that a plan wants, gathered as its recipe says."""
    subject = found.subject or {}
    rule = msgspec.to_builtins(plan.recipe.calibration)
    return subject.get("calibration") == rule and all(
        name in found and (found.has(name, "hessian") or not want.hessian)
        for name, want in wanted(plan, unfolded(plan, weights, n_loops), n_loops).items()
    )


@dataclass(frozen=True)
class Calibration:
    """Runs of one model over one sample. folder: where statistics are kept; a killed run goes on there. weights_sha256: of the file
    the weights are in. share: (k, n), the k-th of n parts of the sample, for processes side by side."""

    plan: Plan
    weights: Mapping[str, Tensor]
    sample: Sample
    folder: Path
    n_loops: int
    weights_sha256: str
    share: tuple[int, int] = (1, 1)
    progress: Progress | None = None

    def statistics(self) -> Statistics:
        """What weights and cache rest on."""
        model = unfolded(self.plan, self.weights, self.n_loops)
        return self._gather(STATISTICS, model, wanted(self.plan, model, self.n_loops), {})

    def ranges(self, factors: Factors) -> Statistics:
        """Histograms of the inputs of products with static scales, as they are once the factors are folded in."""
        model = unfolded(self.plan, self.weights, self.n_loops)
        needs: dict[str, Wanted] = {}
        divisors: dict[str, Tensor] = {}
        for matrix in self.plan.matrices.values():
            if matrix.activations.scale == "block":
                continue
            for index, module in enumerate(matrix.modules):
                needs[module] = Wanted(histogram=True)
                _, columns = factors.of(matrix.name, index if len(matrix.shape) == 3 else None)
                if columns is not None:
                    divisors[module] = columns
        return self._gather("ranges", model, needs, divisors)

    def _gather(self, what: str, model: nn.Module, needs: dict[str, Wanted], divisors: dict[str, Tensor]) -> Statistics:
        first, of = self.share
        digest = hashlib.sha256()
        for name in sorted(divisors):
            digest.update(name.encode() + divisors[name].contiguous().numpy().tobytes())
        subject: dict[str, Any] = {
            "weights": self.weights_sha256,
            "text": self.sample.record,
            "share": [first, of],
            "n_loops": self.n_loops,
            "calibration": msgspec.to_builtins(self.plan.recipe.calibration),
            "wanted": {name: [want.hessian, want.histogram, str(want.keep_loop)] for name, want in needs.items()},
            "divisors": digest.hexdigest(),
        }
        return gather(
            model,
            torch.from_numpy(self.sample.ids[first - 1 :: of]),
            needs,
            self.folder / what,
            subject,
            n_loops=self.n_loops,
            contribution=self.plan.recipe.calibration.loops == "contribution",
            memory=MEMORY,
            divisors=divisors,
            progress=self.progress,
        )
