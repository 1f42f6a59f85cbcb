"""What is said of a quantization: the simulated model against the bundle, the sensitivity of operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mythos_export.divergence import compare
from mythos_export.evaluate import RunnerScorer
from mythos_export.quantize.bundle import QuantizableBundle, Text, quantize_bundle
from mythos_export.quantize.recipe import to_toml
from mythos_export.quantize.sensitivity import check_recipe_file, measure_sensitivity
from mythos_export.quantize.simulation import UnfoldedScorer, quantized_model
from runtimes.errors import InputError
from runtimes.runner import load

CHANNEL = '[kv_cache]\nscale = "channel"\n'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 900, (6, 64)))
    return Text(path, 4, 64)


@pytest.mark.parametrize("recipe", ["int8", "int4-gptq", "w8a8-per-loop", "fp8", "int8,kv-int8", "int8,CHANNEL"])
def test_the_simulated_model_is_the_bundle(tiny_bundle: Path, tmp_path: Path, text: Text, recipe: str) -> None:
    """In torch as in onnxruntime: far closer to each other than either is to float32."""
    (tmp_path / "channel.toml").write_text(CHANNEL)
    names = recipe.replace("CHANNEL", str(tmp_path / "channel.toml"))
    models = []
    made = quantize_bundle(
        tiny_bundle, tmp_path / "q", names, text=text, then=lambda q: models.append(quantized_model(q, 4))
    )
    assert made.manifest.quantization is not None
    windows = [np.random.default_rng(seed).integers(0, 900, 40).tolist() for seed in range(3)]
    simulated, bundle = UnfoldedScorer(models[0]), RunnerScorer(load(tmp_path / "q"))
    apart = compare(simulated, bundle, windows, [4])[4].kl_mean
    cost = compare(RunnerScorer(load(tiny_bundle)), bundle, windows, [4])[4].kl_mean
    assert apart < 0.2 * cost


def test_sensitivity_mixes_to_a_size(tiny_bundle: Path, tmp_path: Path, text: Text) -> None:
    found = measure_sensitivity(tiny_bundle, "int4", text, target_size=0.2)
    assert found.mix is not None
    assert found.low.n_bytes < found.mix.n_bytes <= 0.2 * found.float32_bytes < found.high.n_bytes
    assert found.high.kl < found.mix.kl < found.low.kl
    costs = [cost.kl_per_byte for cost in found.operators]
    assert costs == sorted(costs, reverse=True)
    (tmp_path / "mix.toml").write_text(to_toml(found.mix.recipe))
    made = quantize_bundle(tiny_bundle, tmp_path / "q", str(tmp_path / "mix.toml"))
    assert made.manifest.quantization is not None
    formats = {name: matrix["format"] for name, matrix in made.manifest.quantization["matrices"].items()}
    assert {"int4", "int8"} <= set(formats.values())
    windows = [row.tolist() for row in QuantizableBundle(tiny_bundle).sample(text).ids]
    measured = compare(RunnerScorer(load(tiny_bundle)), RunnerScorer(load(tmp_path / "q")), windows, [4])[4].kl_mean
    assert measured == pytest.approx(found.mix.kl, rel=0.15)


def test_sensitivity_mixes_to_a_divergence(tiny_bundle: Path, text: Text) -> None:
    ends = measure_sensitivity(tiny_bundle, "int4", text)
    assert ends.mix is None
    middle = (ends.low.kl + ends.high.kl) / 2
    found = measure_sensitivity(tiny_bundle, "int4", text, target_kl=middle)
    assert found.mix is not None
    assert found.mix.kl <= middle
    assert 0 < len(found.mix.raised) < len(found.high.raised)


def test_targets_that_cannot_be_met_say_what_can(tiny_bundle: Path, tmp_path: Path, text: Text) -> None:
    with pytest.raises(InputError, match=r"the recipe itself takes \d+"):
        measure_sensitivity(tiny_bundle, "int4", text, target_size=0.05)
    with pytest.raises(InputError, match="the best that can be reached is"):
        measure_sensitivity(tiny_bundle, "int4", text, target_kl=1e-9)
    with pytest.raises(InputError, match="pass --text"):
        measure_sensitivity(tiny_bundle, "int4-gptq", text)
    (tmp_path / "old.toml").touch()
    for path, has_target, message in (
        ("r.toml", False, "needs a target"),
        ("r.txt", True, "ends in .toml"),
        ("old.toml", True, "--force"),
        ("none/r.toml", True, "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            check_recipe_file(tmp_path / path, False, has_target=has_target)
