"""The Runner on onnxruntime's CUDA provider: the same tokens as on the CPU, what moves between host and device, what is captured,
memory, and what is missing.

fake_onnxruntime, fake_cuda and fake_cuda_kernels stand for the GPU.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import cudaError_t
from fake_engine import add_engine
from fake_onnxruntime import FakeOnnxRuntime, add_cuda_form, install_onnxruntime
from fake_tensorrt import FakeTensorRT
from test_tensorrt_cli import call

from mythos_export.inspection import doctor
from runtimes import cuda, cuda_kernels, device_memory, onnxruntime_cuda, onnxruntime_cuda_session
from runtimes.backend import Cancelled, StepInput, StepOutput
from runtimes.choosing import Chooser
from runtimes.errors import BackendError, InputError, MemoryLimitError
from runtimes.runner import Runner, load
from runtimes.sampling import Sampling, SplitMix64
from runtimes.session import Session

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [2]]


@pytest.fixture
def gpu(fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> FakeOnnxRuntime:
    monkeypatch.setattr(device_memory, "BUCKET", 16)
    return install_onnxruntime(monkeypatch, fake.cuda, fake.kernels)


@pytest.fixture
def fixed(fixed_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle with its 4 loops unrolled, with a form for CUDA."""
    return add_cuda_form(Path(shutil.copytree(fixed_bundle, tmp_path / "fixed")))


@pytest.fixture
def dynamic(own_bundle: Path) -> Path:
    return add_cuda_form(own_bundle)


@pytest.fixture
def runner_on_gpu(gpu: FakeOnnxRuntime, fixed: Path) -> Iterator[Runner]:
    with load(fixed, device="cuda") as runner:
        yield runner


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


def test_tokens_are_drawn_on_the_device(runner_on_gpu: Runner, gpu: FakeOnnxRuntime) -> None:
    """No logits come to the host; of seen tokens a bit each goes to the device, where there is a penalty."""
    moved = gpu.cuda.moved
    for penalty, seen in ((1.0, 0), (1.2, runner_on_gpu.graph.vocab_size // 8)):
        moved.clear()
        gpu.cuda.calls.clear()
        options = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": penalty, "seed": 0, "ignore_eos": True}
        runner_on_gpu.generate(PROMPTS[2], 12, **options).complete()
        assert moved["cudaMemcpyDeviceToHost"] <= 13 * 3 * 256
        assert 12 * seen <= moved["cudaMemcpyHostToDevice"] <= 12 * (7 * 256 + seen)
        assert gpu.cuda.calls["cudaGraphLaunch"] >= 9


def test_no_number_is_drawn_from(runner_on_gpu: Runner, gpu: FakeOnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    find = gpu.kernels._draw

    def spoilt(call: Any) -> None:
        gpu.kernels._array(call.logits, (call.rows, call.vocab))[-1, 7] = np.nan
        find(call)

    monkeypatch.setattr(gpu.kernels, "_draw", spoilt)
    with pytest.raises(BackendError, match="the model's logits are no numbers"):
        runner_on_gpu.generate(PROMPTS, 3, temperature=1.0).complete()


def pending(gpu: FakeOnnxRuntime) -> bool:
    """Whether work is left on a stream."""
    return any(stream.work for stream in gpu.cuda.streams.values())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 20, "seed": 4}])
def test_the_next_step_is_under_way_before_a_token_is_read(
    runner_on_gpu: Runner, gpu: FakeOnnxRuntime, options: dict[str, Any]
) -> None:
    """But after the last one, so that none is computed in vain unless a sequence ends early."""
    generation = runner_on_gpu.generate(PROMPTS[0], 20, ignore_eos=True, **options)
    under_way = []
    for _ in generation:
        under_way.append(pending(gpu))
    assert under_way == [False] + [True] * 18 + [False]  # what follows a prefill is of another shape
    assert gpu.shapes_run == [(1, len(PROMPTS[0]))] + [(1, 1)] * 19
    gpu.shapes_run.clear()
    stop = generation.ids[10]
    stopped = runner_on_gpu.generate(PROMPTS[0], 20, ignore_eos=True, stop=stop, **options).complete()
    assert stopped.ids == generation.ids[: generation.ids.index(stop) + 1]
    assert len(gpu.shapes_run) == len(stopped.ids) + 1


