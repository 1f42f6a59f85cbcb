"""A tiny 'Myth' blueprint over a long context: prefill in chunks, then greedy tokens, against transformers; and its memory.
By hand (`make long-context`) over 100,000 tokens; a test does it over a few thousand.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mythos_export.export import export_bundle
from runtimes.runner import Runner, load

LAYERS, VOCAB, WIDTH = 2, 97, 128
CHUNK = 512  # tokens a step
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": WIDTH // 16,
    "max_position_embeddings": 131072,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}


def measure(folder: Path, tokens: int, new: int, window: int | None, threads: int = 1) -> dict[str, Any]:
    """Feeds random tokens in chunks, decodes `new` greedy ones, and compares the logits of the last positions with transformers'.

    Returns the largest difference, whether the greedy tokens are the oracle's likeliest ones, bytes of the cache, and what the
    process took beyond a session of two chunks. The oracle sees all tokens, or, with a window, those that can reach its last ones.
    """
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**CONFIG, sliding_window=window)
    model = transformers.MixtralForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    model.save_pretrained(folder / "checkpoint")
    export_bundle(folder / "checkpoint", folder / "bundle")
    ids = np.random.default_rng(0).integers(0, VOCAB, tokens).tolist()
    runner = load(folder / "bundle", "onnxruntime", threads)
    run(runner, ids[: 2 * CHUNK], 2)
    before = peak(reset=True)
    began = time.perf_counter()
    chosen, logits = run(runner, ids, new)
    figures = {"tokens": tokens, "window": window, "seconds": time.perf_counter() - began, "native": runner.native}
    grown = peak() - before
    rows = min(-(-(tokens + new) // 256) * 256, window or sys.maxsize)
    cache = LAYERS * rows * WIDTH * 4
    whole = ids + chosen
    seen = whole if window is None else whole[-(LAYERS * window + new) :]
    position = torch.arange(len(whole) - len(seen), len(whole))[None]
    with torch.no_grad():
        expected = model(torch.tensor([seen]), position_ids=position, logits_to_keep=new + 1).logits[0].numpy()[:-1]
    return figures | {
        "difference": float(np.abs(logits - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
        "tokens_equal": expected.argmax(-1).tolist() == chosen,
        "cache_bytes": cache,
        "grown_bytes": grown,
    }


def run(runner: Runner, ids: list[int], new: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the logits that each was chosen from."""
    session = runner.session(chunk=CHUNK, tokens=len(ids) + new)
    step, chosen, rows = ids, list[int](), []
    for _ in range(new):
        rows.append(session.advance([step])[0][0])
        step = [int(rows[-1].argmax())]
        chosen += step
    session.close()
    return chosen, np.stack(rows)


def peak(reset: bool = False) -> int:
    """Most bytes that this process has had in memory; with reset, has now, from where it counts anew."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if (
    __name__ == "__main__"
):  # TOKENS WINDOW: each window in a process of its own, whose memory is counted from its beginning
    with tempfile.TemporaryDirectory() as made:
        print(json.dumps(measure(Path(made), int(sys.argv[1]), 64, int(sys.argv[2]) or None, threads=2)))
