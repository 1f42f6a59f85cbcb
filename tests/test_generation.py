"""Generated text as it is streamed, and sequences: their seeds, batches and ends."""

import threading

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtimes.choosing import Chosen
from runtimes.generation import StreamedText
from runtimes.onnxruntime_backend import OnnxRuntimeBackend

quick = settings(max_examples=200, deadline=None, database=None, derandomize=True)
PROMPT = "ROMEO:\nWhat say you to "


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
