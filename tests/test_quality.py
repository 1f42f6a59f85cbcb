"""What eval says of bundles: torch's perplexity, no divergence from itself, little from its quantized forms."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.text import read_documents, windows
from mythos_export import reference
from mythos_export.checkpoint import load_checkpoint
from mythos_export.evaluate import WINDOW, RunnerScorer, evaluate, evaluate_against
from mythos_export.export import export_bundle
from mythos_export.model.load import load_decoder
from mythos_export.model.score import DecoderScorer
from mythos_export.quantize import quantize_bundle
from runtimes.errors import InputError, MythosError
from runtimes.runner import Runner, load

MAX_TOKENS = 6_000
VERSES = (
    "ROMEO.\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n",
    "MACBETH.\nTomorrow, and tomorrow, and tomorrow, creeps in this petty pace from day to day.\n",
    "HAMLET.\nTo be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.\n",
)


@pytest.fixture(scope="module")
def verses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of a few dozen tokens."""
    path = tmp_path_factory.mktemp("text") / "verses.jsonl"
    path.write_text("".join(json.dumps({"text": text * times}) + "\n" for text in VERSES for times in (1, 2)))
    return path


def test_a_scorer_of_a_bundle_and_of_its_checkpoint(runner: Runner, shakespeare: Path) -> None:
    ids = runner.encode(VERSES[0])
    decoder = DecoderScorer(load_decoder(load_checkpoint(shakespeare), max_loops=12))
    for n_loops in (1, 4, 12):
        ours, theirs = RunnerScorer(runner).logits(ids, n_loops), decoder.logits(ids, n_loops)
        assert ours.shape == theirs.shape == (len(ids), runner.graph.vocab_size)
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_a_bundle_does_not_diverge_from_itself(tiny_bundle: Path, runner: Runner, verses: Path) -> None:
    results = evaluate_against(runner, tiny_bundle, verses, [1, 12], threads=2)
    assert list(results) == [1, 12]
    for result in results.values():
        assert result.kl_mean == result.kl_q999 == result.kl_mean_stderr == 0
        assert (result.perplexity_ratio, result.perplexity_ratio_stderr, result.top1_agreement) == (1, 0, 1)
        assert result.model == result.against


def test_a_bundle_hardly_diverges_from_its_checkpoint(runner: Runner, shakespeare: Path, verses: Path) -> None:
    result = evaluate_against(runner, shakespeare, verses)[4]
    assert 0 < result.kl_mean < result.kl_q999 < 1e-8
    assert result.perplexity_ratio == pytest.approx(1, abs=1e-5)
    assert result.top1_agreement == 1
    assert result.model == evaluate(runner, verses)[4]


def test_a_quantized_bundle_diverges_a_little(tiny_bundle: Path, verses: Path, tmp_path: Path) -> None:
    results = {}
    for recipe in ("int8", "int4"):
        quantize_bundle(tiny_bundle, tmp_path / recipe, recipe)
        results[recipe] = evaluate_against(load(tmp_path / recipe), tiny_bundle, verses)[4]
    assert 0 < results["int8"].kl_mean < 0.01 < results["int4"].kl_mean < 0.3
    assert results["int8"].top1_agreement > 0.95
    for result in results.values():
        assert 0 < result.kl_median < result.kl_mean < result.kl_q999
        # the paired error is much smaller than what the two perplexities' own errors would make it
        assert result.perplexity_ratio_stderr < result.model.perplexity_stderr / result.model.perplexity / 3


