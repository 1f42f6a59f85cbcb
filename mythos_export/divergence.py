"""How well a model predicts token ids, and how far its predictions are from another's, with standard errors.

Tokens of one window depend on each other, so a mean over tokens takes its error from windows as clusters, and the difference of
two models from their difference in every window (E. Miller, Adding Error Bars to Evals, arXiv:2411.00640, sections 2.2 and 4.2).
Windows may differ in length, which makes such a mean a ratio of two sums: Cochran, Sampling Techniques, 1977, theorem 2.5. The
errors of perplexities and of their ratio follow by the delta method: that of exp(m) is exp(m) times that of m.

Shape letters: T tokens of a window, V vocab_size, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtimes.arrays import Float32, Int64
from runtimes.errors import InputError
from runtimes.sampling import log_softmax

Float64 = NDArray[np.float64]
Progress = Callable[[str, int, int], None]
_BLOCK = 2**18  # logits turned into float64 at a time: 2 MB, within a core's cache
_MOST_NATS = 700.0  # beyond, exp leaves float64


class Scorer(Protocol):
    """A model that can be judged, wherever it runs."""

    def logits(self, ids: Sequence[int], n_loops: int) -> Float32:
        """Logits [T, V] float32 after each of T token ids, which are a sequence of their own, at n_loops loops."""
        ...


@dataclass(frozen=True)
class Quality:
    """How well a model predicts windows of tokens.

    perplexity: exp of the mean negative log-likelihood of a token. perplexity_stderr: None for a single window. bits_per_byte:
    the code length of the text, None where its bytes were not given. tokens: scored, all of a window but its first. windows: W.
    """

    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float | None
    tokens: int
    windows: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A model and the one it is held against, over the same tokens.

    perplexity_ratio: of the model to the other. kl_…: KL(against ‖ model) of the next token over the whole vocabulary, in nats:
    mean, median and 99.9 % quantile over tokens. top1_agreement: share of tokens where both find the same token likeliest. Standard
    errors are None for a single window.
    """

    model: Quality
    against: Quality
    perplexity_ratio: float
    perplexity_ratio_stderr: float | None
    kl_mean: float
    kl_mean_stderr: float | None
    kl_median: float
    kl_q999: float
    top1_agreement: float
    top1_agreement_stderr: float | None

    def to_dict(self) -> dict[str, Any]:
        """The model's fields, with all else under "against"."""
        plain = asdict(self)
        model = plain.pop("model")
        return {**model, "against": {**plain.pop("against"), **plain}}


def divergence(against: Float32, model: Float32) -> Float64:
    """KL(against ‖ model) [T] in nats, of logits [T, V] each: the sum of p (log p - log q) in float64, 0 where they are equal.

    Raises InputError where the shapes differ.
    """
    _check_shapes(against, model)
    result = np.empty(len(model))
    for rows in _blocks(model):
        result[rows] = _divergence(log_softmax(against[rows]), log_softmax(model[rows]))
    return result


def perplexity(
    model: Scorer,
    windows: Sequence[Sequence[int]],
    loops: Sequence[int],
    n_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Quality]:
    """The quality of a model at each loop count.

    windows: W sequences of at least two token ids, each scored on its own from its second token on. n_bytes: of the text behind
    the scored tokens. Raises InputError for windows that are too short, and for logits that are not finite.
    """
    counts = _counts(windows)
    results = {}
    for n_loops, each_window in _passes(windows, loops, progress):
        nats = [_nats_of_window(_logits(model, "the model", ids, n_loops), ids) for ids in each_window]
        results[n_loops] = _quality(np.array(nats), counts, n_bytes)
    return results


