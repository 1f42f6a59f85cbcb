"""What becomes of an engine once its plans are built: the check, the other way of building, the timing cache. Plans are made up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_tensorrt import FakeTensorRT

from mythos_export.build import engine as engine_module
from mythos_export.build.builder import BuiltPlan
from mythos_export.build.check import Agreement
from mythos_export.build.engine import build_engine
from mythos_export.build.options import Limits, Options
from runtimes.cuda import OutOfDeviceMemory
from runtimes.engine_folder import list_engines
from runtimes.errors import BackendError

Verdict = Callable[[], Agreement]


def agrees() -> Agreement:
    return Agreement(1e-9, 1.0, 100)


def differs() -> Agreement:
    raise BackendError("computes something else")


def is_short_of_memory() -> Agreement:
    raise OutOfDeviceMemory("the cache needs more", 2, 1)


@pytest.fixture
def ways(fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first way that each plan was to be built, in order."""
    asked: list[int] = []

    def build_plan(library, lowered, folder, profiles, options, way, timing, progress):  # type: ignore[no-untyped-def]
        asked.append(way)
        return BuiltPlan(b"ftrt%d" % len(asked), {"Layers": ["one"]}, 64, timing + b"t")

    monkeypatch.setattr(engine_module, "build_plan", build_plan)
    return asked


def judge(monkeypatch: pytest.MonkeyPatch, *verdicts: Verdict) -> None:
    left = iter(verdicts)
    monkeypatch.setattr(engine_module, "check_engine", lambda *_: next(left)())


def test_an_engine_that_agrees_is_kept(own_bundle: Path, ways: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, agrees)
    built = build_engine(own_bundle)
    assert ways == [0] * 6
    assert [(path, engine) for path, engine in list_engines(own_bundle)] == [(built.path, built.engine)]
    assert built.engine.max_context == 512
    assert {plan.form for plan in built.engine.plans} == {"few_tokens", "many_tokens"}
    # What was timed serves the next build, whatever its dtype.
    timing = built.path.with_name(f".{built.path.name.rpartition('-')[0]}.timing")
    assert timing.read_bytes() == b"t" * 6
    judge(monkeypatch, agrees)
    build_engine(own_bundle, dtype="float16")
    assert timing.read_bytes() == b"t" * 14  # the loop is cut in two where the CUDA kernels compute its experts


def test_an_engine_that_differs_is_built_the_other_way(
    own_bundle: Path, ways: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge(monkeypatch, differs, agrees)
    build_engine(own_bundle)
    assert ways == [0] * 6 + [1] * 6
    assert "computes something else; another way of building is tried" in caplog.text
    assert len(list_engines(own_bundle)) == 1


def test_an_engine_that_differs_either_way_is_not_kept(
    own_bundle: Path, ways: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, differs, differs)
    with pytest.raises(BackendError, match="computes something else"):
        build_engine(own_bundle)
    assert list_engines(own_bundle) == []


def test_an_engine_that_cannot_be_checked_is_kept_and_told(
    own_bundle: Path, ways: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    judge(monkeypatch, is_short_of_memory)
    caplog.set_level(logging.WARNING, "mythos_export")
    built = build_engine(own_bundle)
    assert f"{built.path.name} was not held against onnxruntime: the cache needs more" in caplog.text
    assert len(list_engines(own_bundle)) == 1


def test_the_check_can_be_left_out(own_bundle: Path, ways: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch)
    build_engine(own_bundle, options=Options(check=False))
    assert len(list_engines(own_bundle)) == 1


def test_limits_become_profiles(own_bundle: Path, ways: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    judge(monkeypatch, agrees)
    engine = build_engine(own_bundle, limits=Limits(batch=3, seq=40, context=300)).engine
    few, many = (next(plan for plan in engine.plans if plan.form == form) for form in ("few_tokens", "many_tokens"))
    assert engine.max_context == 300
    (decode,) = few.profiles
    assert (decode.seq.max, decode.k.max, decode.batch.max) == (1, 1, few.max_tokens)
    decode, prefill = many.profiles
    assert (decode.batch.max, decode.seq.max) == (3, 1)
    assert (prefill.batch.max, prefill.seq.max, prefill.k.max) == (3, 40, 40)
    assert prefill.capacity.max == 512  # whole buckets, so that every slot of a cache begins where TensorRT wants it
