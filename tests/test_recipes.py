"""Quantizing by recipe: what bundles hold, that they run, and what is refused before any work."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch

from mythos_export.config import ModelConfig
from mythos_export.export import export_bundle
from mythos_export.model.unfolded import Unfolded
from mythos_export.ops import DOMAIN
from mythos_export.quantize.bundle import QuantizableBundle, Text, gather_statistics, quantize_bundle
from mythos_export.quantize.compute import Quantizer
from mythos_export.quantize.folds import Factors, cache_folds, folds
from mythos_export.quantize.plan import make_plan
from mythos_export.quantize.recipe import Activations, Recipe, Smoothing, WeightRule, combine, load_recipe, shipped
from runtimes.bundle import open_bundle
from runtimes.errors import InputError
from runtimes.runner import load

GQA = {
    "vocab_size": 97, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 64, "max_loop_iters": 3,
    "prelude_layers": 1, "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 16, "lora_rank": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Four sequences of 64 token ids that a model of the shipped checkpoint's vocabulary takes."""
    ids = np.random.default_rng(0).integers(0, 97, (4, 64))
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, ids)
    return Text(path, 4, 64)


@pytest.fixture(scope="module")
def gqa_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gqa")
    (folder / "config.json").write_text(json.dumps(GQA))
    export_bundle(f"random:{folder / 'config.json'}", folder / "bundle")
    return folder / "bundle"


@pytest.fixture(params=["tiny_bundle", "gqa_bundle"])
def bundle(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def _logits(source: QuantizableBundle, weights: dict[str, torch.Tensor], n_loops: int = 3) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 97, (2, 30)))
    with torch.no_grad():
        return Unfolded(source.config, weights, n_loops)(ids)


def test_the_unfolded_model_is_the_bundle(bundle: Path) -> None:
    source = QuantizableBundle(bundle)
    ids = np.random.default_rng(1).integers(0, 97, (2, 30))
    expected = _logits(source, source.weights)
    for row in range(2):
        chunks = list(load(bundle).session(1, 3).advance_scored([ids[row].tolist()]))
        got = np.concatenate([chunk.logits for chunk in chunks])
        np.testing.assert_allclose(got, expected[row].numpy(), atol=2e-4)


