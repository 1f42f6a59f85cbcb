"""Chunks, ragged batches, rows of different depth and dirty cache rows change nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_export import reference
from mythos_export.checkpoint import load_checkpoint
from runtimes.backend import StepInput
from runtimes.runner import Runner

TOLERANCE = 1e-4


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 2048, n).tolist()


def all_logits(runner: Runner, ids: list[int], loops: int, chunk: int = 512) -> np.ndarray:
    return np.concatenate([part.logits for part in runner.session(1, loops, chunk).advance_scored([ids])])


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("loops", [1, 4, 9])
def test_chunked_prefill_equals_one_shot(runner: Runner, chunk: int, loops: int) -> None:
    ids = tokens(150)
    np.testing.assert_allclose(
        all_logits(runner, ids, loops, chunk), all_logits(runner, ids, loops), rtol=0, atol=TOLERANCE
    )


def test_ragged_batch_equals_each_alone(runner: Runner) -> None:
    rows = [tokens(n, seed=n) for n in (1, 5, 33, 200)]
    together = runner.session(4, 4, chunk=64)
    alone = [runner.session(1, 4) for _ in rows]
    for _ in range(5):
        logits, exit_loop = together.advance(rows)
        for b, (session, row) in enumerate(zip(alone, rows, strict=True)):
            expected, expected_exit = session.advance([row])
            np.testing.assert_allclose(logits[b], expected[0], rtol=0, atol=TOLERANCE)
            assert exit_loop[b] == expected_exit[0]
        rows = [[int(row)] for row in logits.argmax(-1)]


def test_rows_of_different_depth_equal_each_alone(runner: Runner) -> None:
    rows, depths = [tokens(n, seed=n) for n in (9, 30, 17, 4)], [1, 12, 3, 7]
    logits, exit_loop = runner.session(4, depths).advance(rows)
    for b, (row, depth) in enumerate(zip(rows, depths, strict=True)):
        expected, expected_exit = runner.session(1, depth).advance([row])
        np.testing.assert_allclose(logits[b], expected[0], rtol=0, atol=TOLERANCE)
        assert exit_loop[b] == expected_exit[0] <= depth
    together = runner.generate(rows, 24, n_loops=depths).complete()
    assert together.ids == [
        runner.generate(row, 24, n_loops=depth).complete().ids for row, depth in zip(rows, depths, strict=True)
    ]


def test_depth_may_fall_within_a_sequence(runner: Runner, shakespeare: Path) -> None:
    """As in the reference, whose cache also keeps every loop apart: 20 tokens at 8 loops, then some at 3."""
    model = reference.reference_model(load_checkpoint(shakespeare))
    ids, cache = tokens(26), {}
    session = runner.session(1, 8)
    session.advance([ids[:20]])
    session.lower_n_loops(3)
    with torch.no_grad():
        model(torch.tensor([ids[:20]]), n_loops=8, kv_cache=cache)
        for at in range(20, 26):
            expected = model(torch.tensor([[ids[at]]]), n_loops=3, kv_cache=cache, start_pos=at)
            logits, _ = session.advance([[ids[at]]])
            np.testing.assert_allclose(logits[0], expected[0, 0].numpy(), rtol=0, atol=TOLERANCE)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    depth=st.integers(1, 12),
    capacity=st.integers(24, 60),
    seq=st.integers(1, 6),
)
def test_rows_past_past_len_never_reach_a_result(
    runner: Runner, lengths: list[int], depth: int, capacity: int, seq: int
) -> None:
    """The same cache, its dead rows once zero, once NaN, once infinite: identical outputs, bit for bit."""
    graph, batch = runner.graph, len(lengths)
    random = np.random.default_rng(len(lengths) * 100 + depth)
    past_len = np.array(lengths, dtype=np.int64)
    past_kv = random.standard_normal((graph.slots(depth), batch, capacity, graph.cache_width), dtype=np.float32)
    dead = np.arange(capacity)[None, :] >= past_len[:, None]
    ids = random.integers(0, graph.vocab_size, (batch, seq))
    positions = np.tile(np.arange(seq), (batch, 1))
    n_loops = np.full(batch, depth, dtype=np.int64)
    results = []
    for filling in (0.0, np.nan, np.inf):
        past_kv[:, dead] = filling
        results.append(runner.run_step(StepInput(ids, past_len, past_kv, positions, n_loops)))
    for other in results[1:]:
        for name in other._fields:
            np.testing.assert_array_equal(getattr(results[0], name), getattr(other, name), err_msg=name)
    assert np.isfinite(results[0].logits).all()


def test_padding_may_stand_past_the_last_position(runner: Runner) -> None:
    """A short row beside one that ends at max_seq_len is padded beyond it; its result is its own."""
    longest = runner.graph.max_seq_len
    session = runner.session(2, 4)
    session.advance([tokens(longest - 1), tokens(longest - 20)])
    logits, _ = session.advance([tokens(1, 5), tokens(20, 6)])
    alone = runner.session(1, 4)
    alone.advance([tokens(longest - 1)])
    expected, _ = alone.advance([tokens(1, 5)])
    np.testing.assert_allclose(logits[0], expected[0], rtol=0, atol=TOLERANCE)