def test_a_step_begun_in_vain_changes_nothing(runner_on_gpu: Runner, gpu: FakeOnnxRuntime, fixed: Path) -> None:
    """Tokens other than those chosen, logits, other rows, another session in between, other random numbers."""
    cpu = on_cpu(fixed)
    sessions, others = ([each.session(2) for each in (runner_on_gpu, cpu)] for _ in range(2))
    for one, other in zip(sessions, others, strict=True):
        one.advance([[5, 6, 7], [8]])
        other.advance([[9], [10, 11]])
    results: list[list[Any]] = [[], []]
    for session, other, told in zip(sessions, others, results, strict=True):
        chooser = Chooser(Sampling(1.0), [(), ()], [SplitMix64(1), SplitMix64(2)])

        def go(
            step: list[list[int]], which: Session = session, how: Chooser = chooser, told: list[Any] = told
        ) -> list[list[int]]:
            chosen = which.advance_choosing(step, how, more=True)
            told.append((chosen.tokens.tolist(), which.past_len.tolist(), chosen.exit_loop.tolist()))
            return [[token] for token in chosen.tokens.tolist()]

        step = go(go([[1], [2]]))
        step = go([[3], [4]])  # not what was chosen
        step = go(go(step))
        told.append(session.advance(step)[0].argmax(-1).tolist())
        step = go([[5], [6]], other)
        step = go(go([[7], [8]]), session)
        for _ in range(4):  # in turn
            go(step, other)
            step = go(step)
        chooser.random[0].next()
        step = go(step)
        greedy = Chooser.greedy(2)
        for _ in range(3):
            step = go(step, how=greedy)
        session.keep([1])
        told.append(session.advance_choosing([[3]], Chooser.greedy(1), more=True).tokens.tolist())
        session.close()
    assert results[0] == results[1]
    assert gpu.cuda.calls["cudaGraphLaunch"] > 5


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


# What is chosen, and what is missing


