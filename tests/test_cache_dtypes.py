"""Bundles with a float16 or int8 cache: what they hold, and that they say what the model in torch says over such a cache.

Where a cache rounds, the last bit of a float may move a cached number by a level and with it a token's choice of an expert, so two
ways that agree do so for the median token, and no token picks another one unless two were as good as equal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_export import footprint
from mythos_export.checkpoint import Checkpoint, load_checkpoint
from mythos_export.config import ModelConfig
from mythos_export.evaluate import WINDOW, evaluate
from mythos_export.export import export_bundle
from mythos_export.inspection import inspect_bundle
from mythos_export.model import Decoder
from mythos_export.model.load import load_decoder
from mythos_export.quantize import quantize_bundle
from mythos_export.trace import trace
from mythos_export.verify import verify_bundle
from runtimes import native_operators
from runtimes.backend import StepInput
from runtimes.bundle import MANIFEST, open_bundle
from runtimes.cache import BLOCK, Cache
from runtimes.errors import BackendError, BundleError, InputError
from runtimes.folder_writer import sha256_of
from runtimes.runner import Runner, load

TORCH_DTYPES = {"float16": torch.float16, "int8": torch.int8}
GQA = (
    '{"vocab_size": 2048, "dim": 48, "n_heads": 4, "n_kv_heads": 2, "attn_type": "gqa", "max_seq_len": 512, "max_loop_iters": 4,'
    '"prelude_layers": 1, "coda_layers": 1, "n_experts": 4, "n_experts_per_tok": 2, "expert_dim": 8, "lora_rank": 2}'
)


class Case:
    """One bundle with the checkpoint it comes from."""

    def __init__(self, name: str, source: Path | str, folder: Path) -> None:
        kind, self.cache_dtype = name.split()
        self.checkpoint = load_checkpoint(source)
        self.path = folder / name.replace(" ", "-")
        loops = 4 if kind == "fixed" else None
        export_bundle(self.checkpoint, self.path, loops=loops, cache_dtype=self.cache_dtype)
        self.runner = load(self.path, threads=2)


@pytest.fixture(scope="module", params=["dynamic float16", "dynamic int8", "fixed float16", "fixed int8", "gqa int8"])
def case(request: pytest.FixtureRequest, shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("cases")
    (folder / "config.json").write_text(GQA)
    source = f"random:{folder / 'config.json'}" if request.param.startswith("gqa") else shakespeare
    return Case(request.param, source, folder)


@pytest.fixture(scope="module")
def int8_bundle(shakespeare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint at two loops with an int8 cache."""
    target = tmp_path_factory.mktemp("int8") / "bundle"
    export_bundle(shakespeare, target, loops=2, cache_dtype="int8")
    return target


class TorchSession:
    """One sequence in torch: the Decoder with its cache grown by concatenation."""

    def __init__(self, checkpoint: Checkpoint, loops: int, dtype: torch.dtype, row_scale: float = 0.0) -> None:
        config = checkpoint.config
        self.decoder: Decoder = load_decoder(checkpoint, max_loops=loops)
        self.decoder.fixed_loops, self.decoder.row_scale = loops, row_scale
        self.past_kv = torch.zeros(config.slots(loops), 1, 0, config.cache_width, dtype=dtype)
        self.past_scale = torch.zeros(config.slots(loops), 1, 0) if dtype == torch.int8 else None

    def advance(self, ids: list[int]) -> np.ndarray:
        """Logits [len(ids), V]."""
        past_len, positions = torch.tensor([self.past_kv.shape[2]]), torch.arange(len(ids))[None]
        with torch.no_grad():
            logits, new_kv, _, *new_scale = self.decoder(
                torch.tensor([ids]), past_len, self.past_kv, positions, past_scale=self.past_scale
            )
        self.past_kv = torch.cat([self.past_kv, new_kv], 2)
        if self.past_scale is not None:
            self.past_scale = torch.cat([self.past_scale, *new_scale], 2)
        return logits[0].numpy()


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 2048, n).tolist()


