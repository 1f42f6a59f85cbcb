"""The Runner on onnxruntime's CUDA provider: the same tokens as on the CPU, what moves between host and device, what is captured,
memory, and what is missing.

fake_onnxruntime, fake_cuda and fake_cuda_kernels stand for the GPU.
"""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_onnxruntime import FakeOnnxRuntime, add_cuda_form

from runtimes import cuda, device_memory, onnxruntime_cuda
from runtimes.backend import Cancelled, StepInput, StepOutput
from runtimes.choosing import Chooser
from runtimes.errors import BackendError, MemoryLimitError
from runtimes.runner import Runner, load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [2]]


def on_cpu(bundle: Path) -> Runner:
    return load(bundle, "onnxruntime", threads=1, native=False)


# The same results as the CPU's


@pytest.mark.parametrize("loops", ["fixed", "dynamic"])
def test_generations_are_the_cpus(gpu: FakeOnnxRuntime, loops: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(loops)
    depths = [4, 4, 4, 4] if loops == "fixed" else [1, 4, 2, 3]
    sampled = {"temperature": 0.9, "top_k": 50, "repetition_penalty": 1.1, "seed": 3}
    cpu = on_cpu(bundle)
    whole = cpu.generate(PROMPTS, 12, ignore_eos=True).complete().ids
    with load(bundle, "onnxruntime", device="cuda") as runner:
        assert (runner.backend, runner.device, runner.engine, runner.native) == ("onnxruntime", "cuda", None, True)
        for options in ({}, sampled, {"stop": [whole[0][4], whole[2][7]]}):  # rows end early in the last
            got, want = (
                [*each.generate(PROMPTS, 12, n_loops=depths, ignore_eos=True, **options)] for each in (runner, cpu)
            )
            assert [(token.index, token.id, token.text) for token in got] == [
                (token.index, token.id, token.text) for token in want
            ]
            assert [token.logprob for token in got] == pytest.approx([token.logprob for token in want], abs=1e-4)


def test_a_session_prefills_in_chunks_and_branches_as_on_the_cpu(
    runner_on_gpu: Runner, gpu: FakeOnnxRuntime, fixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks over caches that grow, then beams: rows doubled, reordered and dropped."""
    rows = [list(range(50, 120)), [9, 8, 7], list(range(300, 333))]
    want = on_cpu(fixed).session(3)
    expected = [want.advance(rows)]
    for kept in ([0, 0, 2, 1], [3, 1], [1, 0, 1]):
        want.keep(kept)
        expected += [want.advance([[step + row] for row in range(len(kept))]) for step in range(4)]
    for chunk in (7, 512):
        session = runner_on_gpu.session(3, chunk=chunk)
        got = [session.advance(rows)]
        for kept in ([0, 0, 2, 1], [3, 1], [1, 0, 1]):
            session.keep(kept)
            got += [session.advance([[step + row] for row in range(len(kept))]) for step in range(4)]
        for (logits, exit_loop), (want_logits, want_exit) in zip(got, expected, strict=True):
            np.testing.assert_allclose(logits, want_logits, atol=2e-4)
            np.testing.assert_array_equal(exit_loop, want_exit)
        session.close()
    monkeypatch.setattr(onnxruntime_cuda, "_LOGITS", 20 * 2048 * 4)  # of 20 positions
    ids = np.random.default_rng(0).integers(0, 2048, 75).tolist()
    np.testing.assert_allclose(runner_on_gpu.score(ids, logits=True), on_cpu(fixed).score(ids, logits=True), atol=2e-4)
    assert gpu.shapes_run[-4:] == [(1, 20)] * 3 + [(1, 15)]


def export(source: str | Path, target: Path, **options: object) -> Path:
    from mythos_export.export import export_bundle

    export_bundle(source, target, **options)
    return add_cuda_form(target)


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_a_cache_that_rounds(gpu: FakeOnnxRuntime, shakespeare: Path, tmp_path: Path, cache: str) -> None:
    """Rows of an int8 cache are appended with their scales; a given cache is run over as on the CPU."""
    bundle = export(shakespeare, tmp_path / "bundle", loops=2, cache_dtype=cache)
    with load(bundle, device="cuda") as runner:
        cpu = on_cpu(bundle)
        got, want = (each.generate(PROMPTS, 20, ignore_eos=True).complete().ids for each in (runner, cpu))
        assert got == want
        graph, random = runner.graph, np.random.default_rng(0)
        rows = (random.standard_normal((graph.slots(2), 2, 11, graph.cache_width)) * 50).astype(cache)
        scales = random.random((graph.slots(2), 2, 11)).astype(np.float32) / 50 if cache == "int8" else None
        tokens = random.integers(0, 2048, (2, 5))
        step = StepInput(tokens, np.array([4, 9]), rows, np.array([[0, 4], [1, 2]]), np.array([2, 2]), scales)
        for name, ours, theirs in zip(StepOutput._fields, runner.run_step(step), cpu.run_step(step), strict=True):
            assert (ours is None) == (theirs is None), name
            if ours is not None:
                assert ours.dtype == theirs.dtype
                np.testing.assert_allclose(ours, theirs, atol=1 if ours.dtype == np.int8 else 1e-3, err_msg=name)


def test_a_window_keeps_a_ring_of_rows(gpu: FakeOnnxRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill steps longer than the ring, then decode around it; one graph, as it never grows again."""
    config = {
        "architectures": ["MistralForCausalLM"], "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 97, "sliding_window": 8,
        "max_position_embeddings": 192, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    bundle = export(f"random:{tmp_path / 'config.json'}", tmp_path / "bundle")
    monkeypatch.setattr(device_memory, "BUCKET", 4)
    prompts = [list(range(3, 40)), [7], list(range(50, 61))]
    with load(bundle, device="cuda") as runner:
        sessions = [each.session(3, chunk=10) for each in (runner, on_cpu(bundle))]
        got, want = ([session.advance(prompts)[0]] for session in sessions)
        for kept in ([0, 1, 2], [2, 0, 0]):
            for session, logits in zip(sessions, (got, want), strict=True):
                session.keep(kept)
                logits += [session.advance([[step], [step + 1], [step + 2]])[0] for step in range(12)]
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert sessions[0]._sequences.capacity == 8
        assert gpu.cuda.calls["cudaStreamBeginCapture"] == 2  # once before keep, once after


# What moves, and what is captured


def test_a_token_costs_a_launch_a_wait_and_a_few_bytes(runner_on_gpu: Runner, gpu: FakeOnnxRuntime) -> None:
    calls, moved = gpu.cuda.calls, gpu.cuda.moved
    generation = runner_on_gpu.generate(PROMPTS[:3], 60, ignore_eos=True)
    for _ in range(3 * 4):  # prefill, and two steps before one is captured
        next(generation)
    assert calls["cudaStreamBeginCapture"] == 1
    calls.clear()
    moved.clear()
    for _ in range(3 * 50):
        next(generation)
    assert (gpu.cuda.waits, calls["cudaGraphLaunch"], calls["cudaStreamBeginCapture"]) == (50, 50, 0)
    # Nothing is copied on the device, and no logits to the host.
    assert moved["cudaMemcpyHostToDevice"] <= 50 * 5 * 256
    assert moved["cudaMemcpyDeviceToHost"] <= 50 * 3 * 256
    assert moved["cudaMemcpyDeviceToDevice"] == 0


def test_steps_are_captured_once_a_shape_and_cache(runner_on_gpu: Runner, gpu: FakeOnnxRuntime) -> None:
    """A generation asks for its rows at once, so that its graph holds to its end; a session that says nothing grows by buckets."""
    calls = gpu.cuda.calls
    runner_on_gpu.generate(PROMPTS[0], 40, ignore_eos=True).complete()
    assert (calls["cudaStreamBeginCapture"], calls["cudaGraphLaunch"]) == (1, 37)
    calls.clear()
    session = runner_on_gpu.session(1)
    session.advance([[1] * 10])
    for step in range(30):
        session.advance_choosing([[step]], Chooser.greedy(1))
    assert calls["cudaStreamBeginCapture"] == 3  # at 16 rows, 32, and 48
    generations = [runner_on_gpu.generate(prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    calls.clear()
    for _ in range(20):
        for generation in generations:  # in turn, each over its own cache
            next(generation)
    assert calls["cudaStreamBeginCapture"] == len(PROMPTS)
    session.close()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda gpu: gpu.fails.add("capture"), "onnxruntime could not run a step on the GPU: .*it was told to fail"),
        (lambda gpu: gpu.fails.add("graph"), "refuses it on the GPU: .*the model has memcpy nodes"),
        (lambda gpu: gpu.host.update({"past_len", "exit_loop"}), "the graph reads or makes exit_loop, past_len on the CPU"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_captured_runs_plainly(
    gpu: FakeOnnxRuntime,
    fixed: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[FakeOnnxRuntime], None],
    reason: str,
) -> None:
    spoil(gpu)
    want = on_cpu(fixed).generate(PROMPTS, 10, ignore_eos=True).complete().ids
    with load(fixed, device="cuda") as runner:
        for _ in range(2):
            assert runner.generate(PROMPTS, 10, ignore_eos=True).complete().ids == want
    (message,) = [record.message for record in caplog.records if "CUDA graph" in record.message]
    assert message.startswith("decode runs without a CUDA graph: ")
    assert re.search(reason, message)
    assert not gpu.cuda.graphs


def test_what_runs_slower_is_told_once(gpu: FakeOnnxRuntime, dynamic: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No graph where the loop count is an input, and nodes that fell to the CPU."""
    gpu.on_cpu = ["Gather", "Concat", "Gather"]
    for _ in range(2):
        with load(dynamic, device="cuda") as runner:
            runner.generate(PROMPTS[0], 8, ignore_eos=True).complete()
    nodes, graph = [record.message for record in caplog.records]
    assert nodes.endswith("decoder.cuda.onnx: 2 of 4 nodes run on the CPU, not on the GPU: 2 Gather")
    assert graph == (
        "decode runs without a CUDA graph: the bundle's loop count is an input, export it with --loops N for one"
    )
    assert gpu.cuda.calls["cudaStreamBeginCapture"] == 0


# Memory, and the end


def test_memory_is_planned_and_told(gpu: FakeOnnxRuntime, fixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mythos_export")
    with load(fixed, device="cuda", max_batch=2, max_context=100) as runner:
        memory, graph = runner.memory, runner.graph
        assert memory is not None
        assert memory["weights"] == (fixed / "weights.bin").stat().st_size
        assert memory["cache"] == graph.slots(4) * 2 * 112 * graph.cache_width * 4
        runner.generate(PROMPTS[:2], 5, ignore_eos=True).complete()
        session = runner.session(2, tokens=100)
        session.advance([[1] * 100] * 2)
        assert 0.95 * memory["needed"] <= gpu.cuda.allocated <= 1.02 * memory["needed"]
    assert gpu.cuda.allocated == 0
    assert "of device memory for 2 × 100 tokens (weights" in caplog.text


def test_too_little_memory(gpu: FakeOnnxRuntime, fixed: Path) -> None:
    weights = (fixed / "weights.bin").stat().st_size
    gpu.cuda.total = weights
    with pytest.raises(
        cuda.OutOfDeviceMemory, match=r"the bundle needs .* are missing; lower --max-context or the batch"
    ):
        load(fixed, device="cuda")
    gpu.cuda.total = 2**30
    with pytest.raises(MemoryLimitError, match=r"the weights take .*, more than the memory_limit of .* quantize"):
        load(fixed, device="cuda", memory_limit=weights - 1)
    with pytest.raises(MemoryLimitError, match=r"the bundle needs .*, more than the memory_limit of"):
        load(fixed, device="cuda", memory_limit=weights + 1)
    assert (gpu.cuda.allocated, gpu.sessions) == (0, [])
    with load(fixed, device="cuda", memory_limit=weights + 2**20) as runner:
        with pytest.raises(
            MemoryLimitError, match=r"the cache of 4 × 416 tokens takes .*would exceed the memory_limit"
        ):
            runner.generate(PROMPTS, 360)
        gpu.cuda.total = gpu.cuda.allocated + 100_000
        with pytest.raises(cuda.OutOfDeviceMemory, match=r"the cache of 1 × 367 tokens needs .*; run fewer or shorter"):
            runner.generate(PROMPTS[0], 360)
        gpu.cuda.total = 2**30
        session, other = runner.session(1), runner.session(1)
        for each in (session, other):
            each.advance([[1] * 16])
        gpu.cuda.allocations_left = 0
        for _ in range(2):  # nothing of what failed is counted as held
            with pytest.raises(cuda.OutOfDeviceMemory, match="the cache of 1 × 32 tokens needs"):
                session.advance([[2]])
        gpu.cuda.allocations_left = None
        np.testing.assert_array_equal(session.advance([[2]])[0], other.advance([[2]])[0])


def test_failed_and_stopped_steps_change_nothing(runner_on_gpu: Runner, gpu: FakeOnnxRuntime) -> None:
    session, other = runner_on_gpu.session(1), runner_on_gpu.session(1)
    for each in (session, other):
        each.advance([[1, 2, 3]])
    gpu.fails.add("step")
    with pytest.raises(BackendError, match=r"could not run a step on the GPU: .*it was told to fail"):
        session.advance([[4]])
    gpu.fails.clear()
    gpu.kernels.refuses = True
    with pytest.raises(
        BackendError, match=r"cannot run the cache's new rows: no kernel image is available \(error 999\)"
    ):
        session.advance([[4]])
    gpu.kernels.refuses = False
    session.stop.set()
    with pytest.raises(Cancelled):
        session.advance([[4]])
    session.stop.is_set = False
    np.testing.assert_array_equal(session.past_len, [3])
    np.testing.assert_array_equal(session.advance([[4]])[0], other.advance([[4]])[0])


def test_closing_and_forgetting_free_everything(gpu: FakeOnnxRuntime, fixed: Path) -> None:
    runner = load(fixed, device="cuda")
    session, generation = runner.session(2), runner.generate(PROMPTS[0], 20)
    session.advance([[1], [2]])
    next(generation)
    runner.close()
    runner.close()
    assert (gpu.cuda.allocated, gpu.cuda.graphs) == (0, {})
    with pytest.raises(BackendError, match="closed"):
        session.advance([[3], [4]])
    with pytest.raises(BackendError, match="closed"):
        runner.generate(PROMPTS[0], 2).complete()
    del runner, session, generation
    runner = load(fixed, device="cuda")
    next(runner.generate(PROMPTS[0], 20))
    del runner
    gc.collect()
    assert (gpu.cuda.allocated, len(gpu.cuda.host), gpu.cuda.streams) == (0, 0, {})
