"""Parity of a bundle with its checkpoint: onnxruntime against torch, output by output, loop count by loop count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from calibration.text import read_documents
from mythos_export import reference
from mythos_export.checkpoint import Checkpoint, load_checkpoint
from mythos_export.config import ModelConfig
from mythos_export.export import DTYPES
from mythos_export.model.load import load_decoder
from mythos_export.model.score import run_decoder, window_step
from runtimes.backend import StepOutput
from runtimes.bundle import Check, Parity, rewrite_manifest
from runtimes.errors import InputError
from runtimes.runner import Runner, load
from runtimes.session import check_n_loops

# By dtype of the cache. A level of an int8 row is 1/127 of its largest magnitude, of a float16 row at most 1/1024.
TOLERANCES = {
    "float32": {"logits": 2e-4, "new_kv": 2e-4, "exit_loop": 0.0, "decode": 2e-4, "reference": 2e-4},
    "float16": {"logits": 5e-3, "new_kv": 2e-3, "exit_loop": 0.0, "decode": 5e-3},
    "int8": {"logits": 5e-2, "new_kv": 2e-2, "exit_loop": 0.0, "decode": 5e-2},
}
_DECODED = 8  # tokens fed one by one in the decode check


def verify_bundle(
    bundle: str | Path,
    source: str | Path | Checkpoint,
    *,
    text: str | Path | None = None,
    tokens: int = 256,
    loops: Sequence[int] | None = None,
    device: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Parity:
    """Compares a bundle on onnxruntime with its checkpoint in torch and writes the figures of the CPU into the manifest.

    text: file whose first `tokens` tokens are the input (default: random ids). loops: counts to check (default: the trained
    one, or the fixed one). device: that onnxruntime runs on, see load. Checks, each the largest absolute error: logits, new_kv,
    exit_loop against the model in torch with the bundle's rounding of weights and cache; decode, the last 8 tokens fed one by one;
    reference, logits against the package open-mythos, or transformers, where it is installed and weights and cache are float32.
    A float16 or int8 cache rounds: the last bit of a float may move a cached number by a level, and with it a token's choice of an
    expert. There an error is that of the median token, that of new_kv a share of the row's largest magnitude, and the tolerances
    (TOLERANCES) are wider. Raises InputError where bundle and checkpoint do not belong together.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    runner = load(bundle, "onnxruntime", device=device)
    if ModelConfig.from_dict(runner.manifest.model) != checkpoint.config:
        raise InputError(
            f"{bundle}: was exported from another model than {checkpoint.source.name}; pass its own checkpoint"
        )
    if runner.manifest.quantization is not None:
        raise InputError(
            f"{bundle}: is quantized, so it differs from its checkpoint by design; judge it with `mythos-export eval`"
        )
    if runner.graph.cache_dtype not in TOLERANCES:
        raise InputError(
            f"{bundle}: its cache is {runner.graph.cache_dtype}, of which no tolerance is known; judge it with `mythos-export eval`"
        )
    depths = [int(check_n_loops(runner.graph, depth, 1)[0]) for depth in (loops or [None])]  # type: ignore[list-item]
    ids = _input_ids(runner, text, tokens)
    weight_dtype = runner.graph.weight_dtype
    decoder = load_decoder(checkpoint, max_loops=max(depths), weight_dtype=DTYPES[weight_dtype])
    exact = weight_dtype == runner.graph.cache_dtype == "float32"
    oracle = reference.reference_model(checkpoint) if reference.is_available(checkpoint) and exact else None
    checks: list[Check] = []
    for done, depth in enumerate(depths):
        if progress:
            progress("verifying", done, len(depths))
        checks += _checks(runner, decoder, oracle, ids, depth)
    if progress:
        progress("verifying", len(depths), len(depths))
    parity = Parity(
        f"torch {torch.__version__}" + (f", {reference.version(checkpoint)}" if oracle else ""), len(ids), tuple(checks)
    )
    if runner.device == "cpu":
        rewrite_manifest(Path(bundle), msgspec.structs.replace(runner.manifest, parity=parity))
    return parity


def _input_ids(runner: Runner, text: str | Path | None, tokens: int) -> list[int]:
    limit = runner.graph.max_seq_len
    if not _DECODED < tokens <= limit:
        raise InputError(f"tokens is {tokens}; expected {_DECODED + 1} to {limit}, the model's max_seq_len")
    if text is None:
        return np.random.default_rng(0).integers(0, runner.graph.vocab_size, tokens).tolist()  # type: ignore[no-any-return]
    ids: list[int] = []
    for document in read_documents(text):
        ids += runner.encode(document)
        if len(ids) >= tokens:
            return ids[:tokens]
    raise InputError(
        f"{text}: holds {len(ids)} tokens, fewer than the {tokens} asked for; pass --tokens {len(ids)} or a longer text"
    )


def _checks(runner: Runner, decoder: Any, oracle: Any, ids: list[int], depth: int) -> list[Check]:
    step = window_step(decoder.config, ids, depth, runner.graph.cache_dtype)
    got, want = runner.run_step(step), run_decoder(decoder, step)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(step.input_ids), n_loops=depth)[0].numpy() if oracle else None
    session = runner.session(1, depth)
    session.advance([ids[:-_DECODED]])
    decoded = np.stack([session.advance([[token]])[0][0] for token in ids[-_DECODED:]])
    rounds = runner.graph.cache_dtype != "float32"
    errors = {
        "logits": _largest(got.logits[0], want.logits[0]),
        "new_kv": _largest(_numbers(got, rounds), _numbers(want, rounds)),
        "exit_loop": _largest(got.exit_loop[0][:, None], want.exit_loop[0][:, None]),
        "decode": _largest(decoded, want.logits[0, -_DECODED:]),
    }
    if expected is not None:
        errors["reference"] = _largest(got.logits[0], expected)
    tolerances = TOLERANCES[runner.graph.cache_dtype]
    checks = []
    for name, of_tokens in errors.items():
        error = float(np.median(of_tokens) if rounds else of_tokens.max())
        error = error if np.isfinite(error) else float("inf")  # so that no comparison with a NaN passes by accident
        checks.append(Check(name, depth, error, tolerances[name], error <= tolerances[name]))
    return checks


def _largest(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Each token's largest absolute difference [T], of a and b [T, n]."""
    largest: NDArray[np.float64] = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(-1)
    return largest


def _numbers(output: StepOutput, rounds: bool) -> NDArray[np.float64]:
    """What each token's new rows stand for [T, slots * W]; where the cache rounds, as shares of the row's largest magnitude."""
    rows = output.new_kv[:, 0].astype(np.float64)
    if output.new_scale is not None:
        rows *= output.new_scale[:, 0, :, None]
    if rounds:
        rows /= np.maximum(np.abs(rows).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    return np.moveaxis(rows, 0, 1).reshape(rows.shape[1], -1)