def check_same(a: np.ndarray, b: np.ndarray, atol: float = 5e-3) -> None:
    """Logits [T, V] that agree but for what rounding may move."""
    assert np.median(np.abs(a - b).max(-1)) <= atol
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a.max() - row_a[row_b.argmax()] < 0.1


def all_logits(runner: Runner, ids: list[int], loops: int, chunk: int = 512) -> np.ndarray:
    return np.concatenate([part.logits for part in runner.session(1, loops, chunk).advance_scored([ids])])


def test_contract(case: Case) -> None:
    """Types of the graph and of the manifest, and that the file is valid and runs where nothing is registered."""
    graph = open_bundle(case.path)[1].graphs[0]
    assert (graph.dtype, graph.cache_dtype, graph.weight_dtype) == ("float32", case.cache_dtype, "float32")
    onnx.checker.check_model(str(case.path / "decoder.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(case.path / "decoder.onnx"))
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    assert inputs["past_kv"].type == outputs["new_kv"].type == f"tensor({case.cache_dtype})"
    if case.cache_dtype == "int8":
        assert inputs["past_scale"].type == outputs["new_scale"].type == "tensor(float)"
        assert inputs["past_scale"].shape == inputs["past_kv"].shape[:3]
        assert outputs["new_scale"].shape == outputs["new_kv"].shape[:3]
    else:
        assert "past_scale" not in inputs
        assert "new_scale" not in outputs


def test_says_what_torch_says(case: Case) -> None:
    """Prefill, then greedy decode, with native kernels and without: the same tokens, logits as near as rounding lets them be."""
    prompt, generated = tokens(24), []
    session = TorchSession(case.checkpoint, 4, TORCH_DTYPES[case.cache_dtype])
    logits = [session.advance(prompt)]
    for _ in range(16):
        generated.append(int(logits[-1][-1].argmax()))
        logits.append(session.advance(generated[-1:]))
    for native in (False, True)[: 1 + native_operators.is_available()]:
        runner = load(case.path, threads=2, native=native)
        assert runner.generate(prompt, 16).complete().ids == generated
        check_same(all_logits(runner, prompt + generated, 4), np.concatenate(logits))


def test_chunked_prefill_equals_one_shot(case: Case) -> None:
    """Across the growth of the buffers, which begin with room for BLOCK tokens."""
    ids = tokens(BLOCK + 90)
    for chunk in (1, 60):
        check_same(all_logits(case.runner, ids, 4, chunk), all_logits(case.runner, ids, 4))


def test_ragged_batch_equals_each_alone(case: Case) -> None:
    """Rows of their own length, some of which leave early."""
    prompts = [tokens(n, seed=n) for n in (1, 5, 33, 270)]
    together = case.runner.session(4, 4, chunk=64)
    alone = [case.runner.session(1, 4) for _ in prompts]
    rows, left = prompts, [0, 1, 2, 3]
    for step in range(5):
        logits, _ = together.advance(rows)
        expected = np.concatenate([alone[b].advance([row])[0] for b, row in zip(left, rows, strict=True)])
        check_same(logits, expected)
        rows = [[int(row)] for row in expected.argmax(-1)]
        if step == 2:
            together.keep([1, 3])
            left, rows = [1, 3], [rows[1], rows[3]]


def test_depth_may_fall_within_a_sequence(case: Case) -> None:
    """20 tokens at 4 loops, then some at 2: over the prelude's, the first two loops' and the coda's rows, as in torch."""
    if case.runner.graph.loops is not None:
        pytest.skip("a fixed loop count does not fall")
    ids, config = tokens(26), case.checkpoint.config
    runner_session = case.runner.session(1, 4)
    runner_session.advance([ids[:20]])
    runner_session.lower_n_loops(2)
    session = TorchSession(case.checkpoint, 4, TORCH_DTYPES[case.cache_dtype])
    session.advance(ids[:20])
    session.decoder.fixed_loops = 2
    first = len(config.prelude)
    kept = [*range(first + 2), *range(first + 4, config.slots(4))]
    session.past_kv = session.past_kv[kept]
    session.past_scale = None if session.past_scale is None else session.past_scale[kept]
    for at in range(20, 26):
        check_same(runner_session.advance([[ids[at]]])[0], session.advance([ids[at]]), atol=2e-2)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3), capacity=st.integers(24, 40), seq=st.integers(1, 4)
)
def test_rows_past_past_len_never_reach_a_result(case: Case, lengths: list[int], capacity: int, seq: int) -> None:
    """Dead rows (of int8 ones the scale) once zero, once NaN, once infinite: identical outputs, bit for bit."""
    graph, batch, random = case.runner.graph, len(lengths), np.random.default_rng(capacity)
    past_len, shape = np.array(lengths), (graph.slots(4), len(lengths), capacity, graph.cache_width)
    past_kv, past_scale = random.standard_normal(shape, dtype=np.float32).astype(graph.cache_dtype), None
    if graph.cache_dtype == "int8":
        past_kv, past_scale = random.integers(-127, 128, shape, dtype=np.int8), np.full(shape[:3], 0.02, np.float32)
    dead = np.arange(capacity)[None, :] >= past_len[:, None]
    ids, positions = random.integers(0, graph.vocab_size, (batch, seq)), np.tile(np.arange(seq), (batch, 1))
    results = []
    for filling in (0.0, np.nan, np.inf):
        (past_kv if past_scale is None else past_scale)[:, dead] = filling
        step = StepInput(ids, past_len, past_kv, positions, np.full(batch, 4), past_scale)
        results.append(case.runner.run_step(step))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(results[0].logits).all()


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    steps=st.lists(st.lists(st.integers(0, 200), min_size=3, max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(["float32", "float16", "int8"]),
    data=st.data(),
)
def test_cache_holds_what_was_appended(batch: int, steps: list[list[int]], dtype: str, data: st.DataObject) -> None:
    random, slots, width = np.random.default_rng(0), 2, 3
    cache = Cache(slots, batch, width, dtype)
    rows = [np.zeros((slots, 0, width)) for _ in range(batch)]
    scales = [np.zeros((slots, 0)) for _ in range(batch)]
    for step in steps:
        counts = np.array(step[:batch])
        new_rows = random.integers(-100, 100, (slots, batch, int(counts.max()), width)).astype(dtype)
        new_scales = random.random(new_rows.shape[:3], dtype=np.float32) if dtype == "int8" else None
        cache.append(new_rows, new_scales, counts)
        for b, count in enumerate(counts):
            rows[b] = np.concatenate([rows[b], new_rows[:, b, :count]], 1)
            if new_scales is not None:
                scales[b] = np.concatenate([scales[b], new_scales[:, b, :count]], 1)
    kept = data.draw(st.lists(st.sampled_from(range(batch)), min_size=1, max_size=batch, unique=True))
    cache.keep(kept)
    assert cache.rows.dtype == dtype
    assert cache.length.tolist() == [rows[b].shape[1] for b in kept]
    for at, b in enumerate(kept):
        np.testing.assert_array_equal(cache.rows[:, at, : cache.length[at]], rows[b])
        if cache.scales is not None:
            np.testing.assert_array_equal(cache.scales[:, at, : cache.length[at]], scales[b])


def test_verify(case: Case, tmp_path: Path) -> None:
    """A sound bundle passes; one whose last norm is not the checkpoint's does not."""
    parity = verify_bundle(case.path, case.checkpoint, tokens=64)
    assert {check.name for check in parity.checks} == {"logits", "new_kv", "exit_loop", "decode"}
    assert all(check.ok for check in parity.checks), parity
    damaged = Path(shutil.copytree(case.path, tmp_path / "damaged"))
    model = onnx.load(damaged / "decoder.onnx", load_external_data=False)
    norm = next(tensor for tensor in model.graph.initializer if tensor.name == "norm")
    where = {entry.key: entry.value for entry in norm.external_data}
    weights = bytearray((damaged / "weights.bin").read_bytes())
    start, length = int(where["offset"]), int(where["length"])
    scaled = np.frombuffer(weights, np.float32, length // 4, start) * np.float32(1.1)
    weights[start : start + length] = scaled.tobytes()
    (damaged / "weights.bin").write_bytes(weights)
    manifest = json.loads((damaged / MANIFEST).read_bytes())
    manifest["files"]["weights.bin"]["sha256"] = sha256_of(damaged / "weights.bin")
    (damaged / MANIFEST).write_text(json.dumps(manifest))
    checks = {check.name: check.ok for check in verify_bundle(damaged, case.checkpoint, tokens=64).checks}
    assert checks == {"logits": False, "new_kv": True, "exit_loop": True, "decode": False}


def test_bytes_of_the_cache(int8_bundle: Path) -> None:
    """Width of 48, four slots: a byte a number and a float32 scale a row."""
    config = ModelConfig.from_dict(open_bundle(int8_bundle)[1].model)
    expected = {"float32": 4 * 48 * 4, "float16": 4 * 48 * 2, "bfloat16": 4 * 48 * 2, "int8": 4 * (48 + 4)}
    for dtype, n_bytes in expected.items():
        assert footprint.cache_bytes(config, 2, 1, dtype) == n_bytes
        assert footprint.cache_bytes(config, 2, 7, dtype) == 7 * n_bytes
    assert inspect_bundle(int8_bundle)["cache_bytes_per_token"] == expected["int8"]


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_with_an_int8_cache(int8_bundle: Path, shakespeare: Path, tmp_path: Path, recipe: str) -> None:
    """Weights and cache quantized: nearly as good a prediction as with the cache alone."""
    manifest = quantize_bundle(int8_bundle, tmp_path / "q", recipe).manifest
    assert manifest.graphs[0].cache_dtype == "int8"
    model = onnx.load(tmp_path / "q" / "decoder.onnx", load_external_data=False)
    attention = [node for node in model.graph.node if "Attention" in node.op_type]
    assert {node.op_type for node in attention} == {"QuantizedLatentAttentionInt8Cache"}
    assert all("row_scale" in {attribute.name for attribute in node.attribute} for node in attention)
    onnx.checker.check_model(str(tmp_path / "q" / "decoder.onnx"), full_check=True)
    text = "ROMEO.\nBut soft, what light through yonder window breaks? It is the east, and Juliet is the sun.\n" * 2
    before, after = (float(np.exp(-load(path).score(text).mean())) for path in (int8_bundle, tmp_path / "q"))
    assert after < before * {"int8": 1.01, "int4": 1.3}[recipe]


def test_a_fixed_row_scale(int8_bundle: Path, shakespeare: Path, tmp_path: Path) -> None:
    """What a quantizer sets on the nodes is what trace and the Decoder take: one scale for all rows."""
    checkpoint = load_checkpoint(shakespeare)
    traced = trace(checkpoint.config, loops=2, max_loops=2, cache_dtype=torch.int8, row_scale=0.0625)
    nodes = [node for node in traced.model.graph if node.op_type == "LatentAttentionInt8Cache"]
    assert [node.attributes["row_scale"].as_float() for node in nodes] == [0.0625] * 4
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    model = onnx.load(bundle / "decoder.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "row_scale":
                attribute.f = 0.0625
    onnx.save(model, bundle / "decoder.onnx")
    manifest, entry = json.loads((bundle / MANIFEST).read_bytes()), bundle / "decoder.onnx"
    manifest["files"]["decoder.onnx"] = {"size": entry.stat().st_size, "sha256": sha256_of(entry)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    runner, ids = load(bundle, threads=2), tokens(40)
    session = TorchSession(checkpoint, 2, torch.int8, row_scale=0.0625)
    check_same(all_logits(runner, ids, 2, chunk=8), session.advance(ids))
    assert (session.past_scale == 0.0625).all()
    assert int(session.past_kv.abs().max()) == 127  # some numbers are larger than 127 levels of it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_dtype": "int4"}, 'cache_dtype is "int4"; expected one of float32, float16, int8'),
        ({"cache_dtype": "bfloat16"}, "numpy, which holds the cache for onnxruntime, has no bfloat16"),
    ],
)
def test_bad_cache_dtypes(arguments: dict, message: str, shakespeare: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(shakespeare, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("row_scale", "cache_dtype"), [(-1.0, torch.int8), (0.1, None), (0.1, torch.float16)])
def test_bad_row_scales(row_scale: float, cache_dtype: torch.dtype | None, shakespeare: Path) -> None:
    config = load_checkpoint(shakespeare).config
    with pytest.raises(InputError, match=f"row_scale is {row_scale} for a cache of"):
        trace(config, loops=1, max_loops=1, cache_dtype=cache_dtype, row_scale=row_scale)


@pytest.mark.parametrize(
    ("cache_dtype", "error", "message"),
    [
        ("bfloat16", BackendError, "float32 with a bfloat16 cache only; .* no bfloat16"),
        ("float32", BundleError, "inputs is .*past_scale.*, the manifest says"),
        ("float16", BundleError, "inputs is .*past_scale.*, the manifest says"),
    ],
)
def test_manifests_that_contradict_their_graph(
    int8_bundle: Path, tmp_path: Path, cache_dtype: str, error: type[Exception], message: str
) -> None:
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest["graphs"][0]["cache_dtype"] = cache_dtype
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(error, match=message):
        load(bundle)


def test_reduced_weights_with_an_int8_cache(shakespeare: Path, tmp_path: Path) -> None:
    """Both graphs of a float16 bundle take it: the wide one that runs here, and the typed one, between onnxruntime's own casts."""
    bundle = tmp_path / "bundle"
    manifest = export_bundle(shakespeare, bundle, loops=1, dtype="float16", cache_dtype="int8")
    assert [(graph.dtype, graph.cache_dtype) for graph in manifest.graphs] == [("float16", "int8"), ("float32", "int8")]
    assert all(check.ok for check in verify_bundle(bundle, shakespeare, tokens=40).checks)
    ids, logits = tokens(40), {}
    for file in ("decoder.onnx", "decoder.float32.onnx"):
        onnx.checker.check_model(str(bundle / file), full_check=True)
        cache = Cache(3, 1, 48, "int8")
        feeds = {
            "input_ids": np.array([ids]),
            "past_len": cache.length,
            "past_kv": cache.rows,
            "past_scale": cache.scales,
        }
        feeds["logit_positions"] = np.arange(len(ids))[None]
        logits[file] = onnxruntime.InferenceSession(str(bundle / file)).run(["logits"], feeds)[0][0]
    assert np.median(np.abs(logits["decoder.onnx"] - logits["decoder.float32.onnx"]).max(-1)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small-mla", "small-gqa"])
def test_perplexity(name: str, shared: Path, tmp_path: Path) -> None:
    """4 windows of text: within 0.1 % of the float32 cache."""
    perplexity = {}
    for dtype in ("float32", "float16", "int8"):
        export_bundle(shared / "checkpoints" / name, tmp_path / dtype, loops=8, cache_dtype=dtype)
        results = evaluate(load(tmp_path / dtype), shared / "text" / "eval.jsonl", None, 4 * WINDOW)
        perplexity[dtype] = results[8].perplexity
    assert perplexity["float16"] == pytest.approx(perplexity["float32"], rel=1e-4)
    assert perplexity["int8"] == pytest.approx(perplexity["float32"], rel=1e-3)


def test_bytes_of_a_batch_are_those_of_the_experts_it_touches() -> None:
    """Against counting: rows of a batch that each choose 2 of 8 experts, every pair as likely."""
    size = footprint.LayerSize({"ffn.gate_up": 10}, rest=0, expert={"ffn.gate_up": 6}, n_experts=8, top_k=2)
    storage = footprint.Storage.of("float32", None)
    rng = np.random.default_rng(0)
    for batch in (1, 3, 20):
        touched = np.mean([len({e for _ in range(batch) for e in rng.permutation(8)[:2]}) for _ in range(3000)])
        read = size.parts_read(batch, storage)[footprint.Part("MixtureOfExperts", "gate_up")]
        assert read == pytest.approx(4 * (10 + 6 * touched), rel=0.01)
