"""Choosing tokens: random numbers, filters and draws against a slow reference; streamed text and how sequences end."""

import math
import threading
from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtimes.choosing import Chosen
from runtimes.errors import BackendError, InputError
from runtimes.generation import StreamedText
from runtimes.onnxruntime_backend import OnnxRuntimeBackend
from runtimes.sampling import Sampling, SplitMix64, log_softmax

quick = settings(max_examples=200, deadline=None, database=None, derandomize=True)
PROMPT = "ROMEO:\nWhat say you to "


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


# Streamed text


def pieces(runner, ids, prompt="", stops=()):
    stream = StreamedText(runner._tokenizer, runner.encode(prompt) if prompt else [], stops)
    return [stream.add(token, n == len(ids) - 1) for n, token in enumerate(ids)], stream


ids_of_any_kind = st.one_of(
    st.lists(st.integers(0, 2047), min_size=1, max_size=16),
    st.lists(st.integers(1, 256), min_size=1, max_size=16),  # single bytes, mostly no UTF-8
)
prompts = st.sampled_from(["", PROMPT, "é€😀", " a b c d e f g h i j"])


@quick
@given(ids_of_any_kind, prompts)
def test_streamed_pieces_of_any_ids_are_their_decoded_text(runner, ids, prompt):
    out, stream = pieces(runner, ids, prompt)
    assert "".join(out) == runner.decode(ids) == stream.emitted


@quick
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), prompts)
def test_streamed_pieces_of_a_text_are_whole_characters(runner, text, prompt):
    out, _ = pieces(runner, runner.encode(text), prompt)
    assert "".join(out) == text
    assert "�" in text or not any("�" in piece for piece in out)


@quick
@given(ids_of_any_kind, prompts, st.data())
def test_a_stop_text_is_cut_and_never_shown(runner, ids, prompt, data):
    full = runner.decode(ids)
    start = st.integers(0, max(len(full) - 1, 0))
    spans = data.draw(st.lists(st.tuples(start, st.integers(1, 6)), min_size=1, max_size=3))
    stops = [full[at : at + length] or "x" for at, length in spans]
    out, stream = pieces(runner, ids, prompt, stops)
    text = "".join(out)
    assert text == stream.emitted
    assert stream.stopped == any(stop in full for stop in stops)
    assert full.startswith(text)
    assert not any(stop in text for stop in stops)
    assert not stream.stopped or any(full.startswith(stop, len(text)) for stop in stops)


def test_a_prompt_that_ends_within_a_character_is_not_shown_again(runner):
    """As when a generation that ended by length is continued with its ids."""
    first, *rest = runner.encode("€")
    ids = [*rest, *runner.encode(" and more")]
    stream = StreamedText(runner._tokenizer, [*runner.encode("before"), first], [])
    text = "".join(stream.add(token, n == len(ids) - 1) for n, token in enumerate(ids))
    assert text in ("€ and more", runner.decode(ids))


# Sequences: seeds, batches, ends


def test_streamed_tokens_agree_with_the_result(runner):
    generation = runner.generate(PROMPT, 30, temperature=1.0, seed=5, ignore_eos=True)
    tokens = list(generation)
    assert [token.id for token in tokens] == generation.ids
    assert "".join(token.text for token in tokens) == generation.text == runner.decode(generation.ids)
    assert all(token.logprob < 0 and token.index == 0 for token in tokens)
    assert generation.stats.new_tokens == 30
    assert generation.finish_reasons == ["length"]


def test_logprobs_are_those_of_score(runner):
    prompt = runner.encode(PROMPT)
    generation = runner.generate(prompt, 8, temperature=0.7, seed=2, ignore_eos=True)
    logprobs = [token.logprob for token in generation]
    scored = runner.score([*prompt, *generation.ids])[len(prompt) - 1 :]
    np.testing.assert_allclose(logprobs, scored, atol=1e-4)


def test_a_seed_repeats_and_another_differs(runner):
    def draw(seed):
        return runner.generate(PROMPT, 16, temperature=1.0, seed=seed, ignore_eos=True).complete().ids

    assert draw(11) == draw(11)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4


def test_a_fresh_seed_is_reported_and_repeats(runner):
    first, second = (runner.generate(PROMPT, 12, temperature=1.0, ignore_eos=True).complete() for _ in range(2))
    assert first.stats.seed != second.stats.seed
    again = runner.generate(PROMPT, 12, temperature=1.0, ignore_eos=True, seed=first.stats.seed).complete()
    assert again.ids == first.ids


def test_a_row_of_a_batch_is_the_single_run_with_its_seed(runner):
    batch = ["ROMEO:", PROMPT, "KING HENRY VI:\nO, ", "A"]
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 50}
    together = runner.generate(batch, seed=100, n_loops=[4, 2, 8, 4], **options).complete()
    for row, (prompt, loops) in enumerate(zip(batch, [4, 2, 8, 4], strict=True)):
        alone = runner.generate(prompt, seed=100 + row, n_loops=loops, **options).complete()
        assert together.ids[row] == alone.ids
        assert together.text[row] == alone.text
        assert together.finish_reasons[row] == alone.finish_reasons[0]


def test_rows_that_end_early_leave_the_others_alone(runner):
    batch = ["ROMEO:", "JULIET:", PROMPT]
    whole = runner.generate(batch, 12, ignore_eos=True).complete()
    stop = next(token for token in whole.ids[1] if token not in whole.ids[0] + whole.ids[2])
    cut = runner.generate(batch, 12, ignore_eos=True, stop=stop).complete()
    assert cut.finish_reasons == ["length", "stop", "length"]
    assert cut.ids[0] == whole.ids[0]
    assert cut.ids[1] == whole.ids[1][: whole.ids[1].index(stop) + 1]
    assert cut.ids[2] == whole.ids[2]


