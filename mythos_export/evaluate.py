"""How well a bundle predicts a text: perplexity and bits per byte, for each loop count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.text import Window, read_documents, windows
from runtimes.errors import InputError
from runtimes.runner import Runner
from runtimes.session import check_n_loops

WINDOW = 512  # tokens


@dataclass(frozen=True)
class Quality:
    """perplexity: exp of the mean negative log-likelihood a token. bits_per_byte: the same text's code length. tokens: scored."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    runner: Runner,
    text: str | Path,
    loops: Sequence[int] | None = None,
    max_tokens: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[int, Quality]:
    """Quality at each loop count (default: the trained one). Every document is cut into windows of 512 tokens (fewer where the
    model's positions end), each scored on its own from its second token on. Raises InputError before scoring anything."""
    depths = [int(check_n_loops(runner.graph, depth, 1)[0]) for depth in (loops or [None])]  # type: ignore[list-item]
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
    length = min(WINDOW, runner.graph.max_seq_len)
    parts = list(windows(read_documents(text), runner.encode, runner.decode, length, max_tokens))
    if not parts:
        raise InputError(f"{text}: too short to score; expected at least two tokens in a document")
    results: dict[int, Quality] = {}
    for at, depth in enumerate(depths):

        def tell(done: int, before: int = at * len(parts)) -> None:
            if progress:
                progress("scoring", before + done, len(parts) * len(depths))

        results[depth] = _quality(runner, parts, depth, tell)
    return results


def _quality(runner: Runner, parts: list[Window], depth: int, tell: Callable[[int], None]) -> Quality:
    nats, tokens = 0.0, 0
    for done, window in enumerate(parts, 1):
        nats -= float(runner.score(window.ids, depth).sum())
        tokens += len(window.ids) - 1
        tell(done)
    n_bytes = sum(window.scored_bytes for window in parts)
    return Quality(math.exp(nats / tokens), nats / math.log(2) / max(n_bytes, 1), tokens, len(parts))
