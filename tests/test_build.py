"""Engines from bundles: lowered graphs compute what the bundle does.

Shape letters: B batch, S new tokens, C capacity of the cache, W its width, V vocab_size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from fake_cuda_kernels import mixed

from mythos_export.build.lower import Lowered, LoweredExperts, lower
from mythos_export.export import export_bundle
from mythos_export.overloads import FEW_TOKENS, MANY_TOKENS
from mythos_export.quantize import quantize_bundle
from mythos_export.quantize.bundle import Text
from runtimes.backend import StepInput, StepOutput
from runtimes.bundle import Graph, open_bundle
from runtimes.engines import NEW_KV, NEXT, PAST_KV, STAGES, STATE, ExpertsCall
from runtimes.runner import Runner, load

FORMS = (FEW_TOKENS, MANY_TOKENS)
B, S, C = 2, 3, 40
FLOATS = {"float32": np.float32, "float16": np.float16}
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ATOL = {"float32": 2e-4, "float16": 0.1}
RECIPES = ("int8", "int4", "w8a8", "w8a8-per-loop", "int4,kv-int8")
PROSE = "ROMEO.\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 3


class InOnnxruntime:
    """Lowered parts in onnxruntime (and calls of the kernels in numpy), chained as a runner chains them, fed with the weights that
    an engine would read."""

    def __init__(self, parts: list[Lowered | LoweredExperts], folder: Path) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self.parts = [self._part(part, folder) for part in parts]

    def _part(
        self, part: Lowered | LoweredExperts, folder: Path
    ) -> tuple[str, onnxruntime.InferenceSession | ExpertsCall]:
        if isinstance(part, Lowered):
            return part.stage, self._session(part, folder)
        dtype = FLOATS[part.call.dtype]
        self.weights |= {name: tensor.numpy().astype(dtype) for name, tensor in part.weights.items()}
        return part.call.stage, part.call

    def _session(self, lowered: Lowered, folder: Path) -> onnxruntime.InferenceSession:
        path = folder / "lowered.onnx"  # beside the weights that its constants lie in
        ir.save(lowered.model, path)
        onnx.checker.check_model(path, full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # compute as the graph says
        session = onnxruntime.InferenceSession(path, options)
        types = {value.name: value.type for value in session.get_inputs()}
        self.weights |= {name: tensor.numpy().astype(TYPES[types[name]]) for name, tensor in lowered.weights.items()}
        path.unlink()
        return session

    def run(self, step: StepInput) -> dict[str, np.ndarray]:
        given = {**self.weights, **step._asdict()}
        cache, rows = step.past_kv, list[np.ndarray]()
        e = self._stage("prelude", given, cache, rows)["e"]
        zeros = np.zeros_like(e[..., :1])
        state = dict(zip(STATE, (e, np.zeros_like(e), zeros, zeros.astype(np.int64)), strict=True))
        for loop in range(int(step.n_loops.max())):
            made = self._stage("loop", {**given, **state, "e": e, "loop": np.array(loop)}, cache[len(rows) :], rows)
            state = {name: made[NEXT + name] for name in STATE}
        outputs = self._stage("coda", {**given, "result": state["result"]}, cache[len(rows) :], rows)
        return {**outputs, "new_kv": np.stack(rows), "exit_loop": state["exit_loop"][..., 0]}

    def _stage(
        self, stage: str, given: dict[str, np.ndarray], cache: np.ndarray, rows: list[np.ndarray]
    ) -> dict[str, np.ndarray]:
        made: dict[str, np.ndarray] = {}
        for session in (part for name, part in self.parts if name == stage):
            if isinstance(session, ExpertsCall):
                made[session.mixed] = self._experts(session, made)
                continue
            feeds = {}
            for value in session.get_inputs():
                if value.name.startswith(PAST_KV):
                    feeds[value.name] = cache[int(value.name.removeprefix(PAST_KV))].astype(TYPES[value.type])
                else:
                    feeds[value.name] = made[value.name] if value.name in made else given[value.name]
            names = [value.name for value in session.get_outputs()]
            made |= dict(zip(names, session.run(None, feeds), strict=True))
        rows += [made[name] for name in sorted(name for name in made if name.startswith(NEW_KV))]
        return made

    def _experts(self, call: ExpertsCall, made: dict[str, np.ndarray]) -> np.ndarray:
        stacks = [self.weights[name] for name, _ in call.stacks]
        given = [made[passed.name] for passed in call.given]
        return mixed(*given, (stacks[0], stacks[1]), (stacks[2], stacks[3]) if call.shared else None)


class Case(NamedTuple):
    """A bundle, and a step of two sequences, and what the bundle makes of it."""

    folder: Path
    graph: Graph
    step: StepInput
    expected: StepOutput


def case_of(folder: Path) -> Case:
    with load(folder, native=False) as runner:
        step = step_of(runner.graph)
        return Case(folder, runner.graph, step, runner.run_step(step))


def step_of(graph: Graph) -> StepInput:
    rng = np.random.default_rng(0)
    loops = np.array([4, 7]) if graph.loops is None else np.full(B, graph.loops)
    past_len, slots = np.array([5, 17]), graph.slots(int(loops.max()))
    past = np.full((slots, B, C, graph.cache_width), 7.5, np.float32)  # dead rows are any finite numbers
    for row, length in enumerate(past_len):
        past[:, row, :length] = rng.standard_normal((slots, length, graph.cache_width)) * 0.5
    ids = rng.integers(0, graph.vocab_size, (B, S))
    return StepInput(ids, past_len, past, np.array([[0, 2], [1, 2]]), loops)


@pytest.fixture(scope="session")
def gqa_bundle(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("gqa") / "bundle"
    export_bundle(shared / "checkpoints" / "small-gqa", target, loops=2)
    return target


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.jsonl"
    path.write_text(json.dumps({"text": PROSE * 8}) + "\n")
    return path


@pytest.fixture(scope="session")
def quantized(fixed_bundle: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle by recipe."""
    home = tmp_path_factory.mktemp("quantized")
    for recipe in RECIPES:
        quantize_bundle(fixed_bundle, home / recipe, recipe, text=Text(text, 4, 64) if "w8a8" in recipe else None)
    return {recipe: home / recipe for recipe in RECIPES}


