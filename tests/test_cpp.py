"""The Runner in C: the same tokens as Python's, and an SDK that programs build against."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from c_runtime import CANCELLED, OK, CError, CRunner, CSession, Library
from cpp_sdk import ROOT, run, tool

from mythos_export import bench
from mythos_export.report import size
from runtimes import native_operators
from runtimes.runner import Runner, load

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [400, 3, 77], list(range(100, 145)), [2]]
SAMPLED = (
    {"temperature": 0.9, "top_k": 50, "seed": 3},
    {"temperature": 1.1, "top_p": 0.9, "seed": 2**63 + 5},
    {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 5},
    {"temperature": 2.5, "top_k": 700, "top_p": 0.95, "min_p": 0.001, "seed": 7},
)


@pytest.fixture(params=["tiny_bundle", "fixed_bundle", "int4_bundle"])
def both(request: pytest.FixtureRequest, library: Library) -> tuple[CRunner, Runner]:
    """A bundle in C and in Python, on the same operators."""
    bundle = request.getfixturevalue(request.param)
    options = {"threads": 1, "native": 0}
    if native_operators.is_available():
        options = {"threads": 1, "operators_library": str(native_operators.LIBRARY).encode()}
    in_c, in_python = library.open(bundle, **options), load(bundle, "onnxruntime", threads=1)
    assert bool(in_c.info.native) == in_python.native
    return in_c, in_python


# The same as Python


def test_tokens_are_pythons(both: tuple[CRunner, Runner]) -> None:
    in_c, in_python = both
    for options in ({}, {"repetition_penalty": 1.3}, *SAMPLED):
        for prompts in ([PROMPTS[0]], PROMPTS):
            status, ids, finish, stats = in_c.generate(prompts, max_new_tokens=128, ignore_eos=1, **options)
            seed = options.get("seed", 0)
            want = in_python.generate(prompts, 128, ignore_eos=True, **{**options, "seed": seed}).complete()
            assert (status, ids, finish) == (OK, want.ids, want.finish_reasons)
            assert stats.new_tokens == want.stats.new_tokens
            assert stats.prompt_tokens == want.stats.prompt_tokens
            assert stats.mean_exit_loop == pytest.approx(want.stats.mean_exit_loop)


PLAIN = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 4096,
}  # fmt: skip
MIXTRAL = {
    **PLAIN, "architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": 8,
}  # fmt: skip
DEEPSEEK = {
    **PLAIN, "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 8, "moe_intermediate_size": 24, "n_group": 4,
    "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 24, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 10, "attention_bias": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "cache_dtype", "window"), [(MIXTRAL, "float32", 8), (MIXTRAL, "int8", 8), (DEEPSEEK, "float32", 0)]
)
def test_a_model_without_a_loop_is_as_in_python(
    library: Library, tmp_path: Path, config: dict[str, object], cache_dtype: str, window: int
) -> None:
    """With a window of 8, and so a cache of 8 rows: chunks shorter and longer than it, ragged, some stopped on their way."""
    from mythos_export.export import export_bundle

    (tmp_path / "config.json").write_text(json.dumps(config))
    export_bundle(f"random:{tmp_path / 'config.json'}", tmp_path / "bundle", cache_dtype=cache_dtype)
    in_c, in_python = (opened(tmp_path / "bundle", threads=1, native=0) for opened in (library.open, load))
    assert (in_c.info.loops, in_c.info.max_loops, in_c.info.window) == (0, 0, window)
    prompts = [[5, 6, 7], [1]]
    _, ids, _, _ = in_c.generate(prompts, max_new_tokens=40, ignore_eos=1)
    assert ids == in_python.generate(prompts, 40, ignore_eos=True).complete().ids
    with pytest.raises(CError, match="n_loops is 2, but the model has no loop; leave it out"):
        in_c.session(1, [2])
    ids = np.random.default_rng(0).integers(0, 97, 3000).tolist()
    slow = library.open(tmp_path / "bundle", threads=1, native=0, prefill_chunk=1).session(3)
    sessions = in_c.session(3), in_python.session(3, chunk=5), slow
    for rows in ([ids[:3], ids[:50], ids[:8]], [ids[3:4], ids[50:57], ids[8:30]]):
        got, want, _ = (session.advance(rows)[0] for session in sessions)
        np.testing.assert_allclose(got, want, atol=2e-3 if cache_dtype == "int8" else 1e-5)
    stopper = threading.Timer(0.02, slow.cancel)
    stopper.start()
    with pytest.raises(CError, match="cancelled"):
        slow.advance([ids, ids, ids])
    slow.resume()
    for session in sessions:
        session.keep([0, 2])
    got, _, again = (session.advance([[7], [9]])[0] for session in sessions)
    np.testing.assert_allclose(again, got, atol=2e-3 if cache_dtype == "int8" else 1e-5)


def test_bytes_of_a_step_are_pythons(both: tuple[CRunner, Runner]) -> None:
    in_c, in_python = both
    for batch, context in ((1, 0), (3, 40)):
        workload = bench.Workload(prompt=16, new=4, context=context, batch=batch)
        loops = workload.check(in_python)
        prefill, decode = (bench.bytes_per_token(in_python, name, workload, loops) for name in ("pp", "tg"))
        assert in_c.step_bytes(batch, 16, 0) / (16 * batch) == pytest.approx(prefill)
        assert in_c.step_bytes(batch, 1, context + 2.5) / batch == pytest.approx(decode)
    with pytest.raises(CError, match="tokens 0 and past_len"):
        in_c.step_bytes(1, 0, 0)


def test_sequences_end_as_in_python(both: tuple[CRunner, Runner]) -> None:
    in_c, in_python = both
    whole = in_python.generate(PROMPTS, 30, ignore_eos=True).complete().ids
    stops = [whole[0][4], whole[2][9]]
    _, ids, finish, _ = in_c.generate(PROMPTS, max_new_tokens=30, stop_ids=stops, ignore_eos=1)
    want = in_python.generate(PROMPTS, 30, stop=stops, ignore_eos=True).complete()
    assert (ids, finish) == (want.ids, want.finish_reasons)
    long = [list(range(1, 505))]
    _, ids, finish, _ = in_c.generate(long, max_new_tokens=30, ignore_eos=1)
    assert (len(ids[0]), finish) == (9, ["context"])


def test_scores_and_sessions_are_pythons(both: tuple[CRunner, Runner]) -> None:
    in_c, in_python = both
    ids = np.random.default_rng(0).integers(0, in_python.graph.vocab_size, 300).tolist()
    np.testing.assert_allclose(in_c.score(ids), in_python.score(ids), atol=1e-6)
    sessions = in_c.session(3), in_python.session(3)
    rows = [ids[:200], ids[:3], ids[5:40]]
    for step in range(4):
        (got, got_exit), (want, want_exit) = (session.advance(rows) for session in sessions)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got_exit, want_exit)
        if step == 1:
            for session in sessions:
                session.keep([0, 2])
        rows = [ids[step : 90 - step], [step + 2], [step + 3]][: len(sessions[1].past_len)]  # the cache grows
    assert sessions[0].past_len == sessions[1].past_len.tolist()


def test_prompts_in_small_chunks(library: Library, tiny_bundle: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 2048, 100).tolist()
    whole, parts = (library.open(tiny_bundle, threads=1, native=0, prefill_chunk=chunk) for chunk in (0, 7))
    np.testing.assert_allclose(parts.score(ids), whole.score(ids), atol=1e-4)
    logits = [runner.session(2).advance([ids, ids[:9]])[0] for runner in (whole, parts)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    with pytest.raises(CError, match="prefill_chunk is -1; expected 0"):
        library.open(tiny_bundle, prefill_chunk=-1)


def test_depths_of_each_sequence(library: Library, tiny_bundle: Path) -> None:
    in_c, in_python = (
        library.open(tiny_bundle, native=0, threads=1),
        load(tiny_bundle, "onnxruntime", threads=1, native=False),
    )
    depths = [1, 4, 2, 3]
    _, ids, _, _ = in_c.generate(PROMPTS, max_new_tokens=20, n_loops=depths, ignore_eos=1)
    assert ids == in_python.generate(PROMPTS, 20, n_loops=depths, ignore_eos=True).complete().ids
    sessions = in_c.session(2, [4, 3]), in_python.session(2, n_loops=[4, 3])
    for session in sessions:
        session.advance([[5, 6, 7], [8, 9]])
        session.lower_n_loops([2, 1])
    np.testing.assert_array_equal(*(session.advance([[1], [2]])[0] for session in sessions))
    with pytest.raises(CError, match="n_loops of sequence 0 would rise from 2 to 3: its earlier tokens left no cache"):
        sessions[0].lower_n_loops([3, 1])
    assert sessions[0].past_len == [4, 3]


# Stopping


def test_a_callback_stops_a_generation(library: Library, tiny_bundle: Path) -> None:
    runner = library.open(tiny_bundle, threads=1)
    heard: list[int] = []
    status, ids, finish, stats = runner.generate(PROMPTS[:2], lambda token: heard.append(token.id) or len(heard) >= 4)
    assert (status, finish) == (CANCELLED, ["cancelled", "cancelled"])
    assert stats.new_tokens == len(ids[0]) + len(ids[1]) == 4


def test_a_session_is_cancelled_and_goes_on(library: Library, tiny_bundle: Path) -> None:
    runner = library.open(tiny_bundle, threads=1)
    session, other = runner.session(), runner.session()
    for each in (session, other):
        each.advance([[1, 2, 3]])
    stopper = threading.Timer(0.02, session.cancel)
    stopper.start()
    assert until_stopped(session).status == CANCELLED
    stopper.join()
    session.cancel()
    with pytest.raises(CError, match="was cancelled; mythos_session_resume makes it usable again"):
        session.advance([[4]])
    before = session.past_len
    session.resume()
    session.advance([[4]])
    assert session.past_len == [before[0] + 1]
    other.advance([[4]])


def until_stopped(session: CSession) -> CError:
    """Adds tokens until a step does not succeed."""
    while True:
        try:
            session.advance([[4]])
        except CError as error:
            return error


def test_threads_with_sessions_of_their_own(library: Library, tiny_bundle: Path) -> None:
    runner = library.open(tiny_bundle, threads=1)
    want = runner.generate(PROMPTS, max_new_tokens=30)[1]
    results: list[list[list[int]]] = []

    def work() -> None:
        for _ in range(3):
            results.append(runner.generate(PROMPTS, max_new_tokens=30)[1])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [want] * 12


# The SDK


@pytest.fixture(scope="session")
def programs(sdk: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, built against the installed SDK."""
    build = tmp_path_factory.mktemp("examples")
    run(tool("cmake"), "-S", ROOT / "examples" / "cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={sdk}")
    run(tool("cmake"), "--build", build, "--parallel", "2")
    return build


