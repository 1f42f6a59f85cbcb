"""A bundle on onnxruntime says what the reference package's model says: logits, and 256 greedy tokens of cached decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.text import read_documents
from mythos_export import reference
from mythos_export.checkpoint import Checkpoint, load_checkpoint
from mythos_export.export import export_bundle
from mythos_export.families.open_mythos import Settings, model_config
from runtimes.runner import Runner, load

TOLERANCE = 2e-4
NEW_TOKENS = 256
ODD = {
    "mla-odd-no-shared-top1": Settings(
        vocab_size=301, dim=72, n_heads=3, max_seq_len=600, max_loop_iters=5, prelude_layers=3, coda_layers=1,
        kv_lora_rank=20, q_lora_rank=28, qk_rope_head_dim=6, qk_nope_head_dim=10, v_head_dim=14, n_experts=7,
        n_shared_experts=0, n_experts_per_tok=1, expert_dim=36, lora_rank=3,
    ),
    "mla-top4-two-shared": Settings(
        vocab_size=257, dim=88, n_heads=4, max_seq_len=600, max_loop_iters=6, prelude_layers=1, coda_layers=3,
        kv_lora_rank=24, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, n_experts=9,
        n_shared_experts=2, n_experts_per_tok=4, expert_dim=20, lora_rank=5,
    ),
    "gqa-odd-top4": Settings(
        vocab_size=211, dim=90, n_heads=9, n_kv_heads=3, max_seq_len=600, max_loop_iters=4, prelude_layers=2,
        coda_layers=2, attn_type="gqa", n_experts=5, n_shared_experts=1, n_experts_per_tok=4, expert_dim=12, lora_rank=2,
    ),
    "gqa-no-coda-one-expert": Settings(
        vocab_size=199, dim=50, n_heads=5, n_kv_heads=1, max_seq_len=600, max_loop_iters=3, prelude_layers=0,
        coda_layers=0, attn_type="gqa", n_experts=1, n_shared_experts=0, n_experts_per_tok=1, expert_dim=33, lora_rank=1,
    ),
}  # fmt: skip


def lowered(checkpoint: Checkpoint, by: float = 3.0) -> Checkpoint:
    """The same checkpoint with act.halt.bias lowered: tokens halt later, so every loop reaches the output."""

    def get(name: str) -> torch.Tensor:
        tensor = checkpoint.get(name)
        return tensor - by if name == "recurrent.act.halt.bias" else tensor

    return Checkpoint(checkpoint.settings, checkpoint.config, get, checkpoint.source, checkpoint.tokenizer)


def reference_logits(model: torch.nn.Module, ids: list[int], loops: int) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]), n_loops=loops)[0].numpy()


def reference_greedy(model: torch.nn.Module, prompt: list[int], loops: int, new_tokens: int = NEW_TOKENS) -> list[int]:
    cache: dict[str, dict[str, torch.Tensor]] = {}
    step, position, ids = torch.tensor([prompt]), 0, []
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(step, n_loops=loops, kv_cache=cache, start_pos=position)
            position += step.shape[1]
            step = logits[:, -1:].argmax(-1)
            ids.append(int(step))
    return ids


@pytest.fixture(scope="module")
def eval_ids(shared: Path) -> list[int]:
    """512 tokens of the evaluation text, for the small checkpoints' tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "checkpoints" / "small-mla" / "tokenizer.json"))
    ids: list[int] = []
    for document in read_documents(shared / "text" / "eval.jsonl"):
        ids += tokenizer.encode(document).ids
        if len(ids) >= 512:
            break
    return ids[:512]


LOOPS = {
    "small-mla": (1, 2, 4, 8, 12),
    "small-gqa": (1, 2, 4, 8, 12),
    "small-mla halting later": (12,),
    "small-gqa halting later": (2,),
}