def compare(
    against: Scorer,
    model: Scorer,
    windows: Sequence[Sequence[int]],
    loops: Sequence[int],
    n_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[int, Comparison]:
    """A model held against another at each loop count. Arguments and errors are those of perplexity, and InputError where the
    vocabularies differ. Memory holds the logits of one window, and one number a token."""
    counts = _counts(windows)
    results = {}
    for n_loops, each_window in _passes(windows, loops, progress):
        parts = []
        for ids in each_window:
            expected = _logits(against, "the model held against", ids, n_loops)
            parts.append(_compare_window(expected, _logits(model, "the model", ids, n_loops), ids))
        results[n_loops] = _comparison(parts, counts, n_bytes)
    return results


class _Part(NamedTuple):
    """One window's sums over its scored tokens: negative log-likelihoods in nats, agreements; and the divergence of each."""

    against_nats: float
    nats: float
    agreed: int
    kl: Float64


def _compare_window(against: Float32, model: Float32, ids: Sequence[int]) -> _Part:
    _check_shapes(against, model)
    following = np.asarray(ids[1:])
    against, model = against[:-1], model[:-1]
    against_nats, nats, kl = 0.0, 0.0, np.empty(len(model))
    for rows in _blocks(model):
        log_p, log_q = log_softmax(against[rows]), log_softmax(model[rows])
        against_nats += _nats(log_p, following[rows])
        nats += _nats(log_q, following[rows])
        kl[rows] = _divergence(log_p, log_q)
    agreed = int((against.argmax(-1) == model.argmax(-1)).sum())
    return _Part(against_nats, nats, agreed, kl)


def _comparison(parts: Sequence[_Part], counts: Int64, n_bytes: int | None) -> Comparison:
    against_nats, nats = np.array([part.against_nats for part in parts]), np.array([part.nats for part in parts])
    ratio, ratio_stderr = _exp(*_mean(nats - against_nats, counts))
    kl_mean, kl_stderr = _mean(np.array([part.kl.sum() for part in parts]), counts)
    agreement, agreement_stderr = _mean(np.array([part.agreed for part in parts]), counts)
    median, q999 = np.quantile(np.concatenate([part.kl for part in parts]), (0.5, 0.999)).tolist()
    return Comparison(
        model=_quality(nats, counts, n_bytes),
        against=_quality(against_nats, counts, n_bytes),
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=ratio_stderr,
        kl_mean=kl_mean,
        kl_mean_stderr=kl_stderr,
        kl_median=median,
        kl_q999=q999,
        top1_agreement=agreement,
        top1_agreement_stderr=agreement_stderr,
    )


def _quality(nats: Float64, counts: Int64, n_bytes: int | None) -> Quality:
    """nats [W]: summed over each window's counts [W] scored tokens."""
    bits_per_byte = float(nats.sum()) / math.log(2) / n_bytes if n_bytes else None
    return Quality(*_exp(*_mean(nats, counts)), bits_per_byte, int(counts.sum()), len(counts))


def _mean(sums: NDArray[Any], counts: Int64) -> tuple[float, float | None]:
    """Mean over the tokens of all windows, given each window's sum [W] and count [W], and its standard error by windows."""
    n_windows, n_tokens = len(counts), int(counts.sum())
    mean = float(sums.sum()) / n_tokens
    if n_windows < 2:
        return mean, None
    squares = float(((sums - mean * counts) ** 2).sum())
    return mean, math.sqrt(squares * n_windows / (n_windows - 1)) / n_tokens


def _exp(mean: float, stderr: float | None) -> tuple[float, float | None]:
    """exp of an estimate in nats, with its standard error by the delta method."""
    if mean > _MOST_NATS:
        raise InputError(
            f"the model finds this text {mean:.0f} nats a token unlikely, too much for a perplexity; expected a trained model and "
            "its own tokenizer"
        )
    value = math.exp(mean)
    return value, None if stderr is None else value * stderr


def _divergence(log_p: Float64, log_q: Float64) -> Float64:
    """KL divergence along the last axis; rounding alone could make it negative, by 1e-16."""
    result: Float64 = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
    return result


def _nats(log_p: Float64, following: Int64) -> float:
    return -float(log_p[np.arange(len(following)), following].sum())


def _nats_of_window(logits: Float32, ids: Sequence[int]) -> float:
    following = np.asarray(ids[1:])
    return sum(_nats(log_softmax(logits[rows]), following[rows]) for rows in _blocks(logits[:-1]))


def _blocks(logits: Float32) -> Iterator[slice]:
    """Rows to turn into float64 at a time."""
    step = max(1, _BLOCK // logits.shape[-1])
    return (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step))


def _passes(
    windows: Sequence[Sequence[int]], loops: Sequence[int], progress: Progress | None
) -> Iterator[tuple[int, Iterator[Sequence[int]]]]:
    """Every loop count with an iterator over the windows that tells how far it is."""

    def each_window(before: int) -> Iterator[Sequence[int]]:
        for done, ids in enumerate(windows, before + 1):
            yield ids
            if progress:
                progress("scoring", done, len(windows) * len(loops))

    return ((n_loops, each_window(at * len(windows))) for at, n_loops in enumerate(loops))


def _counts(windows: Sequence[Sequence[int]]) -> Int64:
    """Scored tokens of each window, [W]."""
    counts = np.array([len(ids) - 1 for ids in windows], dtype=np.int64)
    if not counts.size or counts.min() < 1:
        raise InputError("there are no tokens to score; expected windows of at least two tokens each")
    return counts


def _logits(scorer: Scorer, name: str, ids: Sequence[int], n_loops: int) -> Float32:
    logits = scorer.logits(ids, n_loops)
    if not np.isfinite(logits).all():
        raise InputError(
            f"{name} gives NaN or infinite logits at {n_loops} loops; expected finite ones, check the training run or, if it is "
            "quantized, what it was made from"
        )
    return logits


def _check_shapes(against: Float32, model: Float32) -> None:
    if against.shape != model.shape:
        raise InputError(
            f"logits of shape {list(against.shape)} and {list(model.shape)}; expected two models of one vocabulary"
        )