def test_folds_change_nothing_but_the_channels(bundle: Path) -> None:
    """Any factors in any fold, the cache's included, leave the logits as they were."""
    source = QuantizableBundle(bundle)
    factors = Factors({name: weight.shape for name, weight in source.weights.items()})
    generator = torch.Generator().manual_seed(0)
    widths = {name: module.in_features for name, module in _linears(source)}
    for fold in folds(source.config):
        drawn = torch.rand(widths[fold.modules[0]], generator=generator) + 0.5
        factors.apply(fold, fold.shared(drawn))
    rotated = {}
    for name, module in Unfolded(source.config, source.weights, 1).named_modules():
        if name.endswith(".cache"):
            row = torch.rand(module.channels, generator=generator) + 0.5
            start, stop, head_dim = module.pairs
            pairs = row[start:stop].unflatten(0, (-1, 2, head_dim // 2))
            row[start:stop] = pairs[:, :1].expand_as(pairs).flatten()
            rotated[name] = row
    for name, channels, fold in cache_folds(source.config):
        factors.apply(fold, rotated[name][channels])
    changed = {name: factors.scaled(name, weight) for name, weight in source.weights.items()}
    touched = sum(not torch.equal(changed[name], weight) for name, weight in source.weights.items())
    assert touched > 10
    torch.testing.assert_close(_logits(source, changed), _logits(source, source.weights), atol=2e-4, rtol=1e-4)


def _linears(source: QuantizableBundle):  # type: ignore[no-untyped-def]
    model = Unfolded(source.config, source.weights, 1)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("recipe", [*shipped(), "int4-gptq,kv-int8", "int4-awq,w8a8-per-loop"])
def test_every_recipe_runs(bundle: Path, text: Text, tmp_path: Path, recipe: str) -> None:
    made = quantize_bundle(bundle, tmp_path / "q", recipe, text=text)
    before, after = (
        list(load(path).session(1, 3).advance_scored([list(range(40))])) for path in (bundle, tmp_path / "q")
    )
    error = np.abs(before[0].logits - after[0].logits).max() / np.abs(before[0].logits).max()
    assert 0 < error < (0.5 if "int4" in recipe else 0.12)
    assert len(load(tmp_path / "q").generate([1, 2], 4).complete().ids) == 4
    model = onnx.load(tmp_path / "q" / "decoder.onnx")
    for tensor in model.graph.initializer:
        if "scale" in tensor.name and tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            scales = onnx.numpy_helper.to_array(tensor)
            assert np.isfinite(scales).all(), tensor.name
            if tensor.name != "recurrent.lora_scale":
                assert (scales > 0).all(), tensor.name
    assert made.manifest.quantization is not None
    rests_on_text = load_recipe(recipe).needs_statistics or load_recipe(recipe).needs_ranges
    assert rests_on_text <= (made.manifest.quantization["text"] is not None)


@pytest.mark.parametrize("loops", [None, 3])
def test_each_loop_takes_its_own_scales(shakespeare: Path, tmp_path: Path, text: Text, loops: int | None) -> None:
    """In a dynamic graph they are gathered by the loop's index, in a fixed one they are constants."""
    export_bundle(shakespeare, tmp_path / "b", loops=loops, max_loops=None if loops else 6)  # trained: 4
    quantize_bundle(tmp_path / "b", tmp_path / "q", "w8a8-per-loop", text=text)
    model = onnx.load(tmp_path / "q" / "decoder.onnx", load_external_data=False)
    names = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer if "activation_scale" in tensor.name}
    if loops:
        assert all(names[f"recurrent.layers.0.ffn.activation_scale.{i}"] == [2] for i in range(loops))
    else:
        assert names["recurrent.layers.0.ffn.activation_scale"] == [6, 2]
    assert names["prelude.0.attn.down.weight.activation_scale"] == [1]
    assert len(load(tmp_path / "q").generate([1, 2], 3, n_loops=loops or 6).complete().ids) == 3


def test_static_scales_reach_what_calibration_saw(tiny_bundle: Path, text: Text, tmp_path: Path) -> None:
    source = QuantizableBundle(tiny_bundle)
    recipe = Recipe(weights=(WeightRule("*", "int8", "channel"),), activations=Activations("int8", "tensor", "minmax"))
    plan = make_plan(recipe, source.config)
    calibration = source.calibration(plan, text, tmp_path / "s")
    quantizer = Quantizer(plan, source.weights, None)
    ranges = calibration.ranges(quantizer.factors)
    quantizer.set_ranges(ranges)
    for operator, matrices in plan.operators():
        table = quantizer.activation_scales(matrices, 12)
        assert table is not None
        largest = max(float(ranges.moments(module, "largest")["largest"].max()) for module in matrices[0].modules)
        assert table[:, 0].max() * 127 == pytest.approx(largest, rel=1e-5), operator


def test_the_same_text_and_seed_give_the_same_bytes(tiny_bundle: Path, text: Text, tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        made = quantize_bundle(tiny_bundle, tmp_path / name, "int4-gptq,w8a8-per-loop,kv-int8", text=text)
        digests.append({file: entry.sha256 for file, entry in made.manifest.files.items()})
    assert digests[0] == digests[1]
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_statistics_of_several_processes_serve(tiny_bundle: Path, gqa_bundle: Path, text: Text, tmp_path: Path) -> None:
    recipe = load_recipe("int4-gptq")
    for share in (1, 2):
        gather_statistics(tiny_bundle, tmp_path / f"s{share}", recipe, text, (share, 2))
    parts = [tmp_path / "s1", tmp_path / "s2"]
    made = quantize_bundle(tiny_bundle, tmp_path / "parts", recipe, statistics=parts)
    whole = quantize_bundle(tiny_bundle, tmp_path / "whole", recipe, text=text)
    errors = [{name: outcome.error for name, outcome in q.quantizer.outcomes.items()} for q in (made, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert not list(tmp_path.glob(".whole*"))  # the statistics of a finished run are gone
    with pytest.raises(InputError, match="calibrate with this recipe"):
        quantize_bundle(tiny_bundle, tmp_path / "q", with_rule(recipe, "last"), statistics=parts)
    with pytest.raises(InputError, match="gathered of another bundle"):
        quantize_bundle(gqa_bundle, tmp_path / "q", recipe, statistics=parts)


def with_rule(recipe: Recipe, loops: str) -> Recipe:
    return combine([recipe, msgspec.toml.decode(f'[calibration]\nloops = "{loops}"', type=Recipe)])


def test_statistics_survive_a_failed_run(
    tiny_bundle: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed run gathered is taken up by the next, which runs the model no more."""
    monkeypatch.setattr("mythos_export.quantize.bundle._write_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize_bundle(tiny_bundle, tmp_path / "q", "int4-gptq", text=text)
    assert not (tmp_path / "q").exists()
    monkeypatch.undo()
    monkeypatch.setattr(Unfolded, "forward", lambda *_: pytest.fail("the model runs again"))
    quantize_bundle(tiny_bundle, tmp_path / "q", "int4-gptq", text=text)
    assert (tmp_path / "q").exists()


def test_an_expert_without_tokens_is_rounded_to_nearest_and_listed(tmp_path: Path, text: Text) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GQA, "n_experts": 16, "n_experts_per_tok": 1}))
    export_bundle(f"random:{tmp_path / 'config.json'}", tmp_path / "b")
    made = quantize_bundle(tmp_path / "b", tmp_path / "q", "int4-gptq", text=Text(text.source, 1, 32))
    assert made.manifest.quantization is not None
    listed = made.manifest.quantization["uncalibrated_experts"]
    assert set(listed) == {"recurrent.layers.0.ffn.gate_up", "recurrent.layers.0.ffn.down"}
    assert all(seen < 2 * 32 for seen in listed["recurrent.layers.0.ffn.gate_up"].values())
    every = combine([load_recipe("int4-gptq"), msgspec.toml.decode("[calibration]\nevery_token = true", type=Recipe)])
    made = quantize_bundle(tmp_path / "b", tmp_path / "q", every, text=Text(text.source, 1, 32), force=True)
    assert made.manifest.quantization is not None
    assert not made.manifest.quantization["uncalibrated_experts"]


def test_every_token_reaches_every_expert_and_changes_nothing_else(tiny_bundle: Path) -> None:
    source = QuantizableBundle(tiny_bundle)
    model = Unfolded(source.config, source.weights, 2)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids)
        for module in model.modules():
            if hasattr(module, "every_token"):
                module.every_token = True
        torch.testing.assert_close(model(ids), expected)


def test_a_recipe_is_checked_against_the_model_first(tiny_bundle: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(open_bundle(tiny_bundle)[1].model)
    rule = WeightRule("*", "int8")
    for recipe, message in (
        (
            Recipe(weights=(WeightRule("layers.*", "int4"),)),
            r'"layers\.\*", which no matrix fits; there are: embed, prelude\.0',
        ),
        (Recipe(weights=(rule,), smoothing=Smoothing("awq", "x")), r'\[smoothing\] names "x"'),
        (Recipe(weights=(rule, WeightRule("*.w_uk", "int8", 64))), r"w_uk and .*w_uv are read by one operator"),
        (Recipe(weights=(rule, WeightRule("recurrent.*.down", "int4"))), "mixture of experts the same format"),
        (Recipe(weights=(rule, WeightRule("*.gate_up", "float32"))), "are read by one operator"),
        (Recipe(), "changes nothing"),
    ):
        with pytest.raises(InputError, match=message):
            make_plan(recipe, config)
    for toml, message in (
        (
            "[[weights]]\nmatrices = '*'\nformat = 'int8'\nblock = 48",
            r'block is 48 .*expected 32, 64, 128 or "channel"',
        ),
        ("[[weights]]\nmatrices = '*'\nformat = 'int3'", "not a recipe: Invalid enum value 'int3'"),
        ("[[weights]]\nmatrices = '*'\nform = 'int8'", "unknown field `form`"),
        ("[smoothing]\nmethod = 'awq'\nstrength = 2.0", "strength is 2.0; expected 0 to 1"),
        ("[activations]\ntype = 'fp8'", "fp8 activations need a static scale"),
        ("weights = ", "not a recipe"),
    ):
        path = tmp_path / "r.toml"
        path.write_text(toml)
        with pytest.raises(InputError, match=message):
            load_recipe(str(path))
    with pytest.raises(InputError, match='recipe is "int3"; expected one of fp8, int4'):
        load_recipe("int8,int3")
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe("none.toml")


def test_what_a_recipe_rests_on_must_be_given(tiny_bundle: Path, text: Text, tmp_path: Path) -> None:
    for recipe in ("int4-gptq", "w8a8"):
        with pytest.raises(InputError, match="pass --text"):
            quantize_bundle(tiny_bundle, tmp_path / "q", recipe)
    with pytest.raises(InputError, match="needs no statistics"):
        gather_statistics(tiny_bundle, tmp_path / "s", load_recipe("int8"), text)
    foreign = np.full((4, 64), 5000)
    np.save(tmp_path / "foreign.npy", foreign)
    with pytest.raises(InputError, match="5000"):
        quantize_bundle(tiny_bundle, tmp_path / "q", "int4-gptq", text=Text(tmp_path / "foreign.npy", 4, 64))
    assert not (tmp_path / "q").exists()


def test_quantized_operators_everywhere(tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A recipe for some matrices leaves the others, and later rules win."""
    rules = (WeightRule("*", "int4"), WeightRule("prelude.*", "float32"), WeightRule("embed", "int8"))
    with caplog.at_level(logging.WARNING):
        quantize_bundle(tiny_bundle, tmp_path / "q", Recipe(weights=rules))
    model = onnx.load(tmp_path / "q" / "decoder.onnx", load_external_data=False)
    operators = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert {"NormalizedLinear", "QuantizedNormalizedLinear", "FeedForward", "QuantizedFeedForward"} <= operators
    assert len(load(tmp_path / "q").generate([1, 2], 3).complete().ids) == 3


def test_an_embedding_that_is_no_head_is_rounded_to_nearest(tiny_bundle: Path) -> None:
    """It is looked up, never multiplied with, so nothing is known of its inputs."""
    config = msgspec.structs.replace(ModelConfig.from_dict(open_bundle(tiny_bundle)[1].model), tie_embeddings=False)
    plan = make_plan(Recipe(weights=(WeightRule("*", "int4", algorithm="gptq"),)), config)
    assert plan.matrices["embed"].algorithm == "round-to-nearest"
    assert plan.matrices["embed"].modules == ()
    assert plan.matrices["head"].algorithm == "gptq"
