"""Engines of TensorRT 8.6 whose experts the CUDA kernels compute: results, graphs, memory, and libraries that cannot be used.

Where there is no GPU, fake_cuda_kernels stands for the library.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cuda_header import STRUCTS
from fake_cuda_kernels import install_kernels
from fake_engine import BATCH, SEQ, add_engine
from fake_tensorrt import FakeTensorRT

from mythos_export.build import engine as engine_module
from mythos_export.build.engine import build_engine
from mythos_export.inspection import doctor
from runtimes import cuda_kernels, cuda_step_kernels
from runtimes.engine_folder import read_engine
from runtimes.engines import Engine, ExpertsCall, Passed
from runtimes.errors import BackendError, BundleError
from runtimes.native_library import library_path
from runtimes.runner import load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [2]]
Spoil = Callable[[pytest.MonkeyPatch, FakeTensorRT, Path], Any]


@pytest.fixture
def half(fake: FakeTensorRT, own_bundle: Path) -> Path:
    """A float16 engine's folder, for TensorRT 8.6."""
    return add_engine(own_bundle, dtype="float16")


# What they compute, and how they are run


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sequences_grow_as_on_onnxruntime(fake: FakeTensorRT, own_bundle: Path, dtype: str) -> None:
    """Prefill of many tokens, then one-token steps of three rows (many_tokens) and of two (few_tokens), at depths of their own."""
    add_engine(own_bundle, dtype=dtype)
    logits = []
    for backend in ("tensorrt", "onnxruntime"):
        with load(own_bundle, backend, native=False if backend == "onnxruntime" else None) as runner:
            session = runner.session(3, n_loops=[1, 4, 2])
            logits.append([session.advance(PROMPTS[:3])[0]])
            logits[-1] += [session.advance([[step], [step + 1], [step + 2]])[0] for step in range(2)]
            session.keep([0, 2])
            logits[-1] += [session.advance([[step], [step + 1]])[0] for step in range(3)]
            session.close()
    assert {call.tokens for call in fake.kernels.calls} == {3 * SEQ, 3 * 13, 3, 2}
    for got, want in zip(*logits, strict=True):
        np.testing.assert_allclose(got, want, atol=0.05 if dtype == "float16" else 0.4)
        assert np.abs(got - want).mean() < (0.005 if dtype == "float16" else 0.05)


def test_calls_are_captured_with_the_plans(half: Path, own_bundle: Path, fake: FakeTensorRT) -> None:
    with load(own_bundle, "tensorrt") as runner:
        generation = runner.generate(PROMPTS[0], 30, n_loops=3, ignore_eos=True)
        for _ in range(4):
            next(generation)
        assert fake.cuda.calls["cudaStreamBeginCapture"] == 1
        fake.kernels.calls.clear()
        generation.complete()
        assert (fake.kernels.calls, fake.cuda.calls["cudaGraphLaunch"]) == ([], 28)
    assert fake.cuda.allocated == 0


def test_a_call_that_is_refused(half: Path, own_bundle: Path, fake: FakeTensorRT) -> None:
    with load(own_bundle, "tensorrt") as runner:
        fake.kernels.refuses = True
        with pytest.raises(BackendError, match=r"cannot run the experts: no kernel image is available \(error 999\)"):
            runner.generate(PROMPTS[0], 5).complete()
        fake.kernels.refuses = False
        runner.generate(PROMPTS[0], 5).complete()


def test_the_workspace_is_planned_and_told(
    half: Path, own_bundle: Path, fake: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    """For the largest step of any profile."""
    caplog.set_level(logging.INFO, "mythos_export")
    (call, _) = read_engine(half).experts
    with load(own_bundle, "tensorrt", max_batch=2, max_context=100) as runner:
        memory = runner.memory
        assert memory is not None
        assert memory["workspace"] == 4 * BATCH * SEQ * (call.top_k + call.shared) * call.expert_dim
        session = runner.session(2)
        session.advance([[1] * 60] * 2)
        planned = memory["needed"] - memory["plans"]
        assert 0.95 * planned <= fake.cuda.allocated <= 1.02 * planned
    assert "workspace" in caplog.text


@pytest.mark.parametrize(
    "struct",
    [
        cuda_kernels._Experts,
        *(getattr(cuda_step_kernels, name) for name in ("Append", "Likeliest", "Choose", "Advance")),
    ],
)
def test_structs_are_the_headers(struct: type[ctypes.Structure]) -> None:
    header = STRUCTS[struct.__name__.strip("_").lower()]
    assert list(struct._fields_) == list(header._fields_)


# Libraries that cannot be used


def missing(patch: pytest.MonkeyPatch, fake: FakeTensorRT, folder: Path) -> None:
    patch.setattr(cuda_kernels, "LIBRARY", folder / "libmythos_cuda.so")


def broken(patch: pytest.MonkeyPatch, fake: FakeTensorRT, folder: Path) -> None:
    (folder / "libmythos_cuda.so").write_bytes(b"not a library")
    missing(patch, fake, folder)
    patch.setattr(cuda_kernels, "_open", ctypes.CDLL)


def without_a_function(patch: pytest.MonkeyPatch, fake: FakeTensorRT, folder: Path) -> None:
    del fake.kernels.mythos_cuda_experts_launch


def another_version(patch: pytest.MonkeyPatch, fake: FakeTensorRT, folder: Path) -> None:
    install_kernels(patch, fake.cuda, version=4)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (missing, "the CUDA kernels are missing: .*libmythos_cuda.so is not built; "),
        (broken, "the CUDA kernels cannot be loaded: .*libmythos_cuda.so"),
        (without_a_function, "the CUDA kernels cannot be loaded: .*mythos_cuda_experts_launch"),
        (another_version, "the CUDA kernels in .* are of version 4, this release uses 3; "),
    ],
)
def test_a_library_that_cannot_be_used(
    half: Path,
    own_bundle: Path,
    fake: FakeTensorRT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Spoil,
    reason: str,
) -> None:
    """Asked for, it is an error with the fix, before anything is built or taken; "auto" goes on without, saying why once."""
    spoil(monkeypatch, fake, tmp_path)
    cuda_kernels.find.cache_clear()
    fix = f"{reason}.*make cuda .*--dtype float32"
    with pytest.raises(BackendError, match=fix):
        load(own_bundle, "tensorrt")
    assert not fake.deserialized
    for _ in range(2):
        assert load(own_bundle).backend == "onnxruntime"
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.startswith("no engine of the bundle is used, onnxruntime runs instead: the CUDA kernels ")
    monkeypatch.setattr(engine_module, "lower", None)  # nothing is lowered
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(BackendError, match=fix):
            build_engine(own_bundle, dtype=dtype)
    health = doctor()
    assert health["cuda_kernels"] is None
    assert "make cuda" in health["missing"]["CUDA kernels"]
    gc.collect()
    assert fake.cuda.allocated == 0


