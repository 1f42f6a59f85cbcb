"""Runs a new engine beside onnxruntime: a compiler's mistakes show in results alone.

Shape letters: V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mythos_export.divergence import divergence
from runtimes.arrays import Float32
from runtimes.backends import open_backend
from runtimes.bundle import Manifest
from runtimes.device_memory import DeviceRequest
from runtimes.dtypes import STORAGE
from runtimes.engines import Engine
from runtimes.errors import BackendError
from runtimes.runner import Runner

# Most mean KL(onnxruntime ‖ engine) in nats: what roundings of the dtype cost, with room; a wrong result costs whole nats.
_LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_QUANTIZED_LIMIT = 5e-2  # onnxruntime rounds inputs where engines do not
_LENGTHS = (2, 33, 290)  # tokens: short, a chunk, and more than a cache has room for at first
_NEW = 4  # one-token steps after each


class Agreement(NamedTuple):
    """mean_kl: in nats, of the next token over the vocabulary; top1: share of positions where both find the same one likeliest;
    tokens: positions compared."""

    mean_kl: float
    top1: float
    tokens: int


def check_engine(folder: Path, manifest: Manifest, key: str, engine: Engine) -> Agreement:
    """Feeds random tokens to an engine of the bundle in folder and to onnxruntime: prompts of several lengths, a batch, one-token
    steps.

    Raises BackendError where they differ by more than the engine's dtype explains.
    """
    most = engine.max_context - _NEW
    batch = min(2, max(profile.batch.max for plan in engine.plans for profile in plan.profiles))
    lengths = sorted({max(1, min(length, most)) for length in _LENGTHS})
    random = np.random.default_rng(0)
    parts: list[tuple[np.ndarray, np.ndarray]] = []  # type: ignore[type-arg]

    def runner(backend: str, request: DeviceRequest) -> Runner:  # the bundle was checked when the build began
        return Runner(manifest, open_backend(backend, folder, manifest, None, None, request), None)

    on_gpu = DeviceRequest(key, batch, most + _NEW)
    with runner(engine.backend, on_gpu) as ours, runner("onnxruntime", DeviceRequest()) as oracle:
        for sequences, length in [*((1, length) for length in lengths), (batch, lengths[0] + 1)]:
            ids = random.integers(0, manifest.graphs[0].vocab_size, (sequences, length + _NEW)).tolist()
            wanted, found = (_logits(runner, ids, length) for runner in (oracle, ours))
            kl = divergence(wanted, found)
            parts.append((kl, wanted.argmax(-1) == found.argmax(-1)))
    kl, same = (np.concatenate(values) for values in zip(*parts, strict=True))
    agreement = Agreement(float(kl.mean()), float(same.mean()), len(kl))
    quantized = manifest.graphs[0].weight_dtype not in STORAGE
    _judge(engine, agreement, _QUANTIZED_LIMIT if quantized else _LIMITS[engine.dtype])
    return agreement


def _judge(engine: Engine, agreement: Agreement, limit: float) -> None:
    if not agreement.mean_kl <= limit:  # NaN is no agreement either
        raise BackendError(
            f"{engine.backend} {engine.version} computes something else than onnxruntime: mean KL {agreement.mean_kl:.2g} nats "
            f"over {agreement.tokens} tokens, at most {limit:g} expected of {engine.dtype}; the engine was not kept: try another "
            "--dtype or --optimization-level, or run with --backend onnxruntime"
        )


def _logits(runner: Runner, ids: Sequence[Sequence[int]], length: int) -> Float32:
    """Logits [positions, V] of every position of a prompt of `length` tokens, then of one-token steps."""
    session = runner.session(len(ids))
    parts = [chunk.logits for chunk in session.advance_scored([row[:length] for row in ids])]
    for at in range(length, len(ids[0])):
        parts.append(session.advance([[row[at]] for row in ids])[0])
    session.close()
    return np.concatenate(parts)