def no_provider(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.providers = ["CPUExecutionProvider"]


def no_operators(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(onnxruntime_cuda_session, "LIBRARY", bundle / "libmythos_ops_cuda.so")


def no_kernels(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda_kernels, "LIBRARY", bundle / "libmythos_cuda.so")


def old_kernels(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(gpu.kernels, "mythos_cuda_append_launch")


def no_module(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cuda._runtime.cache_clear()


def no_driver(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.cuda.problem = cudaError_t.cudaErrorInsufficientDriver


def no_cuda_libraries(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.loaded = ["CPUExecutionProvider"]


def refused(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.fails.add("open")


def cache_on_host(gpu: FakeOnnxRuntime, bundle: Path, patch: pytest.MonkeyPatch) -> None:
    gpu.host.add("past_kv")


MISSING = [
    (no_provider, "has no CUDAExecutionProvider; run: pip uninstall onnxruntime, then: pip install .* onnxruntime-gpu"),
    (no_operators, "the operators for CUDA are missing: .*libmythos_ops_cuda.so is not built; run: make cuda"),
    (no_kernels, "the CUDA kernels are missing: .*libmythos_cuda.so is not built; run: make cuda"),
    (old_kernels, "the CUDA kernels cannot be used: .*mythos_cuda_append_launch.*; run: make cuda"),
    (no_module, "cuda.bindings.runtime cannot be imported.*pip install cuda-bindings"),
    (no_driver, "no GPU can be used: .*install or update the NVIDIA driver"),
    (no_cuda_libraries, "cannot load its CUDAExecutionProvider: Failed to load libcublas.*onnxruntime-gpu.cuda,cudnn"),
    (refused, "refuses it on the GPU: .*no kernel for LatentAttention"),
    (cache_on_host, "reads its cache on the CPU; export again"),
]


@pytest.mark.parametrize(("spoil", "reason"), MISSING)
def test_what_is_missing_is_told(
    gpu: FakeOnnxRuntime, fixed: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], reason: str
) -> None:
    """And nothing else runs in its place."""
    spoil(gpu, fixed, monkeypatch)
    cuda_kernels.find.cache_clear()
    for backend in ("onnxruntime", "auto"):
        with pytest.raises(BackendError, match=reason):
            load(fixed, backend, device="cuda")
    gc.collect()
    assert gpu.cuda.allocated == 0
    assert load(fixed).device == "cpu"


def test_what_runs_where(gpu: FakeOnnxRuntime, own_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_cuda_form(own_bundle, None)
    with pytest.raises(BackendError, match=r"has no graph for onnxruntime on CUDA: it was made before .*int8 cache"):
        load(own_bundle, device="cuda")
    add_cuda_form(own_bundle)
    add_engine(own_bundle, few_tokens=None)
    for backend, device, expected in (
        ("auto", None, ("tensorrt", "cuda")),
        ("auto", "cuda", ("tensorrt", "cuda")),
        ("tensorrt", "cuda", ("tensorrt", "cuda")),
        ("onnxruntime", "cuda", ("onnxruntime", "cuda")),
        ("onnxruntime", None, ("onnxruntime", "cpu")),
        ("auto", "cpu", ("onnxruntime", "cpu")),
    ):
        with load(own_bundle, backend, device=device) as runner:
            assert (runner.backend, runner.device) == expected
    assert not caplog.records
    shutil.rmtree(own_bundle / "engines")
    assert load(own_bundle, device="cuda").backend == "onnxruntime"
    for options, reason in (
        ({"device": "gpu"}, 'device is "gpu"; expected one of cpu, cuda'),
        ({"backend": "tensorrt", "device": "cpu"}, "backend tensorrt runs on a GPU, device is cpu"),
        ({"device": "cpu", "engine": "x"}, "engine x is TensorRT's, device cpu uses none"),
        ({"device": "cuda", "native": False}, "on CUDA there are no portable bodies"),
    ):
        with pytest.raises((BackendError, InputError), match=reason):
            load(own_bundle, **options)


@pytest.mark.parametrize("graphs", [True, False])
def test_attention_alone(
    gpu: FakeOnnxRuntime, fixed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], graphs: bool
) -> None:
    """Over caches in turn; all memory is given back."""
    monkeypatch.setattr("mythos_export.bandwidth._BYTES", 2**20)
    monkeypatch.setattr("mythos_export.bench_attention._OnDevice._BYTES", 100_000)
    gpu.fails = set() if graphs else {"graph"}
    command = ("bench", fixed, "--attention", "8,300", "-b", 2, "-r", 1, "--device", "cuda")
    code, out, err = call(monkeypatch, capsys, *command, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [row["bytes"] for row in report["rows"]] == [2 * 8 * 4 * 48, 2 * 300 * 4 * 48]
    assert (report["environment"]["device"], report["environment"]["batch"]) == ("Fake GPU", 2)
    assert bool(gpu.cuda.calls["cudaGraphLaunch"]) is graphs
    gc.collect()
    assert (gpu.cuda.allocated, gpu.cuda.graphs) == (0, {})
    assert "share of copy bandwidth" in call(monkeypatch, capsys, *command)[1]
    for option, value, reason in (
        ("--cache-dtype", "int8", "has no kernel on CUDA"),
        ("-b", 0, "-b is 0; expected at"),
    ):
        code, _, err = call(monkeypatch, capsys, *command, option, value)
        assert code == 2
        assert reason in err


def test_the_command_line(
    gpu: FakeOnnxRuntime, fixed: Path, shakespeare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("mythos_export.bandwidth._BYTES", 2**20)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 4)
    commands = {
        "generate": ("-p", "To be", "-n", 8),
        "eval": ("--text", tmp_path / "text.txt"),
        "verify": (shakespeare, "--tokens", 20),
        "bench": ("-p", 8, "-n", 4, "-r", 1),
    }
    results = {}
    for device in ("cpu", "cuda"):
        for name, options in commands.items():
            gpu.shapes_run.clear()
            code, out, err = call(monkeypatch, capsys, name, fixed, *options, "--device", device, "--json")
            assert code == 0, err
            assert bool(gpu.shapes_run) == (device == "cuda")
            results[name, device] = json.loads(out)
    assert results["generate", "cuda"]["ids"] == results["generate", "cpu"]["ids"]
    assert [results["bench", device]["environment"]["device"] for device in ("cpu", "cuda")] == [None, "Fake GPU"]
    assert json.loads((fixed / "manifest.json").read_text())["parity"] == {
        name: results["verify", "cpu"][name] for name in ("oracle", "tokens", "checks")
    }
    health = doctor()
    assert health["can"]["run on an NVIDIA GPU with onnxruntime"]
    gpu.providers = ["CPUExecutionProvider"]
    assert "onnxruntime-gpu" in doctor()["missing"]["run on an NVIDIA GPU with onnxruntime"]
