"""eval's perplexity is torch's: same text, same windows, the reference package's model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from calibration.text import read_documents, windows
from mythos_export import reference
from mythos_export.checkpoint import load_checkpoint
from mythos_export.evaluate import WINDOW, evaluate
from mythos_export.export import export_bundle
from runtimes.runner import load

MAX_TOKENS = 12_000


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
