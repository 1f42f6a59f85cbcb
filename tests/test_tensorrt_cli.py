"""The command line on engines of the fake TensorRT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import FakeTensorRT

from mythos_export.cli import main
from runtimes.engines import engine_key

KEY = engine_key("tensorrt", "8.6.1", ("9.0",), "Fake GPU", "float32")


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["mythos-export", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_generate(
    engine: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = {}
    for backend in ("tensorrt", "onnxruntime", "auto"):
        code, out, _ = call(
            monkeypatch, capsys, "generate", own_bundle, "-p", "To be", "-n", 12, "--backend", backend, "--json"
        )
        assert code == 0
        results[backend] = json.loads(out)["ids"]
    assert results["tensorrt"] == results["onnxruntime"] == results["auto"]
    code, _, err = call(monkeypatch, capsys, "generate", own_bundle, "-p", "To be", "--engine", "x")
    assert (code, f"holds no engine 'x'; it holds {KEY}" in err) == (2, True)
    code, _, err = call(monkeypatch, capsys, "generate", own_bundle, "-p", "To be", "--max-context", 513)
    assert code == 0  # the model ends at 512, and so does the plan
    code, _, err = call(monkeypatch, capsys, "generate", own_bundle, "-p", "To be", "--backend", "cuda")
    assert code == 2


def test_bench_tells_of_the_device(
    engine: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("-p", 8, "-n", 4, "-r", 1, "-b", 2, "--engine", KEY)
    monkeypatch.setattr("mythos_export.bandwidth._BYTES", 2**20)
    code, out, _ = call(monkeypatch, capsys, "bench", own_bundle, *options, "--json")
    assert code == 0
    plain, environment = json.loads(out), json.loads(out)["environment"]
    assert (environment["engine"], environment["device"], environment["operators"]) == (KEY, "Fake GPU", None)
    assert environment["device_memory"]["batch"] == 2
    assert environment["device_memory"]["weights"] < plain["device_memory_bytes"] < 2**30
    monkeypatch.setitem(sys.modules, "cupti.cupti", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    code, out, err = call(monkeypatch, capsys, "bench", own_bundle, *options, "--profile")
    assert f"Fake GPU, engine {KEY}; " in out
    assert "share of copy bandwidth" in out
    assert "device memory planned " in out
    assert "power not measured: the Python module pynvml" in out
    assert code == 2
    assert "the Python module cupti cannot be imported" in err
    assert "pip install 'mythos-export[profile]'" in err


def test_eval_against_the_same_bundle_on_onnxruntime(
    engine: Path,
    own_bundle: Path,
    fake: FakeTensorRT,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer\n" * 6)
    options = ("--text", text, "--backend", "tensorrt", "--against", own_bundle, "--json")
    code, out, _ = call(monkeypatch, capsys, "eval", own_bundle, *options)
    assert code == 0
    (result,) = json.loads(out)["loops"].values()
    assert result["against"]["kl_mean"] < 1e-6
    assert result["against"]["top1_agreement"] == 1
    assert fake.deserialized == 6  # one bundle on the engine, the other on onnxruntime


def test_a_bundle_without_an_engine_says_how_to_build_one(
    own_bundle: Path, fake: FakeTensorRT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "generate", own_bundle, "-p", "x", "--backend", "tensorrt")
    assert code == 2
    assert (
        f"error: {own_bundle}: holds no engine for tensorrt; build one with `mythos-export build {own_bundle}`" in err
    )
