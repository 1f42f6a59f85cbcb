"""Engines whose operators are TensorRT plugins: the graph that is parsed, and where the plugins' library is wanted.

In onnxruntime, a plugin's node is a function that calls the operator's own portable body.
"""

from __future__ import annotations

import json
import logging
import types
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from fake_tensorrt import FakeTensorRT
from test_build import InOnnxruntime, case_of

from mythos_export.build import engine as engine_module
from mythos_export.build import plugins as trt_plugins
from mythos_export.build.builder import BuiltPlan
from mythos_export.build.engine import build_engine
from mythos_export.build.lower import Lowered, has_plugins, lower
from mythos_export.build.options import Options
from mythos_export.export import export_bundle
from mythos_export.overloads import MANY_TOKENS
from mythos_export.quantize import quantize_bundle
from runtimes import cuda_kernels, tensorrt_api, tensorrt_plugins
from runtimes.bundle import open_bundle
from runtimes.errors import BackendError
from runtimes.runner import load

# What each plugin computes, by the operator of its name.
BODIES = """
NormalizedLinear <epsilon> (x, norm, weight) => (y) {
  y = ai.mythos.NormalizedLinear <epsilon: float = @epsilon> (x, norm, weight)
}
ResidualLinear (residual, x, weight) => (y) { y = ai.mythos.ResidualLinear(residual, x, weight) }
FeedForward <epsilon> (x, norm, gate_up, down) => (y) {
  y = ai.mythos.FeedForward <epsilon: float = @epsilon> (x, norm, gate_up, down)
}
MixtureOfExperts <top_k, epsilon, scoring, normalized, scale, n_groups, top_k_groups, group_top_k>
    (x, norm, router, bias, gate_up, down) => (y) {
  y = ai.mythos.MixtureOfExperts <top_k: int = @top_k, epsilon: float = @epsilon, scoring: int = @scoring,
    normalized: int = @normalized, scale: float = @scale, n_groups: int = @n_groups, top_k_groups: int = @top_k_groups,
    group_top_k: int = @group_top_k> (x, norm, router, bias, gate_up, down)
}
LatentAttention <scale, epsilon> (q, kv, norm, w_uk, w_uv, cos, sin, past, length) => (y, new_kv) {
  axis = Constant <value_ints = [0]> ()
  all = Unsqueeze(past, axis)
  slot = Constant <value_int = 0> ()
  y, new_kv = ai.mythos.LatentAttention <scale: float = @scale, epsilon: float = @epsilon>
    (q, kv, norm, w_uk, w_uv, cos, sin, all, length, slot)
}
GroupedQueryAttention <n_heads, n_kv_heads, window, scale> (qkv, cos, sin, past, length) => (y, new_kv) {
  axis = Constant <value_ints = [0]> ()
  all = Unsqueeze(past, axis)
  slot = Constant <value_int = 0> ()
  y, new_kv = ai.mythos.GroupedQueryAttention <n_heads: int = @n_heads, n_kv_heads: int = @n_kv_heads, window: int = @window,
    scale: float = @scale> (qkv, cos, sin, all, length, slot)
}
RecurrentInput <epsilon> (h, e, signal, norm) => (y) {
  axis = Constant <value_ints = [0]> ()
  table = Unsqueeze(signal, axis)
  loop = Constant <value_int = 0> ()
  y = ai.mythos.RecurrentInput <epsilon: float = @epsilon> (h, e, table, norm, loop)
}
RecurrentUpdate <act_threshold, halt_bias>
    (x, h, e, result, mass, exits, left, down, scale, up, decay, injection, halt) => (a, b, c, d) {
  axis = Constant <value_ints = [0]> ()
  table = Unsqueeze(scale, axis)
  loop = Constant <value_int = 0> ()
  bias_0 = Constant <value_float: float = @halt_bias> ()
  bias = Unsqueeze(bias_0, axis)
  a, b, c, d = ai.mythos.RecurrentUpdate <act_threshold: float = @act_threshold>
    (x, h, e, result, mass, exits, loop, left, down, table, up, decay, injection, halt, bias)
}
"""  # fmt: skip
HEAD = '<domain: "trt.plugins", opset_import: ["": 21, "ai.mythos": 1]>\n'


class WithBodies(InOnnxruntime):
    """Parts whose plugins have bodies: those of the bundle's graph."""

    def __init__(self, parts: list[Lowered], folder: Path, graph_file: str) -> None:
        self.functions = list(onnx.load(folder / graph_file, load_external_data=False).functions)
        self.functions = [function for function in self.functions if not function.overload]
        for text in _split(BODIES):
            self.functions.append(onnx.parser.parse_function(HEAD + text))
        super().__init__(parts, folder)

    def _session(self, lowered: Lowered, folder: Path):  # type: ignore[no-untyped-def]
        for node in lowered.model.graph:
            if node.domain == trt_plugins.DOMAIN:
                known_by = [node.attributes.pop(f"plugin_{what}").value for what in ("version", "namespace")]
                assert known_by == ["1", "ai.mythos"]
        lowered.model.graph.opset_imports["ai.mythos"] = 1
        for function in self.functions:
            made = ir.serde.deserialize_function(function)
            lowered.model.functions[made.identifier()] = made
        return super()._session(lowered, folder)


