"""The Runner on engines: the same tokens as on onnxruntime, what moves between host and device, several at once, and the end.

Where there is no GPU, fake_tensorrt stands for CUDA and TensorRT. Where there is one, tests that do not ask for the fake run on it,
with the bundle that MYTHOS_TEST_BUNDLE names: its engine is float32, for 4 sequences or more, and its loop count dynamic.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_engine import SEQ, add_engine
from fake_tensorrt import FakeTensorRT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes import device_memory
from runtimes.backend import Cancelled, StepInput
from runtimes.choosing import Chooser
from runtimes.errors import BackendError
from runtimes.runner import Runner, load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [2]]


# The same results as onnxruntime's


def test_greedy_tokens_are_onnxruntimes(pair: tuple[Runner, Runner]) -> None:
    on_gpu, on_cpu = pair
    for prompt in PROMPTS:
        got, want = ([*runner.generate(prompt, 40, ignore_eos=True)] for runner in pair)
        assert [token.id for token in got] == [token.id for token in want]
        assert [token.logprob for token in got] == pytest.approx([token.logprob for token in want], abs=1e-4)
    assert (on_gpu.backend, on_cpu.backend) == ("tensorrt", "onnxruntime")


def test_sampled_tokens_are_onnxruntimes(pair: tuple[Runner, Runner]) -> None:
    options = {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 3, "ignore_eos": True}
    got, want = (runner.generate(PROMPTS[0], 40, **options).complete().ids for runner in pair)
    assert got == want


def test_greedy_tokens_with_a_repetition_penalty_are_onnxruntimes(pair: tuple[Runner, Runner]) -> None:
    got, want = (
        runner.generate(PROMPTS[0], 30, repetition_penalty=1.3, ignore_eos=True).complete().ids for runner in pair
    )
    assert got == want


def test_a_ragged_batch_at_depths_of_its_own_is_onnxruntimes(pair: tuple[Runner, Runner]) -> None:
    got, want = (runner.generate(PROMPTS, 30, n_loops=[1, 4, 2, 3], ignore_eos=True).complete().ids for runner in pair)
    assert got == want


def test_sequences_that_end_early_leave_the_others_as_they_are(pair: tuple[Runner, Runner]) -> None:
    """Rows are dropped in the middle, the cache is laid anew."""
    whole = pair[1].generate(PROMPTS, 30, ignore_eos=True).complete().ids
    stops = [whole[0][4], whole[2][9]]
    got, want = (runner.generate(PROMPTS, 30, stop=stops, ignore_eos=True).complete() for runner in pair)
    assert got.ids == want.ids
    assert got.finish_reasons == want.finish_reasons
    assert "stop" in got.finish_reasons


def test_logits_of_every_position_are_onnxruntimes(pair: tuple[Runner, Runner]) -> None:
    ids = np.random.default_rng(0).integers(0, 2048, 75).tolist()
    got, want = (runner.score(ids, logits=True) for runner in pair)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_a_session_prefills_in_chunks_of_any_length(pair: tuple[Runner, Runner]) -> None:
    rows = [list(range(50, 120)), [9, 8, 7], list(range(300, 333))]
    want, want_exit = pair[1].session(3).advance(rows)
    for chunk in (1, 7, 512):
        session = pair[0].session(3, chunk=chunk)
        got, got_exit = session.advance(rows)
        np.testing.assert_allclose(got, want, atol=2e-4)
        np.testing.assert_array_equal(got_exit, want_exit)
        likeliest = session.advance_choosing([[1], [2], [3]], Chooser.greedy(3))
        again, _ = pair[0].session(3).advance([[*row, i + 1] for i, row in enumerate(rows)])
        np.testing.assert_array_equal(likeliest.tokens, again.argmax(-1))


def test_a_step_over_a_given_cache_is_onnxruntimes(pair: tuple[Runner, Runner]) -> None:
    graph, random = pair[0].graph, np.random.default_rng(1)
    slots = graph.slots(3 if graph.loops is None else graph.loops)
    step = StepInput(
        random.integers(0, graph.vocab_size, (2, 5)),
        np.array([4, 9]),
        random.standard_normal((slots, 2, 11, graph.cache_width)).astype(np.float32),
        np.array([[0, 4], [1, 2]]),
        np.array([3, 2]),
    )
    got, want = (runner.run_step(step) for runner in pair)
    np.testing.assert_allclose(got.logits, want.logits, atol=2e-4)
    np.testing.assert_allclose(got.new_kv, want.new_kv, atol=2e-4)
    np.testing.assert_array_equal(got.exit_loop, want.exit_loop)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), steps=st.integers(0, 20), data=st.data())
def test_any_sequences_grow_as_on_onnxruntime(
    pair: tuple[Runner, Runner], lengths: list[int], steps: int, data: st.DataObject
) -> None:
    """Prefills, decode steps, rows dropped, reordered and doubled, over caches that grow by a few rows."""
    on_gpu, on_cpu = pair
    random = np.random.default_rng(sum(lengths))
    sessions = [runner.session(len(lengths)) for runner in (on_gpu, on_cpu)]
    rows = [random.integers(0, 2048, length).tolist() for length in lengths]
    for step in range(steps + 1):
        got, want = (session.advance(rows)[0] for session in sessions)
        np.testing.assert_allclose(got, want, atol=5e-4)
        if step == steps // 2:
            kept = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=4))
            for session in sessions:
                session.keep(kept)
            rows = [rows[b] for b in kept]
        rows = [random.integers(0, 2048, 1).tolist() for _ in rows]
    for session in sessions:
        session.close()


@pytest.mark.parametrize(
    ("fake", "dtype", "cache_dtype", "n_plans"),
    [
        ("8.6.1", "float32", "float32", 6),
        ("8.6.1", "float16", "float32", 8),  # there, experts alone are float16, and the CUDA kernels compute them
        ("8.6.1", "bfloat16", "float32", 8),
        ("10.3.0", "float16", "float16", 6),
    ],
    indirect=["fake"],
)
def test_a_fixed_loop_count_in_either_dtype(
    shakespeare: Path,
    tmp_path: Path,
    fake: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    cache_dtype: str,
    n_plans: int,
) -> None:
    from mythos_export.export import export_bundle

    monkeypatch.setattr(device_memory, "BUCKET", 16)
    bundle = tmp_path / "bundle"
    export_bundle(shakespeare, bundle, loops=2)
    add_engine(bundle, dtype=dtype, version=fake.__version__, integers="int64" if fake.modern else "int32")
    on_cpu = load(bundle, "onnxruntime", native=False)
    with load(bundle, "tensorrt") as on_gpu:
        runs = [runner.generate(PROMPTS, 30, ignore_eos=True).complete().ids for runner in (on_gpu, on_cpu)]
        graph, random = on_gpu.graph, np.random.default_rng(0)
        rows = random.standard_normal((graph.slots(2), 1, 4, graph.cache_width))
        rows[:, :, 3:] = np.nan  # dead: read by engines, so never handed to them
        given = [
            np.array([[3]]),
            np.array([3]),
            rows,
            np.array([[0]]),
            np.array([7]),
        ]  # a depth that a fixed graph ignores
        steps = []
        for runner in (on_gpu, on_cpu):
            given[2] = rows.astype(runner.graph.cache_dtype)
            steps.append(runner.run_step(StepInput(*given)))
    assert dtype == "float16" or runs[0] == runs[1]
    assert steps[0].new_kv.dtype == cache_dtype
    assert len(fake.engines) == n_plans
    for name in ("logits", "new_kv"):
        np.testing.assert_allclose(
            getattr(steps[0], name), getattr(steps[1], name), atol=1e-4 if dtype == "float32" else 0.05
        )


def test_sequences_that_run_fewer_loops_from_some_token_on(pair: tuple[Runner, Runner]) -> None:
    """The slots of the loops left out hold zeros from there on, as in the graph."""
    got, want = [], []
    for runner, logits in zip(pair, (got, want), strict=True):
        session = runner.session(2, n_loops=[4, 3])
        logits.append(session.advance([[5, 6, 7], [8, 9]])[0])
        session.lower_n_loops([2, 1])
        logits += [session.advance([[step], [step + 1]])[0] for step in range(3)]
        session.close()
    np.testing.assert_allclose(got, want, atol=2e-4)


# What moves, and what is waited for


def test_a_token_costs_one_wait_and_a_few_bytes(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    graph, moved = runner_on_fake.graph, fake.cuda.moved
    generation = runner_on_fake.generate(PROMPTS[:3], 60, ignore_eos=True)
    for _ in range(6):  # the first two tokens of each
        next(generation)
    fake.cuda.calls.clear()
    moved.clear()
    for _ in range(30 * 3):
        next(generation)
    assert fake.cuda.waits == 30
    assert moved["cudaMemcpyHostToDevice"] <= 30 * 2048
    assert moved["cudaMemcpyDeviceToHost"] <= 30 * 2048
    new_rows = graph.slots(graph.default_loops) * 3 * graph.cache_width * 4
    # The last step's rows may still be on their way.
    assert moved["cudaMemcpyDeviceToDevice"] in (29 * new_rows, 30 * new_rows)


def test_sampling_brings_the_logits_of_the_last_position_only(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    fake.cuda.moved.clear()
    runner_on_fake.generate(PROMPTS[2], 5, temperature=1.0, seed=0, ignore_eos=True).complete()
    logits = runner_on_fake.graph.vocab_size * 4
    assert 5 * logits <= fake.cuda.moved["cudaMemcpyDeviceToHost"] <= 7 * (logits + 1024)


def test_a_growing_cache_stays_on_the_device(
    runner_on_fake: Runner, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "BUCKET", 16)
    fake.cuda.moved.clear()
    runner_on_fake.generate(PROMPTS[2], 100, ignore_eos=True).complete()
    assert fake.cuda.calls["cudaMalloc"] > 10
    assert fake.cuda.moved["cudaMemcpyHostToDevice"] + fake.cuda.moved["cudaMemcpyDeviceToHost"] < 102 * 4096


def test_few_tokens_run_on_their_own_plans(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    few, many = fake.engines[0], fake.engines[3]
    runner_on_fake.generate(PROMPTS[0], 4, ignore_eos=True).complete()
    assert few.shapes_run == [(1, 1)] * 3
    assert many.shapes_run == [(1, 7)]
    runner_on_fake.generate(PROMPTS[:2], 2, ignore_eos=True).complete()
    assert few.shapes_run[3:] == [(2, 1)]
    runner_on_fake.generate(PROMPTS[:3], 2, ignore_eos=True).complete()
    assert many.shapes_run[2:] == [(3, SEQ), (3, 13), (3, 1)]


def test_the_loops_plan_runs_once_a_loop(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    few = fake.engines[:3]
    for n_loops in (1, 5):
        runner_on_fake.generate(PROMPTS[0], 4, n_loops=n_loops, ignore_eos=True).complete()
        prelude, loop, coda = (len(engine.shapes_run) for engine in few)
        assert (loop, coda) == (n_loops * prelude, prelude)
        for engine in few:
            engine.shapes_run.clear()


def test_a_model_without_experts_has_one_form(own_bundle: Path, fake: FakeTensorRT) -> None:
    add_engine(own_bundle, few_tokens=None)
    with load(own_bundle, "tensorrt") as runner:
        got = runner.generate(PROMPTS[:2], 10, n_loops=[2, 3], ignore_eos=True).complete().ids
    assert got == load(own_bundle, "onnxruntime", native=False).generate(
        PROMPTS[:2], 10, n_loops=[2, 3], ignore_eos=True
    ).complete().ids  # fmt: skip
    assert len(fake.engines) == 3


def test_decode_is_captured_once_a_shape_and_again_when_the_cache_grows(
    runner_on_fake: Runner, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "BUCKET", 16)
    calls = fake.cuda.calls
    runner_on_fake.generate(PROMPTS[0], 40, ignore_eos=True).complete()
    # 7 tokens in 16 rows: 9 steps until they are full, and a step that fills a buffer lays the next one.
    captures = calls["cudaStreamBeginCapture"]
    assert captures == 3
    assert calls["cudaGraphLaunch"] == 39 - captures
    assert calls["cudaGraphExecDestroy"] >= captures - 1


def test_a_step_that_cannot_be_captured_runs_plainly(
    engine: Path, own_bundle: Path, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fails.add("capture")
    with load(own_bundle, "tensorrt") as runner:
        got = [runner.generate(PROMPTS[0], 10, ignore_eos=True).complete().ids for _ in range(2)]
    assert (
        got
        == [load(own_bundle, "onnxruntime", native=False).generate(PROMPTS[0], 10, ignore_eos=True).complete().ids] * 2
    )
    assert [record.message for record in caplog.records if "CUDA graph" in record.message] == [
        "decode runs without a CUDA graph: tensorrt 8.6.1 refuses to run a step: it was told to fail"
    ]
    assert not fake.cuda.graphs


# Several at once, and the end of it


def test_generations_in_turn_do_not_disturb_each_other(runner_on_fake: Runner, own_bundle: Path) -> None:
    on_cpu = load(own_bundle, "onnxruntime", native=False)
    generations = [runner_on_fake.generate(prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    for _ in range(20):
        for generation in generations:
            next(generation)
    assert [generation.ids for generation in generations] == [
        on_cpu.generate(prompt, 20, ignore_eos=True).complete().ids for prompt in PROMPTS
    ]


def test_two_runners_in_threads(engine: Path, own_bundle: Path) -> None:
    want = load(own_bundle, "onnxruntime", native=False).generate(PROMPTS[:2], 20, ignore_eos=True).complete().ids
    runners, results = [load(own_bundle, "tensorrt") for _ in range(2)], []

    def work(runner: Runner) -> None:
        for _ in range(3):
            results.append(runner.generate(PROMPTS[:2], 20, ignore_eos=True).complete().ids)

    threads = [threading.Thread(target=work, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [want] * 6
    for runner in runners:
        runner.close()


def test_closing_frees_everything(engine: Path, own_bundle: Path, fake: FakeTensorRT) -> None:
    runner = load(own_bundle, "tensorrt")
    session, generation = runner.session(2), runner.generate(PROMPTS[0], 20)
    session.advance([[1], [2]])
    next(generation)
    runner.close()
    runner.close()
    assert fake.cuda.allocated == 0
    with pytest.raises(BackendError, match="closed"):
        session.advance([[3], [4]])
    with pytest.raises(BackendError, match="the runner is closed; load the bundle again"):
        runner.generate(PROMPTS[0], 2).complete()


def test_what_is_forgotten_is_freed(engine: Path, own_bundle: Path, fake: FakeTensorRT) -> None:
    runner = load(own_bundle, "tensorrt")
    idle = fake.cuda.allocated
    generation = runner.generate(PROMPTS[0], 20, ignore_eos=True)
    next(generation)
    assert fake.cuda.allocated > idle
    generation.complete()
    grown = fake.cuda.allocated  # the staging stays
    runner.generate(PROMPTS[0], 20, ignore_eos=True).complete()
    assert fake.cuda.allocated == grown
    abandoned = runner.generate(PROMPTS[0], 20, ignore_eos=True)
    next(abandoned)
    del abandoned
    gc.collect()
    assert fake.cuda.allocated == grown
    del runner, generation
    gc.collect()
    assert (fake.cuda.allocated, len(fake.cuda.host)) == (0, 0)


def test_a_cancelled_generation_leaves_the_runner_as_it_was(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    whole = runner_on_fake.generate(PROMPTS[0], 20, ignore_eos=True).complete().ids
    before = fake.cuda.allocated
    generation = runner_on_fake.generate(PROMPTS[0], 20, ignore_eos=True)
    for _ in range(5):
        next(generation)
    generation.cancel()
    assert (list(generation), generation.finish_reasons, generation.ids) == ([], ["cancelled"], whole[:5])
    assert fake.cuda.allocated == before
    assert runner_on_fake.generate(PROMPTS[0], 20, ignore_eos=True).complete().ids == whole


def test_a_stopped_step_is_not_begun(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    session = runner_on_fake.session(1)
    session.advance([[1, 2, 3]])
    steps = sum(len(engine.shapes_run) for engine in fake.engines)
    session.stop.set()
    with pytest.raises(Cancelled):
        session.advance([[4]])
    assert sum(len(engine.shapes_run) for engine in fake.engines) == steps
    np.testing.assert_array_equal(session.past_len, [3])


def test_a_failed_step_changes_nothing(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    session, other = runner_on_fake.session(1), runner_on_fake.session(1)
    for each in (session, other):
        each.advance([[1, 2, 3]])
    fake.fails.add("step")
    with pytest.raises(BackendError, match=r"tensorrt 8\.6\.1 refuses to run a step: it was told to fail"):
        session.advance([[4]])
    fake.fails.clear()
    np.testing.assert_array_equal(session.advance([[4]])[0], other.advance([[4]])[0])