# Lowering


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("fixed_bundle", "float32"), ("tiny_bundle", "float32"), ("tiny_bundle", "float16"), ("gqa_bundle", "float32")],
)
def test_lowered_stages_compute_what_the_bundle_does(request: pytest.FixtureRequest, kind: str, dtype: str) -> None:
    case = case_of(request.getfixturevalue(kind))
    for form in FORMS:
        for old_parser in (False, True):
            parts = lower(case.folder, case.graph, dtype, form=form, old_parser=old_parser)
            check_standard(parts, old_parser)
            check_outputs(InOnnxruntime(parts, case.folder).run(case.step), case, dtype)


def graphs_of(parts: list[Lowered | LoweredExperts]) -> list[Lowered]:
    return [part for part in parts if isinstance(part, Lowered)]


def check_standard(parts: list[Lowered | LoweredExperts], old_parser: bool) -> None:
    """Standard operators, no branches, no loops, every matrix an input, or read by a call of the kernels."""
    assert list(dict.fromkeys(lowered.stage for lowered in graphs_of(parts))) == list(STAGES)
    inputs = {name for part in parts if isinstance(part, LoweredExperts) for name in part.weights}
    for lowered in graphs_of(parts):
        nodes = list(ir.traversal.RecursiveGraphIterator(lowered.model.graph))
        assert {node.domain for node in nodes} <= {""}
        assert not [node for node in nodes if node.op_type in ("If", "Loop")]
        assert not lowered.model.functions
        assert lowered.model.opset_imports[""] == (17 if old_parser else 21)
        own = {value.name for value in lowered.model.graph.inputs}
        assert set(lowered.weights) <= own
        inputs |= own
        large = [value for value in lowered.model.graph.initializers.values() if value.const_value.nbytes >= 1 << 16]
        assert not [value.name for value in large if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)]
    assert {"embed", "recurrent.layers.0.ffn.gate_up.routed", "recurrent.layers.0.ffn.down.routed"} <= inputs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_for_the_old_parser_reduced_experts_are_calls_of_the_kernels(fixed_bundle: Path, dtype: str) -> None:
    """TensorRT 8.6 widens such stacks; all that it computes is float32."""
    graph = open_bundle(fixed_bundle)[1].graphs[0]
    for form in FORMS:
        parts = lower(fixed_bundle, graph, dtype, form=form, old_parser=True)
        (experts,) = (part for part in parts if isinstance(part, LoweredExperts))
        call, loop = experts.call, [part for part in graphs_of(parts) if part.stage == "loop"]
        assert ([part.part for part in loop], call.part) == ([0, 2], 1)
        assert (call.stage, call.form, call.dtype) == ("loop", form, dtype)
        assert [name for name, _ in call.stacks] == list(experts.weights)
        for name, shape in call.stacks:
            assert (name.startswith("recurrent.layers.0.ffn."), tuple(experts.weights[name].shape)) == (True, shape)
        given, made = ({passed.name for passed in side} for side in (call.given, call.passes))
        assert given <= {value.name for value in loop[0].model.graph.outputs}
        assert made <= {value.name for value in loop[1].model.graph.inputs}
        for lowered in graphs_of(parts):
            types = {value.dtype for value in lowered.model.graph.inputs if value.name in lowered.weights}
            assert types <= {ir.DataType.FLOAT}
            assert not set(lowered.weights) & set(experts.weights)


def test_the_loop_is_the_same_whether_its_count_is_fixed_or_not(fixed_bundle: Path, tiny_bundle: Path) -> None:
    graphs = []
    for folder in (fixed_bundle, tiny_bundle):
        (loop,) = (
            part.model.graph
            for part in lower(folder, open_bundle(folder)[1].graphs[0], "float32", form=FEW_TOKENS)
            if part.stage == "loop"
        )
        graphs.append([node.op_type for node in loop])
    assert graphs[0] == graphs[1]