def test_programs_give_pythons_tokens(programs: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    python = load(tiny_bundle, "onnxruntime")
    for options in ({}, {"temperature": 0.8, "seed": 9}):
        extra = [f"{value}" for value in options.values()]
        out = run(programs / "generate", tiny_bundle, "5,6,7", 128, *extra)
        want = python.generate([5, 6, 7], 128, **options).complete().ids
        assert [int(token) for token in out.split()] == want
    ticks = run(programs / "robot_loop", tiny_bundle, 20, 3).splitlines()
    assert [line.partition(":")[0] for line in ticks] == ["tick 0", "tick 1", "tick 2"]
    failed = subprocess.run([programs / "generate", tmp_path, "1"], capture_output=True, text=True, check=False)
    assert (failed.returncode, "not a bundle" in failed.stderr) == (2, True)


def test_a_program_without_onnxruntime_says_so(programs: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for library, said in (
        (tmp_path / "none.so", "found no library of onnxruntime"),
        (native_operators.LIBRARY, "not a library of onnxruntime"),
    ):
        if library == native_operators.LIBRARY and not native_operators.is_available():
            continue
        environment = os.environ | {"MYTHOS_ONNXRUNTIME": str(library)}
        done = subprocess.run(
            [programs / "generate", tiny_bundle, "1"], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert "in MYTHOS_ONNXRUNTIME" in done.stderr


def test_a_chat(sdk: Path, library: Library, programs: Path, tiny_bundle: Path) -> None:
    if not library.open(tiny_bundle, threads=1).info.has_text:
        pytest.skip("text is not built in; `make cpp` says why")
    prompt = "JULIET.\nO gentle night,\n"
    said = run(programs / "chat", tiny_bundle, 40, input=prompt)
    python, ids = load(tiny_bundle, "onnxruntime"), []
    want = ""
    for line in prompt.splitlines(keepends=True):
        ids += python.encode(line)
        answer = python.generate(ids, 40, stop="\n\n").complete()
        ids, want = ids + answer.ids, f"{want}{answer.text}\n\n"
    assert said == want


def test_a_bench(programs: Path, tiny_bundle: Path) -> None:
    """The table of `mythos-export bench`."""
    lines = run(programs / "bench", tiny_bundle, "-p", 16, "-n", 4, "-r", 1, "-d", 8, "--threads", 1).splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert head == ["test", "t/s", "± std", "bytes/token", "GB/s", "share of read bandwidth"]
    runner, workload = load(tiny_bundle, "onnxruntime"), bench.Workload(prompt=16, new=4, context=8)
    loops = workload.check(runner)
    n_bytes = [size(bench.bytes_per_token(runner, name, workload, loops)) for name in ("pp", "tg")]
    assert [(row[0], row[3]) for row in rows] == list(zip(["pp16", "tg4 @ d8"], n_bytes, strict=True))
    for said in ("read bandwidth here ", "peak memory ", "of it weights ", "cache "):
        assert said in lines[-1]
    refused = subprocess.run([programs / "bench", tiny_bundle, "-r", "0"], capture_output=True, text=True, check=False)
    assert (refused.returncode, "-r and -b at least 1" in refused.stderr) == (2, True)


def test_nothing_but_the_c_functions_is_exported(sdk: Path) -> None:
    symbols = run(tool("nm"), "-D", "--defined-only", next(sdk.glob("lib*/libmythos_runtime.so")))
    names = {line.split()[-1].partition("@")[0] for line in symbols.splitlines()} - {"MYTHOS_1"}
    assert {name for name in names if not name.startswith("mythos_")} == set()
    assert {"mythos_generate", "mythos_abi_version"} <= names


def test_pkg_config_knows_it(sdk: Path) -> None:
    (file,) = sdk.glob("lib*/pkgconfig/mythos_runtime.pc")
    assert "-lmythos_runtime" in file.read_text()
