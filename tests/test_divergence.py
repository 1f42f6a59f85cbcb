"""Perplexity, KL divergence, agreement and their standard errors, against plain float64 arithmetic on models made of numbers."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_export.divergence import compare, divergence, perplexity
from runtimes.errors import InputError

quick = settings(max_examples=50, deadline=None, database=None, derandomize=True)


class Table:
    """A bigram model: the logits after a token are its row of a table, times the loop count."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table.astype(np.float32)

    def logits(self, ids: Sequence[int], n_loops: int) -> np.ndarray:
        return self.table[np.asarray(ids)] * np.float32(n_loops)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of one row, in float64, by the definition."""
    terms = [math.exp(float(x) - float(logits.max())) for x in logits]
    return np.array(terms) / math.fsum(terms)


def random_table(seed: int, vocab_size: int = 11, size: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, size, (vocab_size, vocab_size))


def random_windows(seed: int, n_windows: int, vocab_size: int = 11) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, vocab_size, draw.integers(2, 40)).tolist() for _ in range(n_windows)]


def test_divergence_by_hand() -> None:
    """Of (1/2, 1/2) from (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3; and it is not symmetric."""
    even, uneven = np.float32([[0, 0]]), np.log(np.float32([[1, 3]]))
    assert divergence(even, uneven)[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert divergence(uneven, even)[0] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)


@quick
@given(st.integers(1, 6), st.integers(1, 300), st.sampled_from([1e-4, 1.0, 50.0]), st.integers(0, 2**32))
def test_divergence_is_that_of_float64(n_tokens: int, vocab_size: int, size: float, seed: int) -> None:
    a, b = np.random.default_rng(seed).normal(0, size, (2, n_tokens, vocab_size)).astype(np.float32)
    got = divergence(a, b)
    assert got.dtype == np.float64
    for row, p, q in zip(got, map(probabilities, a), map(probabilities, b), strict=True):
        terms = [x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True) if x > 0]
        assert row == pytest.approx(math.fsum(terms), rel=1e-9, abs=1e-14)
    assert (got >= 0).all()
    assert (divergence(a, a) == 0).all()


def test_divergence_over_a_large_vocabulary() -> None:
    """Rows that are taken a few at a time give what each gives alone; a constant added to all logits changes nothing."""
    a, b = np.random.default_rng(0).integers(-9, 9, (2, 13, 50_000)).astype(np.float32)
    together = divergence(a, b)
    for row in range(len(a)):
        assert divergence(a[row : row + 1], b[row : row + 1])[0] == together[row]
    assert np.array_equal(divergence(a, b + 7), together)
    assert divergence(a[:0], b[:0]).shape == (0,)


@quick
@given(st.integers(2, 12), st.integers(0, 2**32))
def test_compare_is_plain_arithmetic(n_windows: int, seed: int) -> None:
    tables = random_table(seed), random_table(seed + 1)
    windows = random_windows(seed, n_windows)
    results = compare(Table(tables[0]), Table(tables[1]), windows, [1, 3], n_bytes=1000)
    assert set(results) == {1, 3}
    for n_loops, result in results.items():
        p, q = ([probabilities(row) for row in table.astype(np.float32) * np.float32(n_loops)] for table in tables)
        pairs = [(now, after) for ids in windows for now, after in pairwise(ids)]
        kl = [float((p[now] * (np.log(p[now]) - np.log(q[now]))).sum()) for now, _ in pairs]
        nats_p, nats_q = (math.fsum(-math.log(of[now][after]) for now, after in pairs) for of in (p, q))
        assert result.against.perplexity == pytest.approx(math.exp(nats_p / len(pairs)))
        assert result.model.perplexity == pytest.approx(math.exp(nats_q / len(pairs)))
        assert result.perplexity_ratio == pytest.approx(result.model.perplexity / result.against.perplexity)
        assert result.model.bits_per_byte == pytest.approx(nats_q / math.log(2) / 1000)
        assert result.kl_mean == pytest.approx(np.mean(kl))
        assert result.kl_median == pytest.approx(np.median(kl))
        assert result.kl_q999 == pytest.approx(np.quantile(kl, 0.999))
        assert result.top1_agreement == np.mean([p[now].argmax() == q[now].argmax() for now, _ in pairs])
        assert (result.model.tokens, result.model.windows) == (len(pairs), n_windows)
        alone = perplexity(Table(tables[1]), windows, [n_loops], n_bytes=1000)[n_loops]
        assert alone.to_dict() == pytest.approx(result.model.to_dict(), rel=1e-12)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = Table(random_table(0))
    result = compare(model, model, random_windows(1, 9), [2])[2]
    assert result.kl_mean == result.kl_mean_stderr == result.kl_median == result.kl_q999 == 0
    assert (result.perplexity_ratio, result.perplexity_ratio_stderr) == (1, 0)
    assert (result.top1_agreement, result.top1_agreement_stderr) == (1, 0)


def test_standard_errors_over_windows_of_one_length() -> None:
    """There they are those of the mean of W independent numbers, each a window's mean, paired for the ratio."""
    against, model = Table(random_table(0)), Table(random_table(0) + random_table(1, size=0.1))
    windows = np.random.default_rng(2).integers(0, 11, (16, 33)).tolist()
    result = compare(against, model, windows, [1])[1]

    def nats(table: Table, ids: list[int]) -> float:
        return float(np.mean([-math.log(probabilities(table.table[a])[b]) for a, b in pairwise(ids)]))

    def stderr(means: list[float]) -> float:
        return float(np.std(means, ddof=1)) / math.sqrt(len(means))

    ours, theirs = [nats(model, ids) for ids in windows], [nats(against, ids) for ids in windows]
    assert result.model.perplexity_stderr == pytest.approx(result.model.perplexity * stderr(ours))
    assert result.against.perplexity_stderr == pytest.approx(result.against.perplexity * stderr(theirs))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert result.perplexity_ratio_stderr == pytest.approx(result.perplexity_ratio * stderr(differences))
    assert result.perplexity_ratio_stderr < 0.2 * result.model.perplexity_stderr / result.model.perplexity
    kl = [float(divergence(against.logits(ids[:-1], 1), model.logits(ids[:-1], 1)).mean()) for ids in windows]
    assert result.kl_mean_stderr == pytest.approx(stderr(kl))


def test_standard_errors_foretell_the_scatter() -> None:
    """Over many texts whose windows differ in length and in difficulty, the perplexity scatters as its standard error says."""
    draw = np.random.default_rng(0)
    table = Table(random_table(0, size=1.0))

    def window() -> list[int]:
        """Few tokens of the vocabulary in each window, so that its tokens resemble each other."""
        return draw.choice(draw.integers(0, 11, 2), draw.integers(5, 60)).tolist()

    results = [perplexity(table, [window() for _ in range(40)], [1])[1] for _ in range(400)]
    scatter = np.std([result.perplexity for result in results], ddof=1)
    assert np.mean([result.perplexity_stderr for result in results]) == pytest.approx(scatter, rel=0.1)


def test_one_window_has_no_standard_error() -> None:
    result = compare(Table(random_table(0)), Table(random_table(1)), [[1, 2, 3]], [1])[1]
    assert result.model.perplexity_stderr is result.perplexity_ratio_stderr is result.kl_mean_stderr is None
    assert result.to_dict()["against"]["kl_mean_stderr"] is None
    assert result.model.bits_per_byte is None


def test_rows_of_an_array_are_windows() -> None:
    """As calibration.text.sample returns them."""
    models, ids = (Table(random_table(0)), Table(random_table(1))), np.random.default_rng(0).integers(0, 11, (4, 9))
    assert compare(*models, ids, [1]) == compare(*models, ids.tolist(), [1])


def test_logits_are_not_kept() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    class Watched(Table):
        def logits(self, ids: Sequence[int], n_loops: int) -> np.ndarray:
            logits = super().logits(ids, n_loops)
            alive.append(weakref.ref(logits))
            assert sum(ref() is not None for ref in alive) <= 4  # this window's, the last one's
            return logits

    compare(Watched(random_table(0)), Watched(random_table(1)), random_windows(0, 20), [1, 2])
    assert len(alive) == 80


def test_progress_counts_windows_of_all_loops() -> None:
    told: list[tuple[str, int, int]] = []
    perplexity(Table(random_table(0)), random_windows(0, 3), [1, 2], progress=lambda *at: told.append(at))
    assert told == [("scoring", done, 6) for done in range(1, 7)]


def test_bad_input() -> None:
    model, windows = Table(random_table(0)), [[1, 2, 3]]
    for nothing in ([], [[1, 2], [3]]):
        with pytest.raises(InputError, match="no tokens to score; expected windows of at least two tokens"):
            perplexity(model, nothing, [1])
    with pytest.raises(InputError, match=r"logits of shape \[3, 12\] and \[3, 11\]; expected two models of one voc"):
        compare(Table(random_table(0, 12)), model, windows, [1])
    with pytest.raises(InputError, match=r"logits of shape \[2, 3\] and \[2, 4\]"):
        divergence(np.zeros((2, 3), dtype=np.float32), np.zeros((2, 4), dtype=np.float32))
    for value in (math.nan, math.inf, -math.inf):
        broken = Table(np.where(np.arange(11) == 4, value, random_table(0)))
        with pytest.raises(InputError, match="the model gives NaN or infinite logits at 1 loops"):
            perplexity(broken, windows, [1])
        with pytest.raises(InputError, match="the model held against gives NaN or infinite logits"):
            compare(broken, model, windows, [1])
    with pytest.raises(InputError, match="finds this text 1000 nats a token unlikely"):
        perplexity(Table(1000 * np.eye(11)), windows, [1])