def test_sizes_that_never_change_are_fixed(fixed_bundle: Path) -> None:
    graph, one = open_bundle(fixed_bundle)[1].graphs[0], {"batch": 1, "seq": 1, "tokens": 1, "k": 1}
    parts = lower(fixed_bundle, graph, "float16", form=FEW_TOKENS, sizes=one, old_parser=True)
    for lowered in graphs_of(parts):
        shapes = [value.shape for value in lowered.model.graph.inputs if value.name not in lowered.weights]
        free = {str(dim) for shape in shapes for dim in shape if not isinstance(dim, int)}
        assert free <= {"capacity"}


def check_outputs(outputs: dict[str, np.ndarray], case: Case, dtype: str) -> None:
    expected, atol = case.expected, ATOL[dtype]
    np.testing.assert_allclose(outputs["logits"], expected.logits, rtol=0, atol=atol)
    np.testing.assert_allclose(outputs["new_kv"].astype(np.float32), expected.new_kv, rtol=0, atol=atol)
    if dtype == "float32":
        np.testing.assert_array_equal(outputs["exit_loop"], expected.exit_loop)
    logits = outputs["logits"].astype(np.float64)
    np.testing.assert_array_equal(outputs["next_token"], logits.argmax(-1))  # argmax takes the lowest of equals as well
    largest = logits.max(-1, keepdims=True)
    np.testing.assert_allclose(outputs["next_logprob"], -np.log(np.exp(logits - largest).sum(-1)), rtol=0, atol=1e-5)


def test_dead_cache_rows_change_nothing(fixed_bundle: Path) -> None:
    folder, graph = fixed_bundle, open_bundle(fixed_bundle)[1].graphs[0]
    step = step_of(graph)
    live = np.arange(C) < step.past_len[:, None]
    for form in FORMS:
        engine = InOnnxruntime(lower(folder, graph, "float32", form=form), folder)
        with_numbers = engine.run(step)
        with_zeros = engine.run(step._replace(past_kv=np.where(live[..., None], step.past_kv, np.float32(0))))
        for name, output in with_numbers.items():
            np.testing.assert_array_equal(output, with_zeros[name], err_msg=f"{form} {name}")


def test_of_equal_logits_the_lowest_id_is_the_next_token(fixed_bundle: Path) -> None:
    graph = open_bundle(fixed_bundle)[1].graphs[0]
    engine = InOnnxruntime(lower(fixed_bundle, graph, "float32", form=MANY_TOKENS), fixed_bundle)
    for name in engine.weights:
        engine.weights[name] = np.zeros_like(engine.weights[name])
    outputs = engine.run(step_of(graph))
    assert not outputs["logits"].any()
    assert not outputs["next_token"].any()
    np.testing.assert_allclose(outputs["next_logprob"], -np.log(graph.vocab_size), rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_lowered_quantized_graph_predicts_as_the_bundle_does(quantized: dict[str, Path], recipe: str) -> None:
    """Not to the last bit: engines round activations to -128 as well, keep the cache as floats and dequantize in their dtype."""
    folder = quantized[recipe]
    with load(folder, native=False) as runner:
        step, graph = first_step(runner, PROSE), runner.graph
        expected = runner.run_step(step)
    for form in FORMS:
        parts = lower(folder, graph, "float32", form=form)
        assert not computed_scales(parts)
        past = np.zeros(step.past_kv.shape, np.float32)
        outputs = InOnnxruntime(parts, folder).run(step._replace(past_kv=past))
        assert kl_mean(expected.logits, outputs["logits"]) < 0.01, form


def computed_scales(parts: list[Lowered]) -> list[str | None]:
    """Names of roundings whose scale is no constant, which TensorRT refuses."""
    nodes = [node for part in parts for node in part.model.graph if "quantizelinear" in node.op_type.lower()]
    return [node.name for node in nodes if not node.inputs[1].is_initializer() and node.inputs[1].const_value is None]


def first_step(runner: Runner, text: str) -> StepInput:
    """A whole text at once, nothing before it."""
    graph, ids = runner.graph, np.array([runner.encode(text)])
    loops = np.full(1, graph.loops)
    past = np.zeros((graph.slots(int(loops[0])), 1, 1, graph.cache_width), graph.cache_dtype)
    scale = np.ones(past.shape[:-1], np.float32) if graph.cache_dtype == "int8" else None
    return StepInput(ids, np.zeros(1, np.int64), past, np.arange(ids.shape[1])[None], loops, scale)


def kl_mean(of: np.ndarray, other: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence, in nats, of what logits [..., V] predict."""
    logs = [
        logits - np.log(np.exp(logits).sum(-1, keepdims=True)) for logits in (of.astype(float), other.astype(float))
    ]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())
