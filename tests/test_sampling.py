"""Choosing tokens: random numbers, filters and draws against a slow reference."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtimes.errors import BackendError, InputError
from runtimes.sampling import Sampling, SplitMix64, log_softmax

quick = settings(max_examples=200, deadline=None, database=None, derandomize=True)


class Drawn:
    """A random number that is known beforehand."""

    def __init__(self, value):
        self.value = value

    def uniform(self):
        return self.value


def array(*logits):
    return np.array(logits, dtype=np.float32)


# Random numbers


def test_splitmix64_gives_the_published_numbers():
    random = SplitMix64(1234567)
    assert [random.next() for _ in range(5)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniform_takes_the_upper_53_bits():
    bits, floats = SplitMix64(99), SplitMix64(99)
    for _ in range(100):
        value = floats.uniform()
        assert value == (bits.next() >> 11) / 2**53
        assert 0 <= value < 1


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_seeds_wrap_at_64_bits(seed):
    assert SplitMix64(seed).next() == SplitMix64(seed + 2**64).next() == SplitMix64(seed - 2**64).next()


# Greedy and the repetition penalty


def test_greedy_takes_the_lowest_id_among_equals():
    assert Sampling().choose(array(1, 3, 3, 2, 3), [], SplitMix64(0)) == 1
    assert Sampling().choose(array(-1, -1), [], SplitMix64(0)) == 0


def test_greedy_draws_no_random_number():
    assert Sampling().choose(array(0, 1), [0], None) == 1


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once():
    penalty = Sampling(repetition_penalty=2.0)
    assert penalty.choose(array(4, 3), [0], SplitMix64(0)) == 1  # 4 / 2 < 3
    assert penalty.choose(array(4, 1.5), [0, 0, 0], SplitMix64(0)) == 0  # 2, not 0.5, however often it was seen
    assert penalty.choose(array(-1, -1.5), [0], SplitMix64(0)) == 1  # -2 < -1.5
    assert penalty.choose(array(4, 3), [], SplitMix64(0)) == 0


def test_choosing_leaves_the_logits_alone():
    logits = array(1, 2, 3)
    Sampling(temperature=0.5, top_k=2, repetition_penalty=1.5).choose(logits, [2], SplitMix64(0))
    assert logits.tolist() == [1, 2, 3]


# Filters and draws


def reference(logits, temperature, top_k=0, top_p=1.0, min_p=0.0, clear=lambda ok: None):
    """Candidates and their probabilities, most likely first, by the definitions and nothing else.

    clear: told whether each filter's choice is clear, or within rounding of another.
    """
    scaled = {token: float(logit) / temperature for token, logit in enumerate(logits)}
    order = sorted(scaled, key=lambda token: (-scaled[token], token))
    order = order[:top_k] if top_k else order
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    total = math.fsum(weights)
    kept = [(token, weight / total) for token, weight in zip(order, weights, strict=True)]
    if top_p < 1:
        sums = [math.fsum(p for _, p in kept[: n + 1]) for n in range(len(kept))]
        clear(all(abs(reached - top_p) > 1e-9 for reached in sums))
        kept = kept[: next((n + 1 for n, reached in enumerate(sums) if reached >= top_p), len(kept))]
    clear(min_p == 0 or all(abs(p - min_p * kept[0][1]) > 1e-9 for _, p in kept))
    kept = [(token, p) for token, p in kept if p >= min_p * kept[0][1]]
    total = math.fsum(p for _, p in kept)
    return [(token, p / total) for token, p in kept]


@quick
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=24),
    temperature=st.floats(0.5, 2),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 0.9)),
)
def test_filters_keep_exactly_the_candidates_of_the_reference(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    expected = reference(logits, temperature, top_k, top_p, min_p, assume)
    reached, draws = 0.0, []
    for token, p in expected:
        draws.append((reached + p / 2, token))  # the middle of its interval
        reached += p
    draws += [(0.0, expected[0][0]), (1 - 2**-53, expected[-1][0])]
    for value, token in draws:
        assert sampling.choose(array(*logits), [], Drawn(value)) == token


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 100}, [1, 2, 3, 4, 0]),
        ({"top_p": 0.25}, [1]),
        ({"top_p": 0.5}, [1, 2]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 1.0}, [1, 2, 3, 4]),
        ({"top_k": 3, "min_p": 0.5}, [1, 2, 3]),
    ],
)
def test_ties_go_to_the_lower_id(options, kept):
    logits = array(-200, 5, 5, 5, 5)  # exp(-205) is far below the last bit of a sum of four
    sampling = Sampling(temperature=1.0, **options)
    drawn = [sampling.choose(logits, [], Drawn((n + 0.5) / 400)) for n in range(400)]
    assert list(dict.fromkeys(drawn)) == [token for token in kept if token]


def test_a_draw_on_the_border_takes_the_next_candidate():
    """The first candidate whose cumulative probability exceeds the draw, not one that only reaches it."""
    quarters = [Sampling(1.0).choose(array(2, 2, 2, 2), [], Drawn(n / 4)) for n in range(4)]
    assert quarters == [0, 1, 2, 3]


def test_frequencies_match_the_probabilities():
    logits, draws, random = array(2, 1, 0.5, 0, -1, 1.5), 20_000, SplitMix64(7)
    sampling = Sampling(temperature=0.8)
    counts = Counter(sampling.choose(logits, [], random) for _ in range(draws))
    chi_square = sum((counts[token] - draws * p) ** 2 / (draws * p) for token, p in reference(logits, 0.8))
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def test_temperature_sharpens_towards_greedy():
    random = SplitMix64(3)
    assert {Sampling(temperature=0.01).choose(array(1, 2, 3, 2.5), [], random) for _ in range(200)} == {2}


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 1e-308, 5e-324])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature):
    for value in (0.0, 0.5, 1 - 2**-53):
        assert Sampling(temperature).choose(array(-30, 9, 30, 12), [], Drawn(value)) == 2


@pytest.mark.parametrize("logits", [[1.0, math.nan], [-math.inf, -math.inf], [math.inf, 1.0]])
def test_nothing_is_drawn_from_what_is_no_number(logits):
    with pytest.raises(
        BackendError, match="the model's logits are no numbers, so none can be drawn; export the bundle"
    ):
        Sampling(temperature=1.0).choose(np.array(logits, np.float32), [], SplitMix64(0))


def test_log_softmax_is_exact_for_large_logits():
    result = log_softmax(array(1000, 1000, -1000))
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, [-math.log(2), -math.log(2), -2000 - math.log(2)], rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "at least 0"),
        ("temperature", math.inf, "at least 0"),
        ("top_k", -1, "at least 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("min_p", math.nan, "from 0 to 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("repetition_penalty", -1.0, "above 0"),
        ("repetition_penalty", math.inf, "above 0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(runner, name, value, expected):
    for make in (Sampling, lambda **options: runner.generate("a", **options)):
        with pytest.raises(InputError, match=rf"{name} is {value}; expected .*{expected}"):
            make(**{name: value})
