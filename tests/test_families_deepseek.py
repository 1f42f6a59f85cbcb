"""What DeepSeek-V2 and V3 checkpoints have beside a model: float8 matrices, layers that predict further tokens, leftovers of
training; what a config may not say; and that quantization changes nothing but roundings. Their logits are test_families.py's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import DEEPSEEK, DEEPSEEK_YARN, SMALL, edit, save
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from mythos_export import footprint
from mythos_export.checkpoint import load_checkpoint
from mythos_export.config import ConfigError
from mythos_export.export import export_bundle
from mythos_export.model.load import load_decoder
from mythos_export.model.unfolded import Unfolded
from mythos_export.quantize import quantize_bundle
from mythos_export.quantize.bundle import Text
from mythos_export.quantize.folds import Factors, cache_folds, folds
from mythos_export.reference import ReferenceMissingError, reference_model
from mythos_export.shards import CheckpointError
from runtimes.errors import MythosError
from runtimes.runner import load

V3 = {**DEEPSEEK, "n_group": 4, "topk_group": 2, "attention_bias": True}
IDS = np.random.default_rng(0).integers(0, 97, 40)


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS[None])).logits[0].numpy()


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of V3 and its bundle."""
    home = tmp_path_factory.mktemp("v3")
    save("DeepseekV3", home / "checkpoint", rope_parameters=DEEPSEEK_YARN, shard="1GB", **V3)
    export_bundle(home / "checkpoint", home / "bundle")
    return home


# Quantization


@pytest.mark.parametrize(
    ("recipe", "error"), [("int8", 0.15), ("w8a8", 0.2), ("int4,kv-int8", 0.9), ("int4-gptq", 0.9)]
)
def test_quantized_bundles_run(v3: Path, tmp_path: Path, recipe: str, error: float) -> None:
    """With and without native operators."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 97, (4, 64)))
    text = None if recipe in ("int8", "int4,kv-int8") else Text(tmp_path / "ids.npy", 4, 64)
    quantize_bundle(v3 / "bundle", tmp_path / "quantized", recipe, text=text)
    plain = load(v3 / "bundle").score(IDS.tolist(), logits=True)
    for native in (None, False):
        rounded = load(tmp_path / "quantized", native=native).score(IDS.tolist(), logits=True)
        assert not np.array_equal(plain, rounded)
        assert np.abs(plain - rounded).mean() < error * np.abs(plain).mean()  # of random weights, which round badly


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("DeepseekV3", {**V3, "rope_parameters": DEEPSEEK_YARN}),
        ("DeepseekV2", {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_factors_move_between_layers_without_a_trace(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    """What smoothing and cached rows of int8 fold into weights and biases: any factors leave the logits transformers'."""
    expected = logits_of(save(kind, tmp_path, **fields))
    checkpoint = load_checkpoint(tmp_path)
    weights = dict(load_decoder(checkpoint, max_loops=1).named_parameters())
    factors = Factors({name: weight.shape for name, weight in weights.items()})
    generator = torch.Generator().manual_seed(0)
    model = Unfolded(checkpoint.config, weights, 1)
    modules = dict(model.named_modules())
    for fold in folds(checkpoint.config):
        channels = torch.rand(modules[fold.modules[0]].in_features, generator=generator) + 0.5
        factors.apply(fold, fold.shared(channels))
    for _, channels, fold in cache_folds(checkpoint.config):
        n = channels.stop - channels.start
        rotated = any("norm" not in name and "out" not in name for name, _ in fold.divided + fold.columns)
        some = (
            torch.rand(n // 2, generator=generator).repeat(2) + 0.5
            if rotated
            else torch.rand(n, generator=generator) + 0.5
        )
        factors.apply(fold, some)
    moved = {name: factors.scaled(name, weight) for name, weight in weights.items()}
    assert any(not torch.equal(moved[name], weights[name]) for name in weights)
    for tensors in (weights, moved):
        with torch.no_grad():
            logits = Unfolded(checkpoint.config, tensors, 1)(torch.from_numpy(IDS[None]))[0].numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)