def test_a_stop_text_over_several_tokens_is_cut_from_the_text(runner):
    whole = runner.generate(PROMPT, 40, ignore_eos=True).complete()
    middle = runner.decode(whole.ids[10:14])
    stop = middle[1:-1]
    assert len(runner.encode(stop)) > 1
    streamed = list(generation := runner.generate(PROMPT, 40, ignore_eos=True, stop=["never\x00there", stop]))
    assert generation.finish_reasons == ["stop"]
    assert generation.text == whole.text[: whole.text.index(stop)]
    assert "".join(token.text for token in streamed) == generation.text
    assert generation.ids == whole.ids[: len(generation.ids)]


def test_a_stop_text_half_said_at_the_end_comes_out(runner):
    whole = runner.generate(PROMPT, 10, ignore_eos=True).complete()
    cut = runner.generate(PROMPT, 10, ignore_eos=True, stop=whole.text[-3:] + "\x00").complete()
    assert cut.finish_reasons == ["length"]
    assert cut.text == whole.text


def test_a_stop_id_ends_a_sequence(runner):
    whole = runner.generate(PROMPT, 20, ignore_eos=True).complete()
    stop = whole.ids[6]
    cut = runner.generate(PROMPT, 20, ignore_eos=True, stop=[2047, stop]).complete()
    assert cut.finish_reasons == ["stop"]
    assert cut.ids == whole.ids[: whole.ids.index(stop) + 1]


def always(generation, token):
    """Makes a generation see one choice."""
    choice = Chosen(np.array([token]), np.zeros(1), np.ones(1, dtype=np.int64))
    generation._session.advance_choosing = lambda step, chooser, more: choice
    return generation.complete()


def test_an_end_token_of_the_bundle_ends_a_sequence_unless_told_otherwise(runner):
    manifest = msgspec.structs.replace(runner.manifest, eos_token_ids=(0,))
    ending = type(runner)(manifest, runner._backend, runner._tokenizer)
    for made, ignore_eos, reasons in (
        (ending, False, ["eos"]),
        (ending, True, ["length"]),
        (runner, False, ["length"]),
    ):
        generation = always(made.generate(PROMPT, 3, ignore_eos=ignore_eos), token=0)
        assert generation.finish_reasons == reasons
        assert generation.ids == [0] * (1 if reasons == ["eos"] else 3)
        assert generation.text == ""


def test_a_special_token_named_as_stop_ends_a_sequence(runner):
    generation = always(runner.generate(PROMPT, 3, stop="<|endoftext|>"), token=0)
    assert generation.finish_reasons == ["stop"]
    assert generation.ids == [0]
    assert generation.text == ""


@pytest.mark.parametrize(("length", "new"), [(509, 4), (511, 2), (512, 1)])
def test_a_sequence_ends_at_the_models_last_position(runner, length, new):
    prompt = (runner.encode(PROMPT) * 100)[:length]
    generation = runner.generate(prompt, 50, n_loops=1, ignore_eos=True).complete()
    assert generation.finish_reasons == ["context"]
    assert len(generation.ids) == new


@pytest.mark.parametrize("when", ["before the step", "during the step"])
def test_cancelling_from_another_thread_stops_a_running_step(runner, monkeypatch, when):
    entered, cancelled, run = threading.Event(), threading.Event(), OnnxRuntimeBackend.run

    def noticed(self, *args):
        entered.set()
        if when == "before the step":
            assert cancelled.wait(30)
        return run(self, *args)

    monkeypatch.setattr(OnnxRuntimeBackend, "run", noticed)
    prompt = (runner.encode(PROMPT) * 50)[:500]
    generation = runner.generate([prompt] * 4, 10, n_loops=12, ignore_eos=True)
    worker = threading.Thread(target=generation.complete)
    worker.start()
    assert entered.wait(30)
    generation.cancel()
    cancelled.set()
    worker.join(30)
    assert not worker.is_alive()
    assert generation.finish_reasons == ["cancelled"] * 4
    assert generation.ids == [[], [], [], []]  # the first step, of 24,000 tokens and loops, was not waited for
    assert list(generation) == []
    after = runner.generate(PROMPT, 5, ignore_eos=True).complete()
    assert after.finish_reasons == ["length"]
    assert len(after.ids) == 5


def test_cancelling_keeps_what_was_generated(runner):
    whole = runner.generate(PROMPT, 10, ignore_eos=True).complete()
    generation = runner.generate(PROMPT, 10, ignore_eos=True)
    for _ in range(3):
        next(generation)
    generation.cancel()
    generation.cancel()
    assert list(generation) == []
    assert generation.finish_reasons == ["cancelled"]
    assert generation.ids == whole.ids[:3]
    assert generation.text == runner.decode(whole.ids[:3])


def test_cancelling_before_the_first_step_does_no_work(runner):
    generation = runner.generate(["a", "b"], 10)
    generation.cancel()
    assert generation.complete().ids == [[], []]
    assert generation.finish_reasons == ["cancelled", "cancelled"]


def test_cancelling_lets_out_the_text_held_back(runner):
    """A stop text half matched holds text back; a cancelled generation has no last token to bring it."""
    whole = runner.generate("ROMEO.", 12, ignore_eos=True).complete()
    generation = runner.generate("ROMEO.", 12, stop=whole.text[1:] + "never", ignore_eos=True)
    for _ in range(6):
        next(generation)
    generation.cancel()
    generation.complete()
    assert generation.finish_reasons == ["cancelled"]
    assert generation.text == runner.decode(generation.ids)
