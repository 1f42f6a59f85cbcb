"""A quantized model in torch: the matrices as they are restored, inputs of products and cached rows rounded as the bundle rounds
them. It judges a recipe without writing a bundle; what differs is the order of sums.

Shape letters: T tokens, V vocab_size, L loops, n products of an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mythos_export.model.unfolded import CachedRows, Unfolded
from mythos_export.ops.products import ActivationRounding, round_blocks, round_static
from mythos_export.quantize.compute import CACHE_LIMIT, Quantizer
from mythos_export.quantize.graph import ACTIVATION_TYPES
from mythos_export.quantize.plan import MatrixPlan, Plan
from runtimes.arrays import Float32

Round = Callable[[Tensor], Tensor]


def quantized_model(quantizer: Quantizer, n_loops: int) -> Unfolded:
    """The model as the quantizer makes it; it holds every changed tensor in memory, in float32."""
    plan = quantizer.plan
    return simulated_model(plan, quantizer.restored(), static_scales(quantizer, plan), n_loops)


def static_scales(quantizer: Quantizer, plan: Plan) -> dict[str, Tensor]:
    """Static activation scales [L or 1, n] of a plan's operators, the quantizer's or some of them, where they have any."""
    tables = {operator: quantizer.activation_scales(matrices) for operator, matrices in plan.operators()}
    return {operator: table for operator, table in tables.items() if table is not None}


def simulated_model(
    plan: Plan, weights: Mapping[str, Tensor], activation_scales: Mapping[str, Tensor], n_loops: int
) -> Unfolded:
    """The model over these weights, which are used as they are, its activations and cached rows rounded as the plan says.

    activation_scales: as static_scales gives them. A loop deeper than there are scales for takes the last.
    """
    model = Unfolded(plan.config, weights, n_loops)
    modules = dict(model.named_modules())
    hooks: list[_RoundInput] = []
    for operator, matrices in plan.operators():
        steps = _steps(matrices, activation_scales.get(operator))
        for product, matrix in enumerate(matrices):
            for name in matrix.modules:
                hooks.append(_RoundInput([_of_product(step, product) for step in steps]))
                modules[name].register_forward_pre_hook(hooks[-1])
    if plan.recipe.kv_cache is not None:
        own = plan.recipe.kv_cache.scale == "row"
        for module in modules.values():
            if isinstance(module, CachedRows):
                hooks.append(_RoundInput([_round_row if own else _round_to_one]))
                module.register_forward_pre_hook(hooks[-1])

    def start(*_: object) -> None:
        for hook in hooks:
            hook.calls = 0

    model.register_forward_pre_hook(start)
    return model


def _steps(matrices: Sequence[MatrixPlan], scales: Tensor | None) -> list[ActivationRounding]:
    """What an operator does to its inputs, in every loop or in all alike."""
    first = matrices[0]
    kind = ACTIVATION_TYPES[first.activations.type]
    rows = torch.zeros(1, 0) if scales is None else scales
    return [ActivationRounding(row, len(matrices), first.form.block_size, kind) for row in rows]


def _of_product(rounding: ActivationRounding, product: int) -> Round:
    return lambda x: rounding(x, product)


def _round_row(rows: Tensor) -> Tensor:
    """Each row by its own scale."""
    return round_blocks(rows, rows.shape[-1])


def _round_to_one(rows: Tensor) -> Tensor:
    """Rows whose channels were divided by their largest magnitudes."""
    return round_static(rows, torch.tensor(1.0 / CACHE_LIMIT), ACTIVATION_TYPES["int8"])


class _RoundInput:
    """A forward pre-hook. steps: what to do in each loop, the last in all that follow. calls: of this forward pass so far."""

    def __init__(self, steps: Sequence[Round]) -> None:
        self._steps, self.calls = steps, 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = self._steps[min(self.calls, len(self._steps) - 1)]
        self.calls += 1
        return (step(args[0]), *args[1:])


class UnfoldedScorer:
    """An Unfolded model as a mythos_export.divergence.Scorer."""

    def __init__(self, model: Unfolded) -> None:
        self.model = model

    def logits(self, ids: Sequence[int], n_loops: int) -> Float32:
        """Logits [T, V] float32 after each of T token ids at n_loops loops."""
        self.model.n_loops = n_loops
        with torch.no_grad():
            logits: Float32 = self.model(torch.tensor([list(ids)]))[0].numpy()
        return logits