# Checkpoints


def test_float8_matrices_are_read_with_their_scales(v3: Path, tmp_path: Path) -> None:
    """In blocks that do not divide the matrices; the oracle holds what they stand for."""
    path, rows, columns = tmp_path / "model.safetensors", 32, 16
    tensors = load_file(v3 / "checkpoint" / "model.safetensors")
    stored = dict(tensors)
    for name, matrix in tensors.items():
        if not name.endswith("proj.weight"):
            continue
        n = [-(-size // of) for size, of in zip(matrix.shape, (rows, columns), strict=True)]
        scales = torch.rand(n, generator=torch.Generator().manual_seed(1)) / 500
        spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: matrix.shape[0], : matrix.shape[1]]
        stored[name] = (matrix / spread).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        tensors[name] = stored[name].float() * spread
    save_file(stored, path)
    (tmp_path / "config.json").write_bytes((v3 / "checkpoint" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"extra: model\.layers\.0\.mlp\.down_proj\.weight_scale_inv"):
        load_checkpoint(tmp_path)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [rows, columns]})
    checkpoint = load_checkpoint(tmp_path)
    assert {name: bool(torch.equal(checkpoint.get(name), tensors[name])) for name in tensors} == dict.fromkeys(
        tensors, True
    )
    assert all(torch.isfinite(parameter).all() for parameter in reference_model(checkpoint)._model.parameters())

    first = next(name for name in stored if name.endswith("_scale_inv"))
    save_file({**stored, first: stored[first][:, :1].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"_scale_inv is \[\d+, 1\], expected \[\d+, \d+\] for a matrix"):
        load_checkpoint(tmp_path)
    del stored[first]
    save_file(stored, path)
    with pytest.raises(CheckpointError, match=r"is float8, but .*_scale_inv is not there"):
        load_checkpoint(tmp_path)


def test_what_only_training_needs_is_reported(v3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers beyond the last, for further tokens, and a router's counters; but no bias that the config knows nothing of."""
    tensors = load_file(v3 / "checkpoint" / "model.safetensors")
    config = v3 / "checkpoint" / "config.json"
    extra = ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight", "model.layers.1.mlp.gate.expert_load"]
    save_file({**tensors, **{name: torch.zeros(8) for name in extra}}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    with caplog.at_level(logging.WARNING):
        assert set(load_checkpoint(tmp_path).unread) == set(extra)
    assert "3 tensors that only training needs are not read" in caplog.text
    edit(tmp_path / "config.json", num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"extra: model\.layers\.3\.eh_proj\.weight"):
        load_checkpoint(tmp_path)
    save_file(
        {**tensors, "model.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(8)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"extra: model\.layers\.0\.mlp\.gate\.e_score_correction_bias"):
        load_checkpoint(tmp_path)
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.gate\.e_score_correction_bias \[8\]"):
        load_checkpoint(tmp_path)


def test_every_second_layer_a_mixture(tmp_path: Path) -> None:
    """moe_layer_freq, which transformers knows nothing of: its layers are put in place by hand, and it is no oracle by itself."""
    fields = {**DEEPSEEK, "n_shared_experts": 1}
    model = save("DeepseekV2", tmp_path, **fields)
    model.model.layers[1].mlp = modeling_deepseek_v2.DeepseekV2MLP(model.config)
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
    edit(tmp_path / "config.json", moe_layer_freq=2)
    export_bundle(tmp_path / "model.safetensors", tmp_path / "bundle")
    got = load(tmp_path / "bundle").score(IDS.tolist(), logits=True)
    np.testing.assert_allclose(got, logits_of(model), rtol=0, atol=2e-4)
    with pytest.raises(ReferenceMissingError, match="takes the checkpoint for another model"):
        reference_model(load_checkpoint(tmp_path / "model.safetensors"))


def test_sizes_are_known_beforehand() -> None:
    """Of the published models, and, but for the bias that only V3's routers have, of the tensors a checkpoint holds."""
    for name, parameters in (("deepseek_v2_lite", 15.7e9), ("deepseek_v3", 671e9)):
        checkpoint = load_checkpoint(f"random:{name}")
        shapes = checkpoint.family.tensor_shapes(checkpoint.settings).values()
        held = sum(int(np.prod(shape)) for shape in shapes)
        assert held == pytest.approx(parameters, rel=0.005)
        without_bias = 26 * 64 if name == "deepseek_v2_lite" else 0
        assert footprint.parameters(checkpoint.config) == held + without_bias


def test_a_random_checkpoint_is_transformers(tmp_path: Path) -> None:
    config = {**SMALL, **V3, "num_hidden_layers": 2, "architectures": ["DeepseekV3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(f"random:{tmp_path / 'config.json'}:3")
    export_bundle(checkpoint, tmp_path / "bundle", dtype="bfloat16")
    with torch.no_grad():
        expected = reference_model(checkpoint)(torch.from_numpy(IDS[None]))[0].numpy()
    got = load(tmp_path / "bundle").score(IDS.tolist(), logits=True)
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()


# What is refused


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        ("V3", {"n_group": 3}, "n_experts is 8 and n_groups 3; the first must be a multiple"),
        ("V3", {"topk_group": 5}, "top_k_groups is 5 but there are only 4 groups; lower topk_group"),
        ("V3", {"num_experts_per_tok": 5}, "top_k is 5, but the 2 groups chosen from hold 4 experts; lower num_experts"),
        ("V3", {"n_group": 8, "topk_group": 8}, "a group is ranked by its best 2 experts, but holds 1; lower n_group"),
        ("V3", {"topk_method": "greedy"}, 'topk_method is "greedy"; expected "noaux_tc" of DeepseekV3'),
        ("V3", {"scoring_func": "softmax"}, 'scoring_func is "softmax"; expected "sigmoid" of DeepseekV3'),
        ("V3", {"routed_scaling_factor": 0.0}, "the scale of the routed experts is 0.0; expected a number above 0"),
        ("V3", {"mlp_bias": True}, "mlp_bias is true; expected false: biases are not supp"),
        ("V3", {"moe_layer_freq": 0}, "moe_layer_freq is 0; expected at least 1"),
        ("V3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; RoPE needs an even number"),
        ("V3", {"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantized already; export the float"),
        ("V2", {"topk_method": "best"}, 'topk_method is "best"; expected "greedy" or "group_limited_greedy" of Deep'),
        ("V2", {"topk_method": "group_limited_greedy"}, "n_group or topk_group is missing, which topk_method"),
        ("V2", {"norm_topk_prob": True}, "norm_topk_prob is true; expected false: transformers and DeepSeek's own code"),
        ("V2", {"num_experts_per_tok": 9}, "top_k is 9 but there are only 8 experts"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_itself_is_refused(
    tmp_path: Path, kind: str, fields: dict[str, Any], match: str
) -> None:
    groups = {"n_group": 4, "topk_group": 2} if kind == "V3" else {}
    config = {**SMALL, **DEEPSEEK, **groups, "architectures": [f"Deepseek{kind}ForCausalLM"], **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=match):
        load_checkpoint(f"random:{tmp_path / 'config.json'}")


def test_missing_fields_are_asked_for(tmp_path: Path) -> None:
    config = {**SMALL, **DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"]}
    for field, match in (
        ("q_lora_rank", "q_lora_rank is missing; expected a number, or null"),
        ("kv_lora_rank", "kv_lora_"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name != field}))
        with pytest.raises(MythosError, match=match):
            load_checkpoint(f"random:{tmp_path / 'config.json'}")
