"""Checkpoints of the Hugging Face families: transformers' own classes are the oracle, over configurations that differ where these
models do. And what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mythos_export.build.lower import lower
from mythos_export.checkpoint import load_checkpoint
from mythos_export.cli.app import app
from mythos_export.config import ConfigError
from mythos_export.export import export_bundle
from mythos_export.families import FAMILIES
from mythos_export.inspection import inspect_bundle
from mythos_export.overloads import MANY_TOKENS
from mythos_export.planning import plan
from mythos_export.quantize import quantize_bundle
from mythos_export.quantize.bundle import Text
from mythos_export.reference import reference_model
from mythos_export.shards import CheckpointError
from mythos_export.verify import verify_bundle
from runtimes.errors import BackendError, InputError, MythosError
from runtimes.runner import load

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 192,
    "initializer_range": 0.2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 6.0, "original_max_position_embeddings": 32}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, head ties, one kv head, wide heads": (
        "Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 16}
    ),
    "llama, linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, llama3 scaling": ("Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32}}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn, no rounding, own factor": (
        "Llama", {"rope_parameters": {**YARN, "truncate": False, "attention_factor": 1.3, "beta_fast": 8.0}}
    ),
    "mistral, window 8": ("Mistral", {"sliding_window": 8}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "num_hidden_layers": 1}),
    "mixtral, top 2 of 4, window 5": (
        "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
    ),
    "mixtral, top 1 of 3": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 4}),
    "mixtral, top 3 of 16, yarn": (
        "Mixtral", {"num_local_experts": 16, "num_experts_per_tok": 3, "rope_parameters": YARN, "head_dim": 12}
    ),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "deepseek v2, greedy": ("DeepseekV2", {**DEEPSEEK, "n_shared_experts": 2}),
    "deepseek v2, plain queries, biases, yarn": (
        "DeepseekV2",
        {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True, "rope_parameters": DEEPSEEK_YARN, "rms_norm_eps": 1e-3},
    ),
    "deepseek v2, best groups, scaled": (
        "DeepseekV2",
        {
            **DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0,
            "first_k_dense_replace": 0, "num_hidden_layers": 2,
        },
    ),
    "deepseek v3, best groups, biases, yarn": (
        "DeepseekV3",
        {
            **DEEPSEEK, "n_group": 4, "topk_group": 2, "attention_bias": True, "rope_parameters": DEEPSEEK_YARN,
            "rms_norm_eps": 1e-3,
        },
    ),
    "deepseek v3, plain queries, pairs apart, not normalized": (
        "DeepseekV3",
        {
            **DEEPSEEK, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False,
            "routed_scaling_factor": 0.7, "n_shared_experts": 2, "num_hidden_layers": 2,
        },
    ),
}  # fmt: skip


def save(kind: str, folder: Path, shard: str = "60KB", **fields: Any) -> Any:
    """A tiny random model of transformers, in folder, in several files; returns it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **fields})
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("bias"):  # which begin as zeros
            torch.nn.init.normal_(tensor, 0.0, 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """transformers' model, its folder, and the bundle."""
    home = tmp_path_factory.mktemp("family")
    kind, fields = CONFIGS[request.param]
    model = save(kind, home / "checkpoint", **fields)
    export_bundle(home / "checkpoint", home / "bundle")
    return model, home / "checkpoint", home / "bundle"


def test_logits_and_greedy_tokens_are_transformers(pair: tuple[Any, Path, Path]) -> None:
    """Beyond the window, and beyond the original context where it was scaled."""
    model, _, bundle = pair
    ids = np.random.default_rng(0).integers(0, 97, (2, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
        whole = model.generate(
            torch.from_numpy(ids[:1]),
            attention_mask=torch.ones(1, 40, dtype=torch.int64),
            max_new_tokens=128,
            do_sample=False,
            eos_token_id=None,
        )
    with load(bundle) as runner:
        for row, want in zip(ids, expected, strict=True):
            np.testing.assert_allclose(runner.score(row.tolist(), logits=True), want, rtol=0, atol=2e-4)
        got = runner.generate([ids[0].tolist()], 128, ignore_eos=True).complete().ids[0]
    assert list(got) == whole[0, 40:].tolist()


def test_ragged_chunks_give_what_a_whole_prompt_gives(pair: tuple[Any, Path, Path]) -> None:
    model, _, bundle = pair
    ids = np.random.default_rng(1).integers(0, 97, (2, 30)).tolist()
    with load(bundle) as runner:
        session = runner.session(2)
        parts = [session.advance([row[:first] for row, first in zip(ids, (7, 12), strict=True)])]
        parts.append(session.advance([ids[0][7:30], ids[1][12:13]]))
        parts.append(session.advance([ids[0][:1], ids[1][13:30]]))
    with torch.no_grad():
        first = model(torch.tensor([ids[0]])).logits[0, -1].numpy()
        second = model(torch.tensor([ids[1]])).logits[0, -1].numpy()
    np.testing.assert_allclose(parts[1][0][0], first, rtol=0, atol=2e-4)
    np.testing.assert_allclose(parts[2][0][1], second, rtol=0, atol=2e-4)


def test_bundles_are_verified_against_transformers(pair: tuple[Any, Path, Path]) -> None:
    _, folder, bundle = pair
    parity = verify_bundle(bundle, folder, tokens=50)
    assert "transformers" in parity.oracle
    assert {check.name for check in parity.checks} >= {"logits", "decode", "reference"}
    assert all(check.ok for check in parity.checks)


@pytest.mark.parametrize(("recipe", "error"), [("int8", 0.08), ("w8a8", 0.15), ("int4", 0.9), ("int4-gptq", 0.9)])
def test_quantized_bundles_of_a_family_run(tmp_path: Path, recipe: str, error: float) -> None:
    """Calibrated ones as well: there, a model without a loop is one of a single loop."""
    save("Mixtral", tmp_path / "checkpoint", num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    np.save(tmp_path / "ids.npy", np.random.default_rng(1).integers(0, 97, (8, 64)))
    text = Text(tmp_path / "ids.npy", 4, 64) if recipe in ("int4-gptq", "w8a8") else None
    quantize_bundle(tmp_path / "bundle", tmp_path / "quantized", recipe, text=text)
    ids = np.random.default_rng(0).integers(0, 97, 40).tolist()
    plain, rounded = (load(tmp_path / name).score(ids, logits=True) for name in ("bundle", "quantized"))
    assert not np.array_equal(plain, rounded)
    assert np.abs(plain - rounded).mean() < error * np.abs(plain).mean()  # of random weights, which round badly


def test_engines_are_refused(tmp_path: Path) -> None:
    save("Llama", tmp_path, num_hidden_layers=1)
    export_bundle(tmp_path, tmp_path / "bundle")
    graph = load(tmp_path / "bundle").graph
    with pytest.raises(
        BackendError, match="the model has no loop, and engines are built for looped ones only; run it with"
    ):
        lower(tmp_path / "bundle", graph, "float32", form=MANY_TOKENS)


def test_a_depth_is_refused(pair: tuple[Any, Path, Path]) -> None:
    with (
        load(pair[2]) as runner,
        pytest.raises(InputError, match="n_loops is 2, but the model has no loop; leave it out"),
    ):
        runner.generate([[1]], 3, n_loops=2)


def test_ends_of_text_come_with_the_checkpoint(tmp_path: Path) -> None:
    save("Llama", tmp_path, shard="1GB", eos_token_id=[5, 7])
    assert export_bundle(tmp_path, tmp_path / "bundle").eos_token_ids == (5, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_checkpoint(tmp_path).eos_token_ids == (9,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(CheckpointError, match="eos_token_id is 'end'; expected a token's number or a list"):
        load_checkpoint(tmp_path)


def test_blueprints_have_the_sizes_they_are_named_after() -> None:
    """Nothing is allocated to know that."""
    (variants,) = (family.variants for family in FAMILIES if "myth_1b" in family.variants)
    sizes = {"m": 1e6, "b": 1e9, "t": 1e12}
    for name, settings in variants.items():
        shapes = load_checkpoint(f"random:{name}").family.tensor_shapes(settings).values()
        number, unit = name.removeprefix("myth_")[:-1], name[-1]
        assert sum(np.prod(shape) for shape in shapes) == pytest.approx(float(number) * sizes[unit], rel=0.2), name


def test_a_random_checkpoint_of_a_family_is_transformers(tmp_path: Path) -> None:
    config = {**SMALL, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(f"random:{tmp_path / 'config.json'}:3")
    export_bundle(checkpoint, tmp_path / "bundle")
    ids = np.random.default_rng(0).integers(0, 97, 20)
    with torch.no_grad():
        expected = reference_model(checkpoint)(torch.from_numpy(ids[None]))[0].numpy()
    np.testing.assert_allclose(load(tmp_path / "bundle").score(ids.tolist(), logits=True), expected, rtol=0, atol=2e-4)


def test_what_a_checkpoint_will_need_is_known_before_it_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("Mixtral", tmp_path, num_local_experts=4, num_experts_per_tok=2)
    planned = plan(tmp_path, context=100)
    manifest = export_bundle(tmp_path, tmp_path / "bundle")
    tables = 2 * 4 * SMALL["max_position_embeddings"] * 6
    padding = 4096 * 30
    stored = manifest.files["weights.bin"].size - tables
    assert planned["forms"][0]["weight_bytes"] <= stored <= planned["forms"][0]["weight_bytes"] + padding
    assert (
        planned["forms"][0]["cache_bytes"] == 2 * 100 * 2 * 2 * 12 * 4
    )  # layers, tokens, keys and values of two heads
    with pytest.raises(InputError, match="context is 193; expected 1 to 192, the model's positions"):
        plan(tmp_path, context=193)
    app(["inspect", "random:myth_1.7t"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "random:myth_1.7t:0 (mixtral): 1695631.9 M parameters, 80 layers, no loop" in shown
    assert "| H200, 141 GB            | 6.6 TB short" in shown


# What is refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("Mixtral", tmp_path / "checkpoint", num_local_experts=2, num_experts_per_tok=1)
    return tmp_path / "checkpoint"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "kind", "match"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, CheckpointError, "expected one of LlamaForCausalLM, MistralFor"),
        ({"architectures": "MixtralForCausalLM"}, CheckpointError, "architectures is MixtralForCausalLM; expected one of"),
        ({"architectures": ["MistralForCausalLM"]}, CheckpointError, r"missing: model\.layers\.0\.mlp\.gate_proj"),
        ({"hidden_act": "gelu"}, ConfigError, 'hidden_act is "gelu"; expected "silu"'),
        ({"attention_bias": True}, ConfigError, "attention_bias is true; expected false: biases are not"),
        ({"quantization_config": {"bits": 4}}, ConfigError, "the checkpoint is quantized already; export the float one"),
        ({"rope_parameters": {"rope_type": "longrope"}}, ConfigError, "rope scaling .*longrope"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, ConfigError, "factor is 0.5; expected at least 1"),
        ({"num_experts_per_tok": 3}, ConfigError, "top_k is 3 but there are only 2 experts"),
        ({"num_key_value_heads": 3}, ConfigError, "n_heads is 4 and n_kv_heads 3; the first must be a multiple"),
        ({"hidden_size": "48"}, CheckpointError, "config is not one of mixtral: Expected `int`, got `str`"),
        ({"num_hidden_layers": 3}, CheckpointError, r"missing: model\.layers\.2\.input_layernorm\.weight \[48\]"),
        ({"num_hidden_layers": 1}, CheckpointError, r"extra: model\.layers\.1\.block_sparse_moe"),
        ({"intermediate_size": 41}, CheckpointError, r"w1\.weight is \[40, 48\], expected \[41, 48\]"),
        ({"tie_word_embeddings": True}, CheckpointError, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(
    folder: Path, fields: dict[str, Any], kind: type[MythosError], match: str
) -> None:
    edit(folder / "config.json", **fields)
    with pytest.raises(kind, match=match):
        load_checkpoint(folder)


def test_a_window_that_is_not_spoken_of_is_asked_for(tmp_path: Path) -> None:
    """Where transformers would put 4096."""
    save("Mistral", tmp_path, sliding_window=8)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="sliding_window is missing; expected a number of tokens, or null for none"):
        load_checkpoint(tmp_path)


def test_damaged_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    index, shards = folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))
    weight_map = json.loads(index.read_text())["weight_map"]
    first = next(iter(weight_map))

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder)

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    refused(f"{shards[1].name}: not a complete safetensors file")
    shards[1].unlink()
    refused(f"names {shards[1].name}, which is not beside it; download the missing file")
    shards[1].write_bytes(whole)
    for name in ("../model.safetensors", "/etc/passwd", "..", "a\\b"):
        edit(index, weight_map={**weight_map, first: name})
        refused("is no file of its own folder; do not use it")
    edit(index, weight_map={**weight_map, "model.lost.weight": shards[0].name})
    refused("1 tensors are in no file it names, model.lost.weight first")
    index.write_text("[1]")
    refused("not an index of safetensors files")
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"expected step_\*.pt files, or config.json with one .safetensors file"):
        load_checkpoint(tmp_path)


def test_no_shard_stays_mapped(folder: Path, tmp_path: Path) -> None:
    """What was read of one counts as this process's memory for as long as it is: of large ones, all of it."""
    checkpoint = load_checkpoint(folder)
    for pack in checkpoint.tensors(1).values():
        for piece in pack():
            assert piece.numel()
    export_bundle(checkpoint, tmp_path / "bundle")
    quantize_bundle(tmp_path / "bundle", tmp_path / "quantized", "int8")
    del piece
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder) not in mapped
    assert str(tmp_path / "bundle" / "weights.bin") not in mapped
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        checkpoint.get("model.norm.weight")


def test_a_bundle_of_before_windows_keeps_every_row(tmp_path: Path) -> None:
    """Format 4 has a graph that reads no ring."""
    save("Mistral", tmp_path / "checkpoint", sliding_window=8)
    export_bundle(tmp_path / "checkpoint", tmp_path / "bundle")
    ids = np.random.default_rng(0).integers(0, 97, 190).tolist()
    expected = load(tmp_path / "bundle").score(ids)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    del manifest["graphs"][0]["window"]
    edit(tmp_path / "bundle" / "manifest.json", format_version=4, graphs=manifest["graphs"])
    with load(tmp_path / "bundle") as runner:
        assert runner.graph.window == 0
        np.testing.assert_allclose(runner.score(ids), expected, rtol=0, atol=1e-5)
        session = runner.session()
        session.advance([ids])
        assert session._sequences._open_cache().rows.shape[2] == 256
    assert inspect_bundle(tmp_path / "bundle")["cache_bytes"] == 192 * 2 * 2 * 2 * 12 * 4


def test_families_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    app(["inspect", "--families", "--json"], standalone_mode=False)
    listed = json.loads(capsys.readouterr().out)
    assert {name for family in listed for name in family["architectures"]} == {
        "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
    }  # fmt: skip
    assert "myth_1b" in [name for family in listed for name in family["variants"]]
