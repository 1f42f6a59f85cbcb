"""The Runner on engines: the same tokens as on onnxruntime, what moves between host and device, and every way not to run.

Where there is no GPU, tests.fake_tensorrt stands for CUDA and TensorRT. Where there is one, the tests that do not ask for the fake
run on it, with the engine of the bundle that MYTHOS_TEST_BUNDLE names (a bundle with a float32 engine for at least 4 sequences).
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes import backend as backend_module
from runtimes import cuda, device_memory, tensorrt_api
from runtimes.backend import StepInput
from runtimes.errors import BackendError
from runtimes.runner import Runner, load
from tests.fake_engine import SEQ, add_engine
from tests.fake_tensorrt import FakeCuda, FakeTensorRT

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [1]]


def clear_caches() -> None:
    tensorrt_api.find.cache_clear()
    cuda._runtime.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> FakeTensorRT:
    """Puts a fake CUDA and TensorRT where the real ones are imported from."""
    fake = FakeTensorRT(FakeCuda(), version)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake.cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(backend_module, "_said", set())
    clear_caches()
    return fake


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    """A fake of TensorRT 8.6."""
    yield install(monkeypatch, "8.6.1")
    gc.collect()
    clear_caches()


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to put engines into."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def engine(fake: FakeTensorRT, bundle: Path) -> Path:
    """An engine's folder, for TensorRT 8.6."""
    return add_engine(bundle)


def has_gpu() -> bool:
    try:
        cuda.device()
        tensorrt_api.find("tensorrt")
    except BackendError:
        return False
    return True


@pytest.fixture(scope="session")
def real_bundle() -> Path | None:
    """A bundle with a real engine, where it can run."""
    if not has_gpu():
        return None
    if "MYTHOS_TEST_BUNDLE" not in os.environ:
        pytest.skip("there is a GPU, but MYTHOS_TEST_BUNDLE names no bundle with an engine for it")
    return Path(os.environ["MYTHOS_TEST_BUNDLE"])


@pytest.fixture(params=["8.6.1", "10.3.0"])
def pair(
    real_bundle: Path | None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Runner, Runner]]:
    """A bundle on an engine, of fakes of two versions (or once of the real thing, where there is a GPU), and on onnxruntime."""
    if real_bundle is None:
        bundle, fake = request.getfixturevalue("bundle"), install(monkeypatch, request.param)
        monkeypatch.setattr(device_memory, "BUCKET", 16)
        add_engine(bundle, version=fake.__version__, integers="int64" if fake.modern else "int32")
    elif request.param == "8.6.1":
        bundle = real_bundle
    else:
        pytest.skip("the version that is installed runs, once")
    with load(bundle, "tensorrt") as on_gpu:
        yield on_gpu, load(bundle, "onnxruntime", threads=2, native=False)
    clear_caches()


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
        likeliest = session.advance_greedy([[1], [2], [3]])
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
    """Prefills, decode steps and rows dropped, over caches that grow by a few rows."""
    on_gpu, on_cpu = pair
    random = np.random.default_rng(sum(lengths))
    sessions = [runner.session(len(lengths)) for runner in (on_gpu, on_cpu)]
    rows = [random.integers(0, 2048, length).tolist() for length in lengths]
    for step in range(steps + 1):
        got, want = (session.advance(rows)[0] for session in sessions)
        np.testing.assert_allclose(got, want, atol=5e-4)
        if step == steps // 2 and len(rows) > 1:
            kept = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True).map(sorted))
            for session in sessions:
                session.keep(kept)
            rows = [rows[b] for b in kept]
        rows = [random.integers(0, 2048, 1).tolist() for _ in rows]
    for session in sessions:
        session.close()


# What moves, and what is waited for


@pytest.fixture
def runner_on_fake(engine: Path, bundle: Path) -> Iterator[Runner]:
    with load(bundle, "tensorrt") as runner:
        yield runner


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


def test_few_tokens_run_on_their_own_plan(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    few, many = fake.engines
    runner_on_fake.generate(PROMPTS[0], 4, ignore_eos=True).complete()
    assert few.shapes_run == [(1, 1)] * 3
    assert many.shapes_run == [(1, 7)]
    runner_on_fake.generate(PROMPTS[:2], 2, ignore_eos=True).complete()
    assert few.shapes_run[3:] == [(2, 1)]
    runner_on_fake.generate(PROMPTS[:3], 2, ignore_eos=True).complete()
    assert many.shapes_run[2:] == [(3, SEQ), (3, 13), (3, 1)]


@pytest.mark.parametrize("host_inputs", [(), ("n_loops",)])
def test_a_model_without_experts_has_one_plan(bundle: Path, fake: FakeTensorRT, host_inputs: tuple[str, ...]) -> None:
    add_engine(bundle, few_tokens=None, cuda_graph=not host_inputs, host_inputs=host_inputs)
    with load(bundle, "tensorrt") as runner:
        got = runner.generate(PROMPTS[:2], 10, n_loops=[2, 3], ignore_eos=True).complete().ids
    assert got == load(bundle, "onnxruntime", native=False).generate(
        PROMPTS[:2], 10, n_loops=[2, 3], ignore_eos=True
    ).complete().ids  # fmt: skip
    assert len(fake.engines) == 1
    assert bool(fake.cuda.calls["cudaGraphLaunch"]) != bool(host_inputs)


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