def test_max_tokens_and_a_fixed_loop_count(fixed_bundle: Path, tiny_bundle: Path, runner: Runner, verses: Path) -> None:
    """A fixed bundle compares at its own count, whichever side it is on."""
    for one, other in ((load(fixed_bundle), tiny_bundle), (runner, fixed_bundle)):
        result = evaluate_against(one, other, verses, [4], max_tokens=50)[4]
        assert result.model.tokens == 50
        assert result.kl_mean < 1e-8
    with pytest.raises(InputError, match=rf"^{fixed_bundle}: n_loops is 3, but the bundle was exported for exactly 4"):
        evaluate_against(runner, fixed_bundle, verses, [3])
    with pytest.raises(InputError, match=r"n_loops is 3, but the bundle was exported for exactly 4"):
        evaluate_against(load(fixed_bundle), tiny_bundle, verses, [3])


def test_models_of_another_vocabulary_or_tokenizer_are_refused(runner: Runner, verses: Path, tmp_path: Path) -> None:
    settings = (
        '{"vocab_size": %d, "dim": 24, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 64, "max_loop_iters": 4,'
        '"prelude_layers": 1, "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2}'
    )
    for name, vocab_size in (("other", 97), ("same", runner.graph.vocab_size)):
        (tmp_path / f"{name}.json").write_text(settings % vocab_size)
    with pytest.raises(InputError, match=r"other\.json: its vocabulary is 97 tokens, the bundle's 2048"):
        evaluate_against(runner, f"random:{tmp_path / 'other.json'}", verses)
    # of another model with the same vocabulary, and shorter windows: its positions end at 64
    result = evaluate_against(runner, f"random:{tmp_path / 'same.json'}", verses)[4]
    assert result.model.perplexity < 0.5 * result.against.perplexity
    assert result.kl_mean > 1
    tokenizer = json.loads((Path(__file__).parent.parent / "examples" / "shakespeare" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    export_bundle(f"random:{tmp_path / 'same.json'}", tmp_path / "b", loops=4, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"its tokenizer\.json is not the bundle's"):
        evaluate_against(runner, tmp_path / "b", verses)


def test_bad_input(runner: Runner, tiny_bundle: Path, verses: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    for arguments, message in (
        ({"text": tmp_path / "none.txt"}, r"none\.txt: no such text file"),
        ({"text": tmp_path / "short.txt"}, r"short\.txt: too short to score"),
        ({"loops": [0]}, "n_loops is 0; expected 1 to 12"),
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(runner, **({"text": verses} | arguments))
        with pytest.raises(InputError, match=message):
            evaluate_against(runner, tiny_bundle, **({"text": verses} | arguments))
    with pytest.raises(MythosError, match=r"none: no such file or folder; expected a \.pt"):
        evaluate_against(runner, tmp_path / "none", verses)


def test_a_decoder_runs_in_a_process_that_imported_no_more(shakespeare: Path) -> None:
    code = (
        "import sys; from mythos_export.checkpoint import load_checkpoint; from mythos_export.model.load import load_decoder; "
        "from mythos_export.model.score import DecoderScorer; "
        "print(DecoderScorer(load_decoder(load_checkpoint(sys.argv[1]), max_loops=1)).logits([1, 2], 1).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, shakespeare], capture_output=True, text=True, check=True)
    assert done.stdout == "(2, 2048)\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-mla", "small-gqa"])
def test_perplexity_equals_torch(name: str, shared: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(shared / "checkpoints" / name)
    text = shared / "text" / "eval.jsonl"
    export_bundle(checkpoint, tmp_path / "bundle")
    runner = load(tmp_path / "bundle")
    model = reference.reference_model(checkpoint)
    results = evaluate(runner, text, (1, 8), MAX_TOKENS)
    for loops, quality in results.items():
        nats, n_bytes, tokens = 0.0, 0, 0
        for window in windows(read_documents(text), runner.encode, runner.decode, WINDOW, MAX_TOKENS):
            ids = torch.tensor([window.ids])
            with torch.no_grad():
                logits = model(ids, n_loops=loops)[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum"))
            n_bytes += window.scored_bytes
            tokens += len(window.ids) - 1
        assert quality.tokens == tokens == MAX_TOKENS
        assert quality.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert quality.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert results[8].perplexity < results[1].perplexity  # depth matters in these checkpoints