@pytest.mark.slow
@pytest.mark.parametrize("trained", LOOPS)
def test_trained_checkpoints(trained: str, shared: Path, eval_ids: list[int], tmp_path: Path) -> None:
    """With the loop count an input, of up to 12, and with 8 unrolled."""
    name, _, later = trained.partition(" ")
    checkpoint = load_checkpoint(shared / "checkpoints" / name)
    if later:
        checkpoint = lowered(checkpoint)
    model = reference.reference_model(checkpoint)
    export_bundle(checkpoint, tmp_path / "dynamic", max_loops=12)
    dynamic = load(tmp_path / "dynamic")
    for loops in LOOPS[trained]:
        logits = reference_logits(model, eval_ids, loops)
        greedy = reference_greedy(model, eval_ids[:24], loops)
        runners = [dynamic]
        if loops == 8:
            export_bundle(checkpoint, tmp_path / "fixed", loops=8)
            runners.append(load(tmp_path / "fixed"))
        for runner in runners:
            np.testing.assert_allclose(runner.score(eval_ids, loops, logits=True), logits, rtol=0, atol=TOLERANCE)
            generated = runner.generate(eval_ids[:24], NEW_TOKENS, n_loops=loops, ignore_eos=True).complete()
            assert generated.ids == greedy


def test_shipped_checkpoint(shakespeare: Path, runner: Runner) -> None:
    model = reference.reference_model(load_checkpoint(shakespeare))
    ids = runner.encode("KING HENRY.\nOnce more unto the breach, dear friends, once more;\nOr close the wall up")
    for loops in (1, 4, 12):
        expected = reference_logits(model, ids, loops)
        np.testing.assert_allclose(runner.score(ids, loops, logits=True), expected, rtol=0, atol=TOLERANCE)
        assert runner.generate(ids, NEW_TOKENS, n_loops=loops, ignore_eos=True).complete().ids == reference_greedy(
            model, ids, loops
        )


@pytest.mark.parametrize("name", ODD)
def test_odd_configs(name: str, tmp_path: Path) -> None:
    """Random weights at sizes that are multiples of nothing, dynamic with loops beyond the trained depth."""
    import msgspec

    settings = ODD[name]
    config_file = tmp_path / "config.json"
    config_file.write_bytes(msgspec.json.encode(settings))
    checkpoint = load_checkpoint(f"random:{config_file}:7")
    assert checkpoint.config == model_config(settings)
    model = reference.reference_model(checkpoint)
    deepest = settings.max_loop_iters + 3
    export_bundle(checkpoint, tmp_path / "dynamic", max_loops=deepest)
    dynamic = load(tmp_path / "dynamic")
    ids = np.random.default_rng(0).integers(0, settings.vocab_size, 90).tolist()
    for loops in (1, settings.max_loop_iters, deepest):
        expected = reference_logits(model, ids, loops)
        np.testing.assert_allclose(dynamic.score(ids, loops, logits=True), expected, rtol=0, atol=TOLERANCE)
        assert dynamic.generate(ids, 32, n_loops=loops).complete().ids == reference_greedy(model, ids, loops, 32)


def test_float64(tmp_path: Path) -> None:
    """float32 on onnxruntime stays near the reference computing in float64: the figure is ours to keep, not torch's float32."""
    settings = ODD["mla-top4-two-shared"]
    checkpoint = _random(settings, tmp_path)
    export_bundle(checkpoint, tmp_path / "bundle", max_loops=6)
    model = reference.reference_model(checkpoint, torch.float64)
    model.freqs_cis_mla = model.freqs_cis_mla.to(torch.complex128)
    ids = np.random.default_rng(1).integers(0, settings.vocab_size, 64).tolist()
    runner = load(tmp_path / "bundle")
    np.testing.assert_allclose(
        runner.score(ids, 6, logits=True), reference_logits(model, ids, 6), rtol=0, atol=TOLERANCE
    )


def _random(settings: Settings, folder: Path) -> Checkpoint:
    import msgspec

    config_file = folder / "config.json"
    config_file.write_bytes(msgspec.json.encode(settings))
    return load_checkpoint(f"random:{config_file}")
