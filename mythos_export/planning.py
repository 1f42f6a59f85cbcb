"""What a model will need and can give before any of it exists: sizes, memory, and the speed that memory bandwidth allows.

A decode step reads every weight it uses once, and the cache; no program can be faster than that takes. Boards' figures are their
makers' data sheets'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mythos_export import footprint
from mythos_export.footprint import Storage
from runtimes.errors import InputError


class Board(NamedTuple):
    """memory: in bytes; bandwidth: of that memory, in bytes a second."""

    name: str
    memory: float
    bandwidth: float


BOARDS = (
    Board("Raspberry Pi 5, 16 GB", 16e9, 17.1e9),
    Board("Jetson Orin Nano, 8 GB", 8e9, 68e9),
    Board("Jetson Orin NX, 16 GB", 16e9, 102.4e9),
    Board("Jetson AGX Orin, 64 GB", 64e9, 204.8e9),
    Board("Jetson AGX Thor, 128 GB", 128e9, 273e9),
    Board("GeForce RTX 4090, 24 GB", 24e9, 1008e9),
    Board("H100 SXM, 80 GB", 80e9, 3350e9),
    Board("H200, 141 GB", 141e9, 4800e9),
)
_SCALE = 2 / 32  # a float16 scale for 32 numbers
STORED = {
    "float32": Storage(4.0),
    "float16": Storage(2.0),
    "int8": Storage(1.0 + _SCALE),
    "int4": Storage(0.5 + _SCALE),
}
_CACHE = {"float32": "float32"}  # else float16


def plan(source: str | Path, context: int | None = None) -> dict[str, Any]:
    """Describes a checkpoint, or random:VARIANT, of which nothing is read but its description.

    context: tokens of the one sequence that memory and speed are reckoned for (default: 4096, or the most the model has positions
    for). Raises what load_checkpoint raises, and InputError for a context that the model has no positions for.
    """
    from mythos_export.checkpoint import load_checkpoint  # needs torch

    checkpoint = load_checkpoint(source)
    config = checkpoint.config
    tokens = min(4096, config.max_seq_len) if context is None else context
    if not 1 <= tokens <= config.max_seq_len:
        raise InputError(f"context is {tokens}; expected 1 to {config.max_seq_len}, the model's positions")
    loops = config.loop.trained_loops if config.loop else 0
    forms = []
    for name, storage in STORED.items():
        weights = footprint.weight_bytes(config, storage)
        cache = footprint.cache_bytes(config, loops, tokens, _CACHE.get(name, "float16"))
        read = footprint.weight_bytes_read(config, loops, storage=storage) + cache
        forms.append(
            {
                "stored": name,
                "weight_bytes": int(weights),
                "cache_bytes": cache,
                "bytes_per_token": int(read),
                "boards": [
                    {
                        "board": board.name,
                        "missing_bytes": max(0, int(weights + cache - board.memory)),
                        "tokens_per_second_limit": board.bandwidth / read,
                    }
                    for board in BOARDS
                ],
            }
        )
    return {
        "source": checkpoint.source.name,
        "family": checkpoint.family.name,
        "parameters": footprint.parameters(config),
        "layers": len(config.layers),
        "loops": loops,
        "context": tokens,
        "forms": forms,
    }
