"""What a step's time is made of: recorded kernels, a fake CUPTI, onnxruntime's profiler for real."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from mythos_export import footprint, profiling
from mythos_export.bench import Workload, bench
from mythos_export.config import ModelConfig
from mythos_export.footprint import Part
from mythos_export.profiling import Activity, profile
from mythos_export.report_profile import profile_report
from mythos_export.traces import (
    CuptiTrace,
    Span,
    one_after_the_other,
    operator_spans,
    short_name,
    without_what_is_inside,
)
from runtimes.bundle import open_bundle
from runtimes.errors import BackendError

FEW = "_ZN6mythos4cuda47_GLOBAL__N__993e2f29_14_experts_few_cu_bc9282e59inner_fewIfLi1ELb0EEEvNS1_5SizesEPKfPKiNS1_6StacksIT_EEPf"


def test_names() -> None:
    assert short_name(FEW) == "mythos::cuda::inner_few"
    assert short_name("void cutlass::Kernel2<cutlass_80<float, 4>, (bool)1>(T1::Params)") == "cutlass::Kernel2"
    assert short_name("__myl_MulSum_0x9f") == "__myl_MulSum_0x9f"
    assert short_name("_Znonsense") == "_Znonsense"


def test_time_belongs_to_one_kernel() -> None:
    """Kernels that wait for the one before them, and operators inside a Loop."""
    overlapping = [
        Span("b", 80_000, 130_000),
        Span("a", 0, 100_000),
        Span("c", 90_000, 95_000),
        Span("d", 140_000, 150_000),
    ]
    assert one_after_the_other(overlapping) == [("a", 100), ("b", 30), ("c", 0), ("d", 10)]
    inside = [Span("Add", 10_000, 30_000), Span("If", 40_000, 90_000), Span("Mul", 50_000, 60_000)]
    nested = [Span("Loop", 0, 100_000), *inside, Span("Cast", 100_000, 101_000)]
    assert without_what_is_inside(nested) == [("Loop", 30), ("Add", 20), ("If", 40), ("Mul", 10), ("Cast", 1)]
    events = [
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 9},
        {"cat": "Node", "name": "n_fence_before", "ts": 0, "dur": 0, "args": {"op_name": "Add"}},
        {"cat": "Node", "name": "n_kernel_time", "ts": 5, "dur": 2, "args": {"op_name": "Add"}},
    ]
    assert operator_spans(events) == [("Add", 5000, 7000)]


def test_table() -> None:
    """Two steps of 400 µs at 100 GB/s: bytes only where one kernel reads them, and what each is bound by."""
    kernels = {
        "multiply_rows": (2, 50),
        "inner_few": (1, 100),
        "mix": (1, 2),
        "attend_one": (1, 40),
        "attend_few_rows": (1, 3),
    }
    activities = [
        Activity(f"mythos::cuda::{name}", us) for name, (calls, us) in kernels.items() for _ in range(2 * calls)
    ]
    activities += 2 * [Activity("__myl_x", 20)]
    parts = {
        Part("NormalizedLinear", "matrix"): 6e6,
        Part("NormalizedLinear", "head"): 3e6,
        Part("MixtureOfExperts", "gate_up"): 1e6,
        Part("LatentAttention", "cache"): 5e6,
    }
    found = profile("tg2", "a test", activities, 800, 2, parts, bandwidth=100.0)
    assert (found.microseconds, found.steps) == (400, 2)
    assert found.between_microseconds == pytest.approx(400 - 100 - 100 - 2 - 40 - 3 - 20)
    rows = {row.name.removeprefix("mythos::cuda::"): row for row in found.kernels}
    assert rows["multiply_rows"].calls == 2
    assert (rows["multiply_rows"].bytes, rows["multiply_rows"].gb_per_second) == (9e6, pytest.approx(90))
    assert rows["multiply_rows"].share == pytest.approx(0.25)
    bounds = {"multiply_rows": "memory", "inner_few": "compute or latency", "mix": "launch", "__myl_x": None}
    assert {name: rows[name].bound for name in bounds} == bounds
    assert rows["attend_one"].bytes is None  # two kernels read the cache: which one how much, nobody knows
    assert sum(row.share for row in found.kernels) + found.between_microseconds / 400 == pytest.approx(1)
    text = profile_report(found)
    assert text.startswith("tg2, the mean of 2 steps: 400 µs, by a test\n| kernel or operator")
    assert "| mythos::cuda::multiply_rows   | 2     | 100.0 | 25.0 % | 9.0 MB    | 90.0 | 90 %         | memory" in text
    quantized = profile("pp", "t", [Activity("QuantizedMixtureOfExperts", 10)], 20, 1, parts, 100.0)
    assert quantized.kernels[0].bytes == 1e6


class FakeCupti(types.ModuleType):
    """cupti.cupti that hands out what a test says, when flushed."""

    class cuptiError(Exception):
        pass

    class ActivityKind(IntEnum):
        MEMCPY = 1
        MEMSET = 2
        CONCURRENT_KERNEL = 10

    class ActivityMemcpyKind(IntEnum):
        HTOD = 1

    def __init__(self, problem: Exception | None = None) -> None:
        super().__init__("cupti.cupti")
        self.problem, self.on, self.records = problem, set[int](), list[Any]()
        self.deliver: Callable[[list[Any]], None] = lambda records: None

    def activity_register_callbacks(self, requested: Any, completed: Callable[[list[Any]], None]) -> None:
        assert requested() == (8 * 2**20, 0)
        self.deliver = completed

    def activity_enable(self, kind: int) -> None:
        if self.problem:
            raise self.problem
        self.on.add(kind)

    def activity_disable(self, kind: int) -> None:
        self.on.remove(kind)

    def activity_flush_all(self, flag: int) -> None:
        self.deliver(self.records)
        self.records = []


def test_cupti(monkeypatch: pytest.MonkeyPatch) -> None:
    cupti = FakeCupti()
    monkeypatch.setitem(sys.modules, "cupti.cupti", cupti)
    kinds, record = cupti.ActivityKind, types.SimpleNamespace
    trace = CuptiTrace()
    cupti.records = [record(kind=kinds.CONCURRENT_KERNEL, name="before", start=0, end=1)]
    with trace:
        cupti.records = [
            record(kind=kinds.MEMCPY, copy_kind=1, start=100, end=2100),
            record(kind=kinds.CONCURRENT_KERNEL, name=FEW, start=2000, end=5100),
            record(kind=kinds.MEMSET, start=6000, end=7000),
        ]
    assert trace.activities() == [("copy htod", 2), ("mythos::cuda::inner_few", 3), ("fill", 1)]
    trace.close()
    trace.close()
    assert not cupti.on
    for problem in (FakeCupti.cuptiError("not initialized"), RuntimeError("no driver")):
        monkeypatch.setitem(sys.modules, "cupti.cupti", FakeCupti(problem))
        with pytest.raises(BackendError, match=f"{problem}; it needs a driver"):
            CuptiTrace()
    monkeypatch.setitem(sys.modules, "cupti.cupti", None)
    with pytest.raises(BackendError, match=r"pip install 'mythos-export\[profile\]'"):
        CuptiTrace()


def test_operators_of_a_cpu(tiny_bundle: Path) -> None:
    """Calls and bytes of a real run: 6 steps of attention a token at 4 loops, every weight read once a loop."""
    report = bench(tiny_bundle, Workload(prompt=8, new=6, repetitions=1, loops=4, threads=1), profile=True)
    assert [found.test for found in report.profiles] == ["pp8", "tg3 @ d3"]
    config = ModelConfig.from_dict(open_bundle(tiny_bundle)[1].model)
    attentions = len(config.prelude) + 4 * len(config.loop_layers) + len(config.coda)
    for found in report.profiles:
        rows = {row.name: row for row in found.kernels}
        assert rows["LatentAttention"].calls == attentions
        assert 0 < sum(row.share for row in found.kernels) < 1
        assert found.between_microseconds > 0
    decode = report.profiles[1]
    cache = 4 * config.cache_width * config.slots(4) * (3 + 1 + 1 + 1)
    known = sum(row.bytes for row in decode.kernels if row.bytes is not None)
    if {"MixtureOfExperts", "RecurrentUpdate"} <= {row.name for row in decode.kernels}:  # with the native operators
        assert known == pytest.approx(footprint.weight_bytes_read(config, 4) + cache)
    assert json.loads(json.dumps(report.to_dict()))["profiles"][1]["kernels"][0]["name"]
    assert report.device_memory_bytes is None
    assert report.power["problem"]


def test_kernels_that_are_named_are_there() -> None:
    sources = Path(__file__).parent.parent / "runtimes" / "native" / "cuda"
    text = "".join(path.read_text() for path in sources.glob("*.cu*"))
    for name in profiling._KERNELS:
        assert re.search(rf"__global__[^;{{]*\b{name}\(", text), name