def _split(bodies: str) -> list[str]:
    """A text a function: each ends where a line does with its closing brace."""
    texts, lines = [], list[str]()
    for line in bodies.strip().splitlines():
        lines.append(line)
        if line.endswith("}"):
            texts.append("\n".join(lines))
            lines = []
    return texts


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small looped model with grouped-query attention, its loops unrolled."""
    home = tmp_path_factory.mktemp("gqa")
    sizes = {
        "vocab_size": 64, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64, "max_loop_iters": 3, "prelude_layers": 1,
        "coda_layers": 1, "attn_type": "gqa", "n_experts": 4, "n_shared_experts": 1, "n_experts_per_tok": 2, "expert_dim": 16,
        "lora_rank": 2,
    }  # fmt: skip
    (home / "config.json").write_text(json.dumps(sizes))
    export_bundle(f"random:{home / 'config.json'}", home / "bundle", loops=3)
    return home / "bundle"


def test_plugins_compute_what_the_bundle_does(tiny_bundle: Path, gqa: Path) -> None:
    for folder in (tiny_bundle, gqa):
        case = case_of(folder)
        assert has_plugins(folder, case.graph)
        parts = lower(folder, case.graph, "float32", form=MANY_TOKENS, plugins=True)
        operators = {node.op_type for part in parts for node in part.model.graph if node.domain == trt_plugins.DOMAIN}
        attention = "GroupedQueryAttention" if folder == gqa else "LatentAttention"
        assert operators == set(trt_plugins._INPUTS) - {"LatentAttention", "GroupedQueryAttention"} | {attention}
        found = WithBodies(parts, folder, case.graph.file).run(case.step)
        np.testing.assert_allclose(found["logits"], case.expected.logits, atol=2e-4)
        np.testing.assert_allclose(found["new_kv"], case.expected.new_kv, atol=2e-4)
        np.testing.assert_array_equal(found["exit_loop"], case.expected.exit_loop)


def test_types_are_what_the_kernels_take(tiny_bundle: Path) -> None:
    """Activations float32, matrices and cache float16."""
    parts = lower(tiny_bundle, open_bundle(tiny_bundle)[1].graphs[0], "float16", form=MANY_TOKENS, plugins=True)
    halves = {"weight", "gate_up", "down", "w_uk", "w_uv", "past_kv"}
    for node in (node for part in parts for node in part.model.graph if node.domain == trt_plugins.DOMAIN):
        names = trt_plugins._INPUTS[node.op_type]
        for name, value in zip(names, node.inputs, strict=True):
            integer = name in ("past_len", "exit_loop", "loops_left")
            wanted = ir.DataType.INT64 if integer else ir.DataType.FLOAT16 if name in halves else ir.DataType.FLOAT
            assert value is not None
            assert value.dtype == wanted, (node.op_type, name)
        assert node.outputs[0].dtype == ir.DataType.FLOAT


@pytest.fixture
def with_library(fake: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A plugins' library, and what TensorRT's registry was asked to load."""
    asked: list[str] = []
    (tmp_path / "libmythos_plugins.so").touch()
    monkeypatch.setattr(tensorrt_plugins, "LIBRARY", tmp_path / "libmythos_plugins.so")
    fake.get_plugin_registry = lambda: types.SimpleNamespace(load_library=lambda path: asked.append(path) or 1)
    monkeypatch.setattr(cuda_kernels, "problem", lambda: None)
    monkeypatch.setattr(engine_module, "check_engine", lambda *_: (0.0, 1.0, 1))
    monkeypatch.setattr(engine_module, "build_plan", lambda *_: BuiltPlan(b"ftrt", {"Layers": []}, 64, b""))
    tensorrt_plugins.load.cache_clear()
    return asked


@pytest.mark.parametrize("fake", ["10.3.0"], indirect=True)
def test_build_uses_plugins_that_are_there(fake: FakeTensorRT, with_library: list[str], own_bundle: Path) -> None:
    engine = build_engine(own_bundle).engine
    assert engine.plugins == "mythos_plugins"
    assert {plan.form for plan in engine.plans} == {"many_tokens"}  # the kernels serve few tokens as well
    assert with_library == [str(tensorrt_plugins.LIBRARY)]
    # The Runner loads them before it reads a plan.
    tensorrt_plugins.load.cache_clear()
    fake.refuse = True
    with pytest.raises(BackendError, match="made by another version"):
        load(own_bundle, "tensorrt")
    assert len(with_library) == 2


@pytest.mark.parametrize("fake", ["10.3.0"], indirect=True)
def test_where_plugins_are_used(
    fake: FakeTensorRT, with_library: list[str], tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = tensorrt_api.find("tensorrt")

    def uses(folder: Path, wanted: bool | None = None) -> bool:
        return engine_module._uses_plugins(library, folder, open_bundle(folder)[1].graphs[0], wanted)

    assert uses(tiny_bundle)
    assert not uses(tiny_bundle, False)
    quantize_bundle(tiny_bundle, tmp_path / "quantized", "int8")
    with caplog.at_level(logging.WARNING, "mythos_export"):
        assert not uses(tmp_path / "quantized")
    assert "without the TensorRT plugins: they compute with float matrices and caches only" in caplog.text
    tensorrt_plugins.LIBRARY.unlink()
    assert not uses(tiny_bundle)
    with pytest.raises(BackendError, match="make cuda TENSORRT_ROOT"):
        uses(tiny_bundle, True)


def test_plugins_are_for_tensorrt_10(fake: FakeTensorRT, with_library: list[str], own_bundle: Path) -> None:
    with pytest.raises(BackendError, match=r"tensorrt 8\.6\.1 takes none"):
        tensorrt_plugins.load(tensorrt_api.find("tensorrt"))
    with pytest.raises(BackendError, match=r"takes none; plugins are for TensorRT 10"):
        build_engine(own_bundle, options=Options(plugins=True))
    assert not with_library
