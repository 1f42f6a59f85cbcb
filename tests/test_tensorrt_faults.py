"""Engines that cannot be used, memory that is not there, requests that go too far: what is said, and what runs instead."""

from __future__ import annotations

import gc
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from fake_cuda import cudaError_t
from fake_engine import BATCH, SEQ, add_engine, flip, rehash, rewrite
from fake_tensorrt import FakeTensorRT

from runtimes import cuda, device_memory
from runtimes.backend import StepInput
from runtimes.engine_folder import read_engine
from runtimes.errors import BackendError, BundleError, InputError
from runtimes.runner import Runner, load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [2]]


# Memory


def test_memory_is_planned_and_told(
    engine: Path, own_bundle: Path, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mythos_export")
    with load(own_bundle, "tensorrt", max_batch=2, max_context=100) as runner:
        memory, graph = runner.memory, runner.graph
        assert memory is not None
        assert memory["cache"] == graph.slots(graph.default_loops) * 2 * 256 * graph.cache_width * 4
        assert memory["free"] == fake.cuda.total
        runner.generate(PROMPTS[:2], 60, ignore_eos=True).complete()
        session = runner.session(2)
        session.advance([[1] * 60] * 2)
        # What is allocated is what was planned, but for the plans themselves, which the fake has no memory for.
        planned = memory["needed"] - memory["plans"]
        assert 0.95 * planned <= fake.cuda.allocated <= 1.02 * planned
    assert "of device memory for 2 × 100 tokens (weights" in caplog.text
    assert load(own_bundle, "onnxruntime").memory is None


@pytest.mark.parametrize("missing", ["planned", "allocated"])
def test_too_little_device_memory(
    engine: Path, own_bundle: Path, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    if missing == "planned":
        fake.cuda.total = 1_000_000
        expected = (
            r"needs .* of device memory for 1 × 512 tokens .* 1.00 MB are free: .* MB are missing; lower --max-context"
        )
    else:
        fake.cuda.allocations_left = 1  # another program took the rest meanwhile
        expected = r"device memory: .* needs .*, 1.07 GB are free"
    with pytest.raises(cuda.OutOfDeviceMemory, match=expected):
        load(own_bundle, "tensorrt")
    gc.collect()
    assert fake.cuda.allocated == 0
    fake.cuda.allocations_left = None if missing == "planned" else 1
    assert load(own_bundle).backend == "onnxruntime"
    assert "onnxruntime runs instead: " in caplog.text


def test_a_cache_that_cannot_grow_leaves_the_sequences_usable(
    runner_on_fake: Runner, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "BUCKET", 16)
    session, other = runner_on_fake.session(1), runner_on_fake.session(1)
    for each in (session, other):
        each.advance([[1] * 16])
    fake.cuda.allocations_left = 0
    with pytest.raises(cuda.OutOfDeviceMemory, match="the cache of 1 × 32 tokens needs"):
        session.advance([[2]])
    np.testing.assert_array_equal(session.past_len, [16])
    fake.cuda.allocations_left = None
    np.testing.assert_array_equal(session.advance([[2]])[0], other.advance([[2]])[0])


def test_a_request_whose_cache_will_not_fit_is_refused_at_once(runner_on_fake: Runner, fake: FakeTensorRT) -> None:
    fake.cuda.total = fake.cuda.allocated + 900_000
    with pytest.raises(cuda.OutOfDeviceMemory, match=r"the cache of 4 × 405 tokens needs .*; run fewer or shorter"):
        runner_on_fake.generate(PROMPTS, 360)
    runner_on_fake.generate(PROMPTS[0], 5).complete()


# Requests beyond the engine


def test_requests_beyond_the_profiles_name_the_limit(own_bundle: Path, fake: FakeTensorRT) -> None:
    add_engine(own_bundle, max_context=64)
    with load(own_bundle, "tensorrt") as runner:
        with pytest.raises(
            InputError, match=r"batch is 5; the engine .* takes 1 to 4.*`mythos-export build --max-batch 5`"
        ):
            runner.generate([[1]] * 5)
        with pytest.raises(
            InputError, match=r"70 tokens a sequence; .* takes up to 64.*`mythos-export build --max-context 70`"
        ):
            runner.generate([1] * 70)
        session = runner.session(1)
        session.advance([[1] * 60])
        with pytest.raises(InputError, match="66 tokens a sequence"):
            session.advance([[1] * 6])
        session.advance([[1] * 4])
        ended = runner.generate([1] * 50, 40, ignore_eos=True).complete()
        assert (ended.finish_reasons, len(ended.ids)) == (["context"], 15)
        graph = runner.graph
        step = StepInput(
            np.ones((1, SEQ + 1), np.int64),
            np.zeros(1, np.int64),
            np.zeros((graph.slots(4), 1, 8, graph.cache_width), np.float32),
            np.zeros((1, 1), np.int64),
            np.array([4]),
        )
        with pytest.raises(
            InputError, match=r"a step of batch 1, seq 33, .* is outside the engine's profiles .*--max-seq"
        ):
            runner.run_step(step)
    for option, value in (("max_batch", BATCH + 1), ("max_context", 65)):
        with pytest.raises(InputError, match=f"build --{option.replace('_', '-')} {value}"):
            load(own_bundle, "tensorrt", **{option: value})
        with pytest.raises(InputError, match=f"{option} is 0; expected at least 1"):
            load(own_bundle, "tensorrt", **{option: 0})


# Which engine, and why none


def no_driver(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    fake.cuda.problem = cudaError_t.cudaErrorInsufficientDriver


def no_module(name: str) -> Callable[[FakeTensorRT, Path, pytest.MonkeyPatch], None]:
    return lambda fake, folder, patch: patch.setitem(sys.modules, name, None)


def another_gpu(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    fake.cuda.device_name = "Other GPU"


def another_capability(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    fake.cuda.capability = (8, 7)


def another_version(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    fake.__version__ = "8.6.2"


def another_graph(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    rewrite(folder, graph_sha256="0" * 64)


def other_weights(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    rewrite(folder, weights_sha256={"weights.bin": "0" * 64})


def a_flipped_byte(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    flip(folder / "many_tokens.loop.0.plan")


def a_foreign_plan(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    flip(folder / "many_tokens.loop.0.plan", at=0)
    rehash(folder)


def a_missing_plan(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "many_tokens.loop.0.plan").unlink()


def a_short_plan(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    path = folder / "many_tokens.loop.0.plan"
    path.write_bytes(path.read_bytes()[:-1])


def a_linked_plan(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    path = folder / "many_tokens.loop.0.plan"
    path.symlink_to(path.rename(folder.parent / "elsewhere"))


def a_linked_engine(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    folder.symlink_to(folder.rename(folder.parent.parent / "elsewhere"))


def linked_engines(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    home = folder.parent
    home.symlink_to(home.rename(home.parent / "elsewhere"))


def damaged_metadata(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    path = folder / "engine.json"
    path.write_text(path.read_text()[:-10])


def a_path_that_leaves(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    plan = read_engine(folder).plans[0]
    rewrite(folder, plans=(msgspec.structs.replace(plan, file="../many_tokens.loop.0.plan", form="many_tokens"),))


def a_weight_outside(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    first, *rest = read_engine(folder).weights
    rewrite(folder, weights=(msgspec.structs.replace(first, offset=2**40), *rest))


def a_refused_plan(fake: FakeTensorRT, folder: Path, patch: pytest.MonkeyPatch) -> None:
    fake.refuse = True


REASONS = [
    (
        no_driver,
        "no GPU can be used: .*cudaErrorInsufficientDriver.*; install or update the NVIDIA driver",
        BackendError,
    ),
    (no_module("cuda.bindings.runtime"), "cuda.bindings.runtime cannot be imported.*pip install", BackendError),
    (no_module("tensorrt"), "module tensorrt cannot be imported.*pip install 'mythos-export.tensorrt.'", BackendError),
    (another_gpu, "built on Fake GPU, this GPU is Other GPU; build one here with `mythos-export build", BackendError),
    (another_capability, r"built for compute capability 9.0, this GPU \(Fake GPU\) has 8.7", BackendError),
    (another_version, "built with tensorrt 8.6.1, 8.6.2 is installed", BackendError),
    (another_graph, "stale: decoder.onnx is not the graph it was built from; build it again", BundleError),
    (other_weights, "stale: weights.bin does not hold the weights it was built from", BundleError),
    (
        a_flipped_byte,
        "many_tokens.loop.0.plan: sha256 .* does not match engine.json's .*: the file was changed",
        BundleError,
    ),
    (
        a_foreign_plan,
        "many_tokens.loop.0.plan: begins with b'gtrt', plans of tensorrt with b'ftrt': this is none",
        BundleError,
    ),
    (a_missing_plan, "many_tokens.loop.0.plan: cannot be read", BundleError),
    (a_short_plan, r"many_tokens.loop.0.plan: \d+ bytes, engine.json says \d+; copy the engine again", BundleError),
    (a_linked_plan, "many_tokens.loop.0.plan: is a link", BundleError),
    (a_linked_engine, "float32: is a link", BundleError),
    (linked_engines, "engines: is a link", BundleError),
    (damaged_metadata, "engine.json: damaged", BundleError),
    (
        a_path_that_leaves,
        "names '../many_tokens.loop.0.plan', which is no plain file name; do not use this engine",
        BundleError,
    ),
    (
        a_weight_outside,
        "weight 'embed' lies outside 'weights.bin'; do not use this engine",
        BundleError,
    ),
    (a_refused_plan, "tensorrt 8.6.1 refuses the plan: the plan was made by another version", BackendError),
]


@pytest.mark.parametrize(("spoil", "reason", "kind"), REASONS)
def test_auto_falls_back_and_says_why_once(
    engine: Path,
    own_bundle: Path,
    fake: FakeTensorRT,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[FakeTensorRT, Path, pytest.MonkeyPatch], None],
    reason: str,
    kind: type[Exception],
) -> None:
    spoil(fake, engine, monkeypatch)
    with pytest.raises(kind, match=reason):
        load(own_bundle, "tensorrt")
    assert not fake.deserialized or fake.refuse, "bytes that were not checked reached TensorRT"
    for _ in range(2):
        assert load(own_bundle).backend == "onnxruntime"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("no engine of the bundle is used, onnxruntime runs instead: ")
    with pytest.raises(kind, match=reason):
        load(own_bundle, engine=engine.name)  # what is named is not replaced
    gc.collect()
    assert fake.cuda.allocated == 0


def test_a_plan_that_wants_more_than_the_metadata_has(engine: Path, own_bundle: Path) -> None:
    """And one that wants less: TensorRT may drop an input that nothing reads."""
    weights = read_engine(engine).weights
    rewrite(engine, weights=weights[1:])
    with pytest.raises(
        BackendError,
        match=r"few_tokens\.prelude\.0\.plan wants \['embed'\], which engine.json does not explain",
    ):
        load(own_bundle, "tensorrt")
    rewrite(engine, weights=(*weights, msgspec.structs.replace(weights[0], name="unread")))
    with load(own_bundle, "tensorrt") as runner:
        assert len(runner.generate([1], 3, ignore_eos=True).complete().ids) == 3


def test_a_bundle_without_engines_runs_silently(
    own_bundle: Path, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mythos_export")
    (own_bundle / "engines").mkdir()  # as an interrupted build leaves it
    assert load(own_bundle).backend == "onnxruntime"
    assert "engine" not in caplog.text
    with pytest.raises(BackendError, match="holds no engine for tensorrt; build one with `mythos-export build "):
        load(own_bundle, "tensorrt")
    with pytest.raises(BackendError, match=r"build .* --backend tensorrt-rtx`"):
        load(own_bundle, "tensorrt-rtx")


def test_unknown_backends_and_engines_are_named(engine: Path, own_bundle: Path, fake: FakeTensorRT) -> None:
    with pytest.raises(
        BackendError, match='backend is "cuda"; expected one of auto, onnxruntime, tensorrt, tensorrt-rtx'
    ):
        load(own_bundle, "cuda")
    with pytest.raises(BackendError, match=f"holds no engine 'x'; it holds {engine.name}"):
        load(own_bundle, engine="x")
    with pytest.raises(InputError, match="engine x is TensorRT's, backend onnxruntime uses none"):
        load(own_bundle, "onnxruntime", engine="x")


def test_the_bundles_own_dtype_comes_first_then_the_fastest(engine: Path, own_bundle: Path, fake: FakeTensorRT) -> None:
    """Two more engines, whose metadata alone says another dtype."""
    for dtype in ("float16", "bfloat16"):
        shutil.copytree(engine, engine.parent / dtype)
        rewrite(engine.parent / dtype, dtype=dtype)
    with load(own_bundle) as runner:
        assert (runner.engine, runner.graph.dtype) == (engine.name, "float32")
    with load(own_bundle, engine="bfloat16") as runner:
        assert runner.engine == "bfloat16"
    shutil.rmtree(engine)
    with load(own_bundle) as runner:
        assert (runner.engine, runner.graph.dtype) == ("float16", "float16")
    flip(engine.parent / "float16" / "many_tokens.loop.0.plan")
    with load(own_bundle) as runner:
        assert runner.engine == "bfloat16"
