"""Parity of a bundle with its checkpoint: onnxruntime against torch, output by output, loop count by loop count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

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

TOLERANCE = {"logits": 2e-4, "new_kv": 2e-4, "exit_loop": 0.0, "decode": 2e-4, "reference": 2e-4}
_DECODED = 8  # tokens fed one by one in the decode check


def verify_bundle(
    bundle: str | Path,
    source: str | Path | Checkpoint,
    *,
    text: str | Path | None = None,
    tokens: int = 256,
    loops: Sequence[int] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Parity:
    """Compares a bundle on onnxruntime with its checkpoint in torch and writes the figures into the manifest.

    text: file whose first `tokens` tokens are the input (default: random ids). loops: counts to check (default: the trained
    one, or the fixed one). Checks, each the largest absolute error: logits, new_kv, exit_loop against the model in torch with
    the bundle's rounding of the weights; decode, the last 8 tokens fed one by one; reference, logits against the package
    open-mythos where it is installed and the weights are float32. Raises InputError where the two do not belong together.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source)
    runner = load(bundle)
    if ModelConfig.from_dict(runner.manifest.model) != checkpoint.config:
        raise InputError(
            f"{bundle}: was exported from another model than {checkpoint.source.name}; pass its own checkpoint"
        )
    if runner.manifest.quantization is not None:
        raise InputError(
            f"{bundle}: is quantized, so it differs from its checkpoint by design; judge it with `mythos-export eval`"
        )
    depths = [int(check_n_loops(runner.graph, depth, 1)[0]) for depth in (loops or [None])]  # type: ignore[list-item]
    ids = _input_ids(runner, text, tokens)
    weight_dtype = runner.graph.weight_dtype
    decoder = load_decoder(checkpoint, max_loops=max(depths), weight_dtype=DTYPES[weight_dtype])
    oracle = reference.reference_model(checkpoint) if reference.is_available() and weight_dtype == "float32" else None
    checks: list[Check] = []
    for done, depth in enumerate(depths):
        if progress:
            progress("verifying", done, len(depths))
        checks += _checks(runner, decoder, oracle, ids, depth)
    if progress:
        progress("verifying", len(depths), len(depths))
    parity = Parity(
        f"torch {torch.__version__}" + (f", {reference.version()}" if oracle else ""), len(ids), tuple(checks)
    )
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
    step = window_step(decoder.config, ids, depth)
    got, want = runner.run_step(step), run_decoder(decoder, step)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(step.input_ids), n_loops=depth)[0].numpy() if oracle else None
    errors = {name: _error(getattr(got, name), getattr(want, name)) for name in StepOutput._fields}
    session = runner.session(1, depth)
    session.advance([ids[:-_DECODED]])
    decoded = [session.advance([[token]])[0][0] for token in ids[-_DECODED:]]
    errors["decode"] = _error(np.stack(decoded), want.logits[0, -_DECODED:])
    if expected is not None:
        errors["reference"] = _error(got.logits[0], expected)
    return [
        Check(name, depth, error, TOLERANCE[name], bool(error <= TOLERANCE[name])) for name, error in errors.items()
    ]


def _error(a: Any, b: Any) -> float:
    """Largest absolute difference; infinite where either holds a NaN, so that no comparison passes by accident."""
    error = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return error if np.isfinite(error) else float("inf")
