"""The quantized model in torch rounds what the bundle rounds, step by step, and is judged against the float32 model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mythos_export.evaluate import RunnerScorer
from mythos_export.model.unfolded import Unfolded
from mythos_export.ops.products import round_blocks
from mythos_export.quantize.bundle import QuantizableBundle, Text, quantize_bundle
from mythos_export.quantize.compute import Quantizer
from mythos_export.quantize.judge import Judge, default_loops
from mythos_export.quantize.plan import make_plan
from mythos_export.quantize.recipe import load_recipe, with_overrides
from mythos_export.quantize.simulation import UnfoldedScorer, quantized_model, simulated_model
from runtimes.errors import InputError
from runtimes.runner import load

DOWN = "recurrent.layers.0.attn.down.weight"


@pytest.fixture(scope="module")
def source(tiny_bundle: Path) -> QuantizableBundle:
    return QuantizableBundle(tiny_bundle)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2048, (4, 64)))
    return Text(path, 4, 64)


def quantizer_of(source: QuantizableBundle, recipe: str, **overrides: int) -> Quantizer:
    """For recipes that need no text."""
    plan = make_plan(with_overrides(load_recipe(recipe), overrides.get("block"), overrides.get("bits")), source.config)
    return Quantizer(plan, source.weights, None)


def test_without_rounded_activations_it_is_the_bundle(source, tiny_bundle: Path, tmp_path: Path) -> None:
    recipe = with_overrides(load_recipe("int4"), None, 32)
    quantize_bundle(tiny_bundle, tmp_path / "q", recipe)
    ids = [5, 77, 300, 12, 9, 2000, 41]
    got = UnfoldedScorer(quantized_model(quantizer_of(source, "int4", bits=32), 4)).logits(ids, 3)
    np.testing.assert_allclose(got, RunnerScorer(load(tmp_path / "q")).logits(ids, 3), atol=5e-4)


def inputs_of(model: Unfolded, name: str, n_loops: int) -> list[torch.Tensor]:
    """What a module is given in each loop."""
    seen: list[torch.Tensor] = []
    handle = dict(model.named_modules())[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    UnfoldedScorer(model).logits([3, 8, 100, 7], n_loops)
    handle.remove()
    return seen


@pytest.mark.parametrize("block", [32, 128])
def test_inputs_are_rounded_by_block(source, block: int) -> None:
    quantizer = quantizer_of(source, "int8", block=block)
    for x in inputs_of(quantized_model(quantizer, 4), DOWN, 2):
        torch.testing.assert_close(x, round_blocks(x, block))
        assert len(x[0, 0, :block].unique()) > 20


def test_every_loop_has_its_scale(source) -> None:
    """The n-th call of a pass takes the n-th scale, deeper ones the last, and the next pass starts over."""
    plan = make_plan(load_recipe("w8a8-per-loop"), source.config)
    scales = {operator: torch.ones(1, len(matrices)) for operator, matrices in plan.operators()}
    scales[DOWN] = torch.tensor([[0.5], [0.25], [0.3]])
    model = simulated_model(plan, source.weights, scales, 4)
    for _ in range(2):
        seen = inputs_of(model, DOWN, 4)
        for x, scale in zip(seen, (0.5, 0.25, 0.3, 0.3), strict=True):
            levels = x / scale
            torch.testing.assert_close(levels, levels.round())
            assert levels.abs().max() > 1


@pytest.mark.parametrize(("scale", "step"), [("row", None), ("channel", 1 / 127)])
def test_cached_rows(source, tmp_path: Path, scale: str, step: float | None) -> None:
    """A row has 255 levels of its largest number, or of 1 where channels were divided by their largest; larger ones are cut."""
    (tmp_path / "cache.toml").write_text(f'[kv_cache]\nscale = "{scale}"\n')
    plan = make_plan(load_recipe(str(tmp_path / "cache.toml")), source.config)
    model = simulated_model(plan, source.weights, {}, 4)
    for rows in inputs_of(model, "coda.0.attn.cache", 1):
        steps = rows.abs().amax(-1, keepdim=True) / 127 if step is None else torch.tensor(step)
        levels = rows / steps
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert levels.abs().max() == pytest.approx(127)


def test_the_judge(source, fixed_bundle: Path, text: Text) -> None:
    judge = Judge(source, text)
    assert judge.loops == default_loops(source) == [1, 2, 4]
    assert default_loops(QuantizableBundle(fixed_bundle)) == [4]
    same = judge.compare(Unfolded(source.config, source.weights, 4))
    assert all(comparison.kl_mean == 0 and comparison.top1_agreement == 1 for comparison in same.values())
    trials = {name: judge.trial(name, quantizer_of(source, name)) for name in ("int8", "int4")}
    for n_loops in judge.loops:
        assert trials["int8"].comparisons[n_loops].kl_mean < trials["int4"].comparisons[n_loops].kl_mean
    assert trials["int4"].n_bytes < trials["int8"].n_bytes < source.n_bytes()
    with pytest.raises(InputError, match="n_loops is 13"):
        Judge(source, text, [13])
    with pytest.raises(InputError, match="at least 2 tokens"):
        Judge(source, Text(text.source, 4, 1))