def test_doctor_finds_the_library(fake: FakeTensorRT) -> None:
    health = doctor()
    assert health["cuda_kernels"] == str(cuda_kernels.LIBRARY)
    assert "CUDA kernels" not in health["missing"]


def test_float32_engines_need_no_kernels(
    engine: Path, own_bundle: Path, fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch, fake, tmp_path)
    cuda_kernels.find.cache_clear()
    with load(own_bundle, "tensorrt") as runner:
        assert len(runner.generate([1], 3, ignore_eos=True).complete().ids) == 3
        assert runner.memory is not None
        assert runner.memory["workspace"] == 0


@pytest.mark.skipif(not library_path("mythos_cuda").is_file(), reason="needs the CUDA kernels; run: make cuda")
def test_the_real_library_reads_what_is_written(half: Path) -> None:
    """Sizes of a workspace need no GPU."""
    cuda_kernels.find.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "LIBRARY", library_path("mythos_cuda"))
        patch.setattr(cuda_kernels, "_open", ctypes.CDLL)
        kernels, made = cuda_kernels.find(), read_engine(half)
        (few, many) = ([call for call in made.experts if call.form == form] for form in ("few_tokens", "many_tokens"))
        sizes = [kernels.workspace_bytes(msgspec.structs.replace(made, experts=tuple(calls))) for calls in (few, many)]
        impossible = msgspec.structs.replace(many[0], top_k=2**30)
        with pytest.raises(
            BackendError, match=r"take no step of .*, 1073741824 of 8 .* smaller --max-batch or --max-seq"
        ):
            kernels.workspace_bytes(msgspec.structs.replace(made, experts=(impossible,)))
    cuda_kernels.find.cache_clear()
    assert 0 < sizes[0] <= sizes[1] < 2**30


# Metadata that make no sense


def changed(engine: Engine, **changes: object) -> dict[str, object]:
    first, *rest = engine.experts
    return {"experts": (msgspec.structs.replace(first, **changes), *rest)}


def unpassed(engine: Engine, call: ExpertsCall) -> dict[str, object]:
    """Hands on the router's choice as floats."""

    def other(passed: Passed) -> Passed:
        return msgspec.structs.replace(passed, integer=False) if passed.name == call.chosen else passed

    plans = [msgspec.structs.replace(plan, passes=tuple(map(other, plan.passes))) for plan in engine.plans]
    return {"plans": tuple(plans)}


NONSENSE: list[tuple[Callable[[Engine, ExpertsCall], dict[str, object]], str]] = [
    (lambda engine, call: changed(engine, normed="passed.99"), "given what no part before hands on"),
    (lambda engine, call: changed(engine, chosen=call.weight), "given what no part before hands on"),
    (lambda engine, call: changed(engine, dim=call.dim * 2), "given what no part before hands on"),
    (unpassed, "given what no part before hands on"),
    (lambda engine, call: {"integers": "int64"}, "given what no part before hands on"),
    (lambda engine, call: changed(engine, mixed=call.normed), "what its plans hand on"),
    (lambda engine, call: changed(engine, mixed="embed"), "what its plans hand on"),
    (lambda engine, call: changed(engine, down_routed="nothing"), "weights are not as they say"),
    (lambda engine, call: changed(engine, gate_up_shared=call.gate_up_routed), "weights are not as they say"),
    (lambda engine, call: changed(engine, down_shared=None), "weights are not as they say"),
    (lambda engine, call: changed(engine, expert_dim=call.expert_dim * 2), "weights are not as they say"),
    (lambda engine, call: changed(engine, dtype="float32"), "weights are not as they say"),
    (lambda engine, call: changed(engine, part=0), "its plans' stages"),
    (lambda engine, call: {"experts": ()}, "its plans' stages"),
    (lambda engine, call: {"experts": None}, "damaged"),
]


def test_calls_that_make_no_sense_are_refused(half: Path, own_bundle: Path) -> None:
    engine = read_engine(half)
    for changes, reason in NONSENSE:
        rewritten = msgspec.structs.replace(engine, **changes(engine, engine.experts[0]))
        (half / "engine.json").write_bytes(msgspec.json.encode(rewritten))
        with pytest.raises(BundleError, match=f"{reason}.*build it again"):
            load(own_bundle, "tensorrt")
