"""The shipped Shakespeare model, all the way: export, verify, 200 tokens as they come, the speed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mythos_export.bench import Workload, bench
from mythos_export.export import export_bundle
from mythos_export.report import bench_report
from mythos_export.verify import verify_bundle
from runtimes.errors import InputError
from runtimes.runner import load

PROMPT = "ROMEO.\nBut soft, what light"
_PLACES = ("shakespeare", "../examples/shakespeare")  # in a wheel, in a checkout


def checkpoint_folder() -> Path:
    """Where the shipped checkpoint lies. Raises InputError where the installation lacks it."""
    for place in _PLACES:
        folder = (Path(__file__).parent / place).resolve()
        if folder.is_dir():
            return folder
    raise InputError("the demo's checkpoint is missing from this installation; install mythos-export again")


def demo(output: Path | None, say: bool = True) -> dict[str, Any]:
    """Runs the demo, printing as it goes if say; returns what it saw."""
    if output is not None:
        return _run(output, say)
    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder) / "shakespeare", say)


def _run(bundle: Path, say: bool) -> dict[str, Any]:
    source = checkpoint_folder()

    def tell(text: str, end: str = "\n") -> None:
        if say:
            print(text, end=end, flush=True)

    tell(f"$ mythos-export export {source.name} -o {bundle.name}")
    export_bundle(source, bundle, max_loops=8, force=True)
    tell(f"$ mythos-export verify {bundle.name} {source.name} --loops 1,4,8")
    parity = verify_bundle(bundle, source, tokens=64, loops=(1, 4, 8))
    for check in parity.checks:
        tell(
            f"  {'✓' if check.ok else '✗'} loops {check.loops} {check.name:<10} max abs error {check.max_abs_error:.1e}"
        )
    tell(f"$ mythos-export generate {bundle.name} --prompt {PROMPT!r} -n 200 --temperature 0.8 --top-k 40 --seed 1\n")
    runner = load(bundle)
    generation = runner.generate(PROMPT, 200, temperature=0.8, top_k=40, seed=1, ignore_eos=True)
    tell(PROMPT, end="")
    for token in generation:
        tell(token.text, end="")
    tell(f"\n\n$ mythos-export bench {bundle.name} -p 128 -n 64")
    report = bench(bundle, Workload(128, 64))
    tell(bench_report(report, "table"))
    return {
        "verified": all(check.ok for check in parity.checks),
        "text": generation.text,
        "bench": report.to_dict(),
    }
