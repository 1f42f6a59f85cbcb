"""The command line: names, JSON keys and exit codes that others rely on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from mythos_export.cli import app
from runtimes.bundle import MANIFEST, open_bundle
from runtimes.errors import InputError
from runtimes.runner import Runner


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: object, code: int = 0) -> dict:
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_export(shakespeare: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    plain = run_json(
        "export", shakespeare, "-o", target, "--loops", "2", "--dtype", "bfloat16", "--cache-dtype", "int8"
    )
    assert plain["loops"] == 2
    assert plain["dtype"] == "bfloat16"
    assert plain["cache_dtype"] == "int8"
    assert plain["bytes"] == sum(path.stat().st_size for path in target.iterdir() if path.name != MANIFEST)


def test_verify_writes_its_figures(bundle: Path, shakespeare: Path) -> None:
    plain = run_json("verify", bundle, shakespeare, "--loops", "1,12", "--tokens", "40")
    assert plain["ok"] is True
    assert {(check["name"], check["loops"]) for check in plain["checks"]} == {
        (name, loops) for name in ("logits", "new_kv", "exit_loop", "decode", "reference") for loops in (1, 12)
    }
    for check in plain["checks"]:
        assert set(check) == {"name", "loops", "max_abs_error", "tolerance", "ok"}
        assert check["ok"] is (check["max_abs_error"] <= check["tolerance"])
    parity = open_bundle(bundle)[1].parity
    assert parity is not None
    assert [msgspec.to_builtins(check) for check in parity.checks] == plain["checks"]
    assert "✓ loops 12" in run("verify", bundle, shakespeare, "--loops", "12", "--tokens", "16").stdout


def test_verify_fails_beyond_tolerance(bundle: Path, shakespeare: Path) -> None:
    """A bundle whose weights are not the checkpoint's, its checksums in order: exit 1 and the lines that say where."""
    weights = bytearray((bundle / "weights.bin").read_bytes())
    weights[3] ^= 0x01  # one exponent bit of the first embedding
    (bundle / "weights.bin").write_bytes(weights)
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    from runtimes.folder_writer import sha256_of

    manifest["files"]["weights.bin"]["sha256"] = sha256_of(bundle / "weights.bin")
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    plain = run_json("verify", bundle, shakespeare, "--tokens", "40", code=1)
    assert plain["ok"] is False
    assert not next(check for check in plain["checks"] if check["name"] == "logits")["ok"]


def test_generate(bundle: Path, runner: Runner) -> None:
    ids = runner.encode("MACBETH.\nIs this a dagger")
    plain = run_json("generate", bundle, "--ids", ",".join(map(str, ids)), "--max-new-tokens", 12, "--loops", 5)
    assert plain["ids"] == runner.generate(ids, 12, n_loops=5).complete().ids
    assert plain["text"] == runner.decode(plain["ids"])
    assert plain["timings"]["new_tokens"] == 12
    text = run("generate", bundle, "--prompt", "MACBETH.\nIs this a dagger", "-n", 12, "--loops", 5, "--quiet")
    assert text.stdout == plain["text"] + "\n"
    sampled = ("generate", bundle, "--ids", "5,6", "--temperature", "1.0", "--top-k", 50, "--top-p", "0.9", "--seed", 3)
    assert run_json(*sampled)["ids"] == run_json(*sampled)["ids"]


def test_eval(bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "To be, or not to be, that is the question."}\n')
    plain = run_json("eval", bundle, "--text", text, "--loops", "1,4")
    assert set(plain["loops"]) == {"1", "4"}
    for quality in plain["loops"].values():
        assert set(quality) == {"perplexity", "perplexity_stderr", "bits_per_byte", "tokens", "windows"}
    table = run("eval", bundle, "--text", text, "--max-tokens", 5).stdout
    assert "perplexity" in table
    assert "tokens: 5, windows: 1" in table
    assert "tokens" not in run("eval", bundle, "--text", text, "--max-tokens", 5, "--quiet").stdout


