"""Choosing tokens away from the host: the algorithm of the CUDA kernel, compiled for the host, against runtimes/sampling.py; what a
device is told."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.backend import Logits, chosen_of
from runtimes.choosing import Chooser
from runtimes.errors import BackendError
from runtimes.sampling import Sampling, SplitMix64

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
THREADS = 4


def compiled(target: Path, *options: str) -> Path:
    source, headers = HERE / "native" / "choosing.cc", HERE.parent / "runtimes" / "native" / "cuda"
    command = [COMPILER, "-std=c++17", "-O2", "-pthread", *options, "-I", headers, source, "-o", target]
    subprocess.run(list(map(str, command)), check=True)
    return target


class Settings(ctypes.Structure):
    """mythos::cuda::Choosing."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("vocab", "top_k")),
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    )


Choose = Callable[[Sampling, np.ndarray, list[int], SplitMix64], int]


@pytest.fixture(scope="module")
def choose(tmp_path_factory: pytest.TempPathFactory) -> Choose:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = ctypes.CDLL(str(compiled(tmp_path_factory.mktemp("choosing") / "choosing.so", "-shared", "-fPIC")))
    library.choose_on_host.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int]

    def call(sampling: Sampling, logits: np.ndarray, seen: list[int], random: SplitMix64) -> int:
        """As Sampling.choose; -1 where it raises."""
        chooser = Chooser(sampling, [seen], [random])
        given = Settings(
            len(logits),
            sampling.top_k,
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
        )
        state = chooser.random_states()
        bits = chooser.seen_bits(len(logits)) if sampling.repetition_penalty != 1 else None
        at = None if bits is None else bits.ctypes.data
        token = library.choose_on_host(ctypes.addressof(given), logits.ctypes.data, at, state.ctypes.data, THREADS)
        if token >= 0:
            chooser.drawn(np.array([0]))
            assert chooser.random_states() == state
        return int(token)

    return call


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 1.5, 30.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Of many shapes: spread, flat, with ties, with values next to each other and far apart."""
    size, random = draw(st.integers(1, 3000)), np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.standard_normal(size) * draw(st.sampled_from([0.0, 1e-6, 0.1, 3.0, 40.0]))
    kind = draw(st.sampled_from(["plain", "ties", "near", "some out"]))
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "near":
        logits = 5 + logits * 1e-6
    elif kind == "some out":
        logits[random.random(size) < 0.5] = -np.inf
        logits[random.integers(size)] = 1.0
    return logits.astype(np.float32)


@settings(deadline=None, max_examples=300)
@given(sampling=SAMPLINGS, logits=rows(), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_the_kernels_algorithm_takes_the_hosts_tokens(
    choose: Choose, sampling: Sampling, logits: np.ndarray, seed: int, data: st.DataObject
) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=5))
    want = sampling.choose(logits, seen, SplitMix64(seed))
    got = choose(sampling, logits, seen, SplitMix64(seed))
    if got != want:  # sums of so many likelihoods, in another order, decide by their last digits
        assert is_at_an_edge(sampling, logits, seen, seed), (got, want)


def is_at_an_edge(sampling: Sampling, logits: np.ndarray, seen: list[int], seed: int) -> bool:
    """Whether limits moved by a part in 10^9 give another token."""
    moved = set()
    for by in (-1e-9, 1e-9):
        near = Sampling(
            sampling.temperature,
            sampling.top_k,
            min(1.0, sampling.top_p * (1 + by)),
            min(1.0, sampling.min_p * (1 + by)),
            sampling.repetition_penalty,
        )
        for draw_by in (-1e-9, 1e-9):
            moved.add(near.choose(logits, seen, _Moved(seed, draw_by)))  # type: ignore[arg-type]
    return len(moved) > 1


class _Moved(SplitMix64):
    """Its draws, a little aside."""

    def __init__(self, seed: int, by: float) -> None:
        super().__init__(seed)
        self._by = by

    def uniform(self) -> float:
        return min(max(super().uniform() * (1 + self._by) + self._by, 0.0), 1.0)


def test_every_token_is_drawn_as_often_as_it_is_likely(choose: Choose) -> None:
    logits = np.log(np.array([0.1, 0.4, 0.25, 0.25], np.float32))
    random, counts = SplitMix64(3), np.zeros(4)
    for _ in range(2000):
        counts[choose(Sampling(1.0), logits, [], random)] += 1
    np.testing.assert_allclose(counts / 2000, [0.1, 0.4, 0.25, 0.25], atol=0.03)


def test_equals_stand_by_rising_id(choose: Choose) -> None:
    """Of a whole vocabulary of them, and of a few."""
    flat = np.zeros(70_000, np.float32)
    for top_k in (1, 3, 40_000):
        sampling = Sampling(1.0, top_k=top_k)
        tokens = {choose(sampling, flat, [], SplitMix64(seed)) for seed in range(30)}
        assert max(tokens) < top_k
        assert tokens == {sampling.choose(flat, [], SplitMix64(seed)) for seed in range(30)}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_told(choose: Choose, bad: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    assert choose(Sampling(1.0), logits, [], SplitMix64(0)) == -1
    assert choose(Sampling(1.0), np.full(3, -np.inf, np.float32), [], SplitMix64(0)) == -1


@needs_compiler
@pytest.mark.slow
def test_threads_do_not_race(tmp_path: Path) -> None:
    """Where the algorithm waits for all threads of a block."""
    program = compiled(tmp_path / "choosing", "-fsanitize=thread", "-g")
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "choosing ok\n"), result.stderr[-3000:]


# What a device is told


def test_seen_tokens_as_bits() -> None:
    seen = [[0, 31, 32, 32], [], [69]]
    bits = Chooser(Sampling(), seen, [SplitMix64(0)] * 3).seen_bits(70)
    assert bits.tolist() == [[1 | 1 << 31, 1, 0], [0, 0, 0], [0, 0, 1 << 5]]


def test_random_states_go_on_as_the_numbers_do() -> None:
    random = [SplitMix64(5), SplitMix64(2**64 - 1)]
    chooser = Chooser(Sampling(0.5), [[], []], random)
    ahead = chooser.random_states(draws=3)
    for _ in range(3):
        chooser.drawn(np.array([0, 1]))
    np.testing.assert_array_equal(chooser.random_states(), ahead)
    Chooser(Sampling(), [[], []], random).drawn(np.array([0, 1]))  # the likeliest are not drawn
    np.testing.assert_array_equal(chooser.random_states(), ahead)


def test_rows_whose_tokens_are_not_wanted_draw_nothing() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 1, 20)).astype(np.float32)
    random = [SplitMix64(seed) for seed in range(3)]
    chooser = Chooser(Sampling(1.0), [[]] * 3, random)
    before = chooser.random_states()
    chosen = chosen_of(Logits(logits, np.ones((3, 1), np.int64)), chooser, np.array([0, 2]))
    assert (chooser.random_states() != before).tolist() == [True, False, True]
    assert chosen.tokens[2] == Sampling(1.0).choose(logits[2, 0], [], SplitMix64(2))
    with pytest.raises(BackendError, match="no numbers"):
        chooser.choose(np.full((1, 20), np.nan, np.float32), np.array([1]))
