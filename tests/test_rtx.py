"""TensorRT-RTX builds engines without a GPU: by the command line, of the trained models, and what is in their plans."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mythos_export import cli
from mythos_export.build.engine import build_engine
from mythos_export.build.options import Limits, Options
from mythos_export.export import export_bundle
from mythos_export.overloads import FEW_TOKENS, MANY_TOKENS
from mythos_export.quantize import quantize_bundle
from runtimes import tensorrt_api
from runtimes.bundle import open_bundle
from runtimes.engine_folder import check, list_engines, read_engine
from runtimes.engines import STAGES
from runtimes.errors import BackendError, InputError
from runtimes.runner import load

FORMS = (FEW_TOKENS, MANY_TOKENS)
BUILD = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--max-context", 256, "--max-seq", 16)
MODELS = ("tiny-mla", "small-mla", "small-gqa")


@pytest.fixture(autouse=True)
def _rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx, which builds engines without a GPU")
    tensorrt_api.find.cache_clear()


@pytest.fixture
def bundle(fixed_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fixed_bundle, tmp_path / "bundle")


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["mythos-export", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_builds_and_lists(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "build", bundle, *BUILD, "--dtype", "float16", "--json")
    assert code == 0, err
    built, (folder,) = json.loads(out), (bundle / "engines").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "engine.json", *(f"{form}.{stage}.0.{kind}" for form in FORMS for stage in STAGES for kind in ("plan", "layers.json"))
    }  # fmt: skip
    check(folder, read_engine(folder), open_bundle(bundle)[1])
    assert (built["max_batch"], built["max_seq"], built["max_context"]) == (1, 16, 256)
    for command in (("build", bundle, "--list"), ("inspect", bundle)):
        code, out, _ = call(monkeypatch, capsys, *command, "--json")
        assert (code, json.loads(out)["engines"]) == (0, [built])
    code, _, err = call(monkeypatch, capsys, "build", bundle, *BUILD, "--dtype", "float16")
    assert (code, "--force" in err) == (2, True)
    assert [path.name for path in (bundle / "engines").iterdir()] == [built["key"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compute-capability", "8.7"), "expected any of"),
        (("--max-context", "513"), "the model has positions for 512"),
        (("--max-batch", "0"), "max_batch is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_built_leaves_nothing(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, str],
    message: str,
) -> None:
    code, _, err = call(monkeypatch, capsys, "build", bundle, *BUILD, *options)
    assert (code, message in err) == (2, True), err
    assert not (bundle / "engines").is_dir() or not list((bundle / "engines").iterdir())


def test_an_interrupted_build_leaves_nothing(bundle: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    phases = []
    options, limits = Options(compute_capabilities=("8.9",)), Limits(seq=16, context=256)
    with pytest.raises(KeyboardInterrupt):
        build_engine(
            bundle,
            backend="tensorrt-rtx",
            limits=limits,
            options=options,
            progress=lambda *step: phases.append(step) or stop(*step),
        )
    assert phases
    assert not list((bundle / "engines").iterdir())
    built = build_engine(bundle, backend="tensorrt-rtx", limits=limits, options=options)
    assert [path for path in (bundle / "engines").iterdir() if not path.name.startswith(".")] == [built.path]


def test_a_killed_build_leaves_no_engine(bundle: Path) -> None:
    script = f"""
import os, signal
from mythos_export.build.engine import build_engine
from mythos_export.build.options import Limits, Options
build_engine({str(bundle)!r}, backend="tensorrt-rtx", limits=Limits(seq=16, context=256),
             options=Options(compute_capabilities=("8.9",)), progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list_engines(bundle) == []
    assert load(bundle).backend == "onnxruntime"


def test_types_that_a_version_lacks_are_refused(
    tmp_path: Path, fixed_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tensorrt_api.find("tensorrt-rtx")
    lacking = library.capabilities._replace(int4=False, bfloat16=False)
    monkeypatch.setattr(
        tensorrt_api, "find", lambda name: tensorrt_api.TensorRT(name, library.module, "8.6.1", lacking, library.logger)
    )
    options = Options(compute_capabilities=("8.9",))
    quantize_bundle(fixed_bundle, tmp_path / "int4", "int4")
    for bundle, dtype, message in (
        (tmp_path / "int4", None, "has no int4, which TensorRT 10 has; use a bundle of int8 weights"),
        (fixed_bundle, "bfloat16", "has no bfloat16, which TensorRT 10 has; use --dtype float16"),
    ):
        with pytest.raises(InputError, match=message):
            build_engine(bundle, backend="tensorrt-rtx", dtype=dtype, options=options)
        assert not (bundle / "engines").exists()


def test_a_bundle_without_bodies_for_engine_builders_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mythos_export.build import lower

    monkeypatch.setattr(
        lower, "choose_bodies", lambda model, form: [model.functions.pop(key) for key in list(model.functions)]
    )
    with pytest.raises(BackendError, match=r"holds no body of .*; export the checkpoint again"):
        build_engine(bundle, backend="tensorrt-rtx", options=Options(compute_capabilities=("8.9",)))


# The trained models


@pytest.fixture(scope="module", params=[(model, loops) for model in MODELS for loops in ("fixed", "dynamic")])
def trained(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Path]]:
    """A trained model, its loop count fixed or dynamic."""
    model, loops = request.param
    target = tmp_path_factory.mktemp("trained") / "bundle"
    export_bundle(shared / "checkpoints" / model, target, loops=4 if loops == "fixed" else None)
    yield model, loops, target
    shutil.rmtree(target.parent)


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_plans_of_the_trained_models_write_no_copies_of_experts(trained: tuple[str, str, Path], weights: str) -> None:
    _, _, bundle = trained
    if weights == "int4":
        quantize_bundle(bundle, bundle.parent / "int4", "int4")
        bundle = bundle.parent / "int4"
    options = Options(compute_capabilities=("8.9", "12.0"))
    built = build_engine(
        bundle, backend="tensorrt-rtx", dtype="float16", limits=Limits(seq=64, context=512), options=options
    )
    model = built.manifest.model
    experts, dim = model["loop_layers"][0]["feed_forward"], model["dim"]
    expert = dim * experts["expert_dim"]
    # Few tokens: nothing as large as one expert's smaller matrix is written, be it gathered or cast; of int4, dequantized.
    chosen = 1 if weights == "float16" else experts["top_k"]
    assert largest_result(built.path / "few_tokens.loop.0.layers.json") < expert * chosen
    if weights == "float16":  # many tokens: no copy of the experts, be it only transposed
        assert largest_result(built.path / "many_tokens.loop.0.layers.json") < expert * experts["n_experts"]
    for form in FORMS:
        for stage in STAGES:
            kinds = layer_kinds(built.path / f"{form}.{stage}.0.layers.json")
            assert kinds
            assert not kinds & {"cast", "reformat", "reorder"}, (form, stage)


def layers(path: Path) -> list[str]:
    return [layer for layer in json.loads(path.read_text())["Layers"] if "LayerType: " in layer]


def layer_kinds(path: Path) -> set[str]:
    """Of the layers of a plan, in lower case."""
    return {kind.lower() for layer in layers(path) for kind in re.findall(r"LayerType: (\w+)", layer)}


def largest_result(path: Path) -> int:
    """Numbers in the largest result of a layer, sizes that vary taken as 1."""
    shapes = [
        shape
        for layer in layers(path)
        for shape in re.findall(r"Dimensions: \[([-\d,]+)\]", layer.partition("Outputs:")[2])
    ]
    return max(math.prod(abs(int(size)) for size in shape.split(",")) for shape in shapes)