def test_eval_against(bundle: Path, shakespeare: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "To be, or not to be, that is the question."}\n{"text": "ROMEO.\\nBut soft"}\n')
    for other in (bundle, shakespeare):
        plain = run_json("eval", bundle, "--text", text, "--against", other, "--loops", "1,4")
        assert plain["against"] == str(other)
        for result in plain["loops"].values():
            assert set(result["against"]) == {
                "perplexity", "perplexity_stderr", "bits_per_byte", "tokens", "windows", "perplexity_ratio",
                "perplexity_ratio_stderr", "kl_mean", "kl_mean_stderr", "kl_median", "kl_q999", "top1_agreement",
                "top1_agreement_stderr",
            }  # fmt: skip
            assert result["against"]["top1_agreement"] == 1
    table = run("eval", bundle, "--text", text, "--against", bundle, "--loops", "1").stdout
    assert "100.00 %" in table
    assert "KL(against ‖ bundle)" in table


def test_bench(bundle: Path, shakespeare: Path) -> None:
    plain = run_json("bench", bundle, "-p", 16, "-n", 4, "-r", 2, "--reference", shakespeare)
    assert [row["test"] for row in plain["rows"]] == ["pp16", "tg4"]
    for row in plain["rows"]:
        assert {
            "test", "tokens_per_second", "std", "bytes_per_token", "gb_per_second", "bandwidth_share", "ratio_to_reference"
        } <= set(row)  # fmt: skip
        assert row["ratio_to_reference"] > 0
        assert row["gb_per_second"] == pytest.approx(row["tokens_per_second"] * row["bytes_per_token"] / 1e9)
    assert plain["read_bandwidth_gb_per_second"] > 0
    assert plain["peak_memory_bytes"] > 0
    assert plain["environment"]["loops"] == 4
    assert plain["environment"]["cache_dtype"] == "float32"
    alone = run_json("bench", bundle, "--attention", "8,300", "-r", 1, "--cache-dtype", "int8")
    assert [row["bytes"] for row in alone["rows"]] == [8 * (48 + 4), 300 * (48 + 4)]
    assert alone["environment"]["cache_dtype"] == "int8"
    assert run("bench", bundle, "-p", 0, "-n", 2, "-r", 1, "-o", "md").stdout.startswith("| test ")
    assert run("bench", bundle, "-p", 4, "-n", 0, "-r", 1, "-o", "csv").stdout.startswith("test,tokens_per_second,")
    assert json.loads(run("bench", bundle, "-p", 4, "-n", 0, "-r", 1, "-o", "json").stdout)["rows"]
    with pytest.raises(InputError, match="--chunk is 0; expected at least 1"):
        run("bench", bundle, "--chunk", 0)


@pytest.mark.parametrize(("cache", "row_bytes"), [("float32", 4 * 48), ("bfloat16", 2 * 48), ("int8", 48 + 4)])
def test_bench_attention(tiny_bundle: Path, cache: str, row_bytes: int) -> None:
    """Rows of 48 channels, int8 ones with a scale."""
    from mythos_export.bench_attention import bench_attention

    report = bench_attention(tiny_bundle, [8, 300], cache, 1)
    assert [row.bytes for row in report.rows] == [8 * row_bytes, 300 * row_bytes]


def test_inspect_and_doctor(bundle: Path) -> None:
    plain = run_json("inspect", bundle)
    assert plain["model"]["dim"] == 128
    assert plain["source"]["step"] == 1460
    assert plain["cache_bytes_per_token"] == 6 * 48 * 4
    assert "1 to 12 loops" in run("inspect", bundle).stdout
    assert "float32 cache" in run("inspect", bundle).stdout
    health = run_json("doctor")
    for task in ("run", "export", "compare with the reference"):
        assert health["can"][task] is True
    for task in ("run engines of tensorrt", "run engines of tensorrt-rtx"):
        assert health["can"][task] is (task not in health["missing"])
    assert health["packages"]["onnxruntime"]
    assert bool(health["native_operators"]) is ("native operators" not in health["missing"])
    assert bool(health["cuda_kernels"]) is ("CUDA kernels" not in health["missing"])
    shown = run("doctor").stdout
    assert "✓ export" in shown
    assert "CUDA kernels: " in shown


def test_counts_match_the_model(bundle: Path, shakespeare: Path) -> None:
    """Parameters counted from the description equal those of the checkpoint."""
    from mythos_export.checkpoint import load_checkpoint

    state = load_checkpoint(shakespeare).state_dict()
    tables = {"head.weight", "recurrent.lora.scale.weight", "recurrent.injection.log_dt"}
    expected = sum(tensor.numel() for name, tensor in state.items() if name not in tables)
    assert run_json("inspect", bundle)["parameters"] == expected


def test_demo() -> None:
    plain = run_json("demo")
    assert plain["verified"] is True
    assert len(plain["text"]) > 200
