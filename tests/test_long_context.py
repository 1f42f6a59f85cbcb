"""Over a few thousand tokens what `make long-context` shows over 100,000."""

from __future__ import annotations

from pathlib import Path

import pytest
from long_context import measure


@pytest.mark.parametrize("window", [700, None])
def test_a_long_context_is_transformers_and_takes_the_cache_only(tmp_path: Path, window: int | None) -> None:
    figures = measure(tmp_path, 4000, 16, window)
    assert figures["difference"] < 2e-4
    assert figures["tokens_equal"]
    if figures["native"]:  # the portable bodies hold a chunk's scores
        assert figures["grown_bytes"] < figures["cache_bytes"] + 4 * 2**20
