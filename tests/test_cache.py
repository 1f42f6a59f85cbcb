"""The cache of a batch, against lists of rows; and the limit on what a runner holds."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_export.cli.app import app, memory_size
from runtimes.cache import Cache
from runtimes.errors import BackendError, InputError, MemoryLimitError
from runtimes.memory import MemoryBudget
from runtimes.runner import load

SLOTS, WIDTH = 3, 2
STEP = st.lists(st.integers(0, 300), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(STEP, min_size=1, max_size=6),
    window=st.sampled_from([0, 1, 7, 300, 500]),
    tokens=st.sampled_from([0, 1000]),
    dtype=st.sampled_from(["float32", "int8"]),
    kept=st.sampled_from([[0, 1, 2], [1, 2], [0, 2], [0], [2, 0, 1], [1, 1, 0, 2], [2, 2]]),
)
def test_rows_stand_at_their_position_in_the_ring(
    steps: list[list[int]], window: int, tokens: int, dtype: str, kept: list[int]
) -> None:
    """Sequences of all lengths, chunks longer than the window, sequences dropped, turned round and doubled halfway."""
    draw = np.random.default_rng(0)
    cache = Cache(SLOTS, 3, WIDTH, dtype, window=window, tokens=tokens)
    rows, scales = ([np.zeros((SLOTS, 0, *tail)) for _ in range(3)] for tail in ((WIDTH,), ()))
    for at, counts in enumerate(steps):
        if at == len(steps) // 2:
            cache.keep(kept)
            rows, scales = [rows[b] for b in kept], [scales[b] for b in kept]
        counts = [*counts, counts[0]][: len(rows)]
        new = draw.integers(-127, 128, (SLOTS, len(rows), max(counts), WIDTH)).astype(dtype)
        new_scales = draw.random(new.shape[:3], dtype=np.float32)
        cache.append(new, new_scales if dtype == "int8" else None, np.array(counts))
        rows = [np.concatenate([old, new[:, b, : counts[b]]], 1) for b, old in enumerate(rows)]
        scales = [np.concatenate([old, new_scales[:, b, : counts[b]]], 1) for b, old in enumerate(scales)]
    capacity = cache.rows.shape[2]
    assert cache.length.tolist() == [row.shape[1] for row in rows]
    assert capacity <= (window or capacity)
    for b, length in enumerate(cache.length.tolist()):
        live = np.arange(max(0, length - capacity), length)
        assert len(live) == min(length, window or length)
        np.testing.assert_array_equal(cache.rows[:, b, live % capacity], rows[b][:, live])
        if cache.scales is not None:
            np.testing.assert_array_equal(cache.scales[:, b, live % capacity], scales[b][:, live].astype(np.float32))


def test_growing_holds_one_slot_twice() -> None:
    """Not the whole cache."""
    slots, width = 16, 64
    cache = Cache(slots, 1, width, "float32")
    chunk = np.ones((slots, 1, 512, width), np.float32)
    tracemalloc.start()
    most = 0.0
    for _ in range(40):
        tracemalloc.reset_peak()
        cache.append(chunk, None, np.array([512]))
        most = max(most, tracemalloc.get_traced_memory()[1] / cache.rows.nbytes)
    tracemalloc.stop()
    assert most < 1 + 2 / slots


def test_a_budget_is_shared() -> None:
    budget = MemoryBudget(10_000, 2_000)
    first = budget.share()
    first.resize(5_000, "one")
    with pytest.raises(
        MemoryLimitError, match="two takes 3e-06 GB; with weights of 2e-06 GB and other caches of 5e-06"
    ):
        budget.share().resize(3_001, "two")
    first.resize(4_999, "one")
    budget.share().resize(3_001, "two")  # nobody keeps it
    first.resize(8_000, "one")
    del first
    budget.share().resize(8_000, "two")


def test_sequences_are_doubled_within_the_budget_only() -> None:
    """A prompt that several beams begin with: refused before anything is moved, and usable afterwards."""
    budget = MemoryBudget(SLOTS * 256 * WIDTH * 4 * 3, 0)
    cache = Cache(SLOTS, 1, WIDTH, "float32", budget=budget)
    cache.append(np.ones((SLOTS, 1, 5, WIDTH), dtype=np.float32), None, np.array([5]))
    with pytest.raises(MemoryLimitError, match=r"a cache of 4 × 256 tokens takes .* would exceed the memory_limit"):
        cache.keep([0, 0, 0, 0])
    assert (cache.rows.shape[1], cache.length.tolist()) == (1, [5])
    cache.keep([0, 0, 0])
    assert (cache.rows.shape[1], cache.length.tolist(), cache.rows[:, :, :5].min()) == (3, [5, 5, 5], 1)


def test_a_memory_limit_is_kept(tiny_bundle: Path) -> None:
    """Before anything is allocated, for weights, for what a generation will need and for what a session grows to."""
    with pytest.raises(MemoryLimitError, match=r"the weights take .* more than the memory_limit of 1e-06 GB; raise it"):
        load(tiny_bundle, "onnxruntime", memory_limit=1000)
    with pytest.raises(InputError, match="memory_limit is 0; expected at least 1"):
        load(tiny_bundle, memory_limit=0)
    weights = (tiny_bundle / "weights.bin").stat().st_size
    with load(tiny_bundle, "onnxruntime", threads=1, memory_limit=weights + 6 * 48 * 4 * 256) as runner:
        with pytest.raises(MemoryLimitError, match=r"a cache of 1 × 512 tokens takes .* would exceed the memory_limit"):
            runner.generate([1, 2, 3], 300, ignore_eos=True)
        runner.generate([1, 2, 3], 4, ignore_eos=True).complete()
        session = runner.session()
        session.advance([[1] * 250])
        with pytest.raises(MemoryLimitError, match="would exceed"):
            session.advance([[1] * 20])
        with pytest.raises(MemoryLimitError, match="other caches of"):
            runner.session()
        session.advance([[1]])  # it is as it was
        assert session.past_len.tolist() == [251]
        session.close()
        runner.session()
        with pytest.raises(BackendError, match="the sequences are closed; start new ones"):
            session.advance([[1]])


def test_max_memory_on_the_command_line(tiny_bundle: Path) -> None:
    for command in (["generate", "--ids", "1,2"], ["bench"], ["eval", "--text", str(tiny_bundle / "manifest.json")]):
        with pytest.raises(MemoryLimitError, match=r"the weights take .*, more than the memory_limit of 0.001 GB"):
            app([*command, str(tiny_bundle), "--max-memory", "1MB", "--backend", "onnxruntime"], standalone_mode=False)


def test_an_engine_keeps_to_a_memory_limit(own_bundle: Path, engine: Path) -> None:
    with pytest.raises(MemoryLimitError, match=r"the engine needs .*, more than the memory_limit of 1e-06 GB; lower"):
        load(own_bundle, "tensorrt", memory_limit=1000)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("300mb", 3 * 10**8), ("512MiB", 2**29), ("4096", 4096)],
)
def test_sizes_on_the_command_line(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "8 gigabytes", "1e9", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(
        InputError, match=r"--max-memory is .*; expected a size such as 8GB, 512MiB, or a number of bytes"
    ):
        memory_size(text)
