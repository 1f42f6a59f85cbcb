"""Who imports whom, and the wheel: in an empty environment without torch it loads a bundle and generates."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from runtimes.runner import Runner

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "runtimes": {"torch", "onnx", "mythos_export", "calibration"},
    "calibration": {"mythos_export"},
    "mythos_export": {"tests", "open_mythos"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert name.partition(".")[0] not in FORBIDDEN[package], f"{path} imports {name}"


def test_running_a_bundle_imports_no_torch(tiny_bundle: Path) -> None:
    code = (
        "import sys; from mythos_export import load; r = load(sys.argv[1]); r.generate('O', 2).complete(); "
        "import mythos_export.bench, mythos_export.evaluate, mythos_export.inspection; "
        "assert not {'torch', 'onnx'} & set(sys.modules), 'torch or onnx was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], check=True, cwd=ROOT)


@pytest.mark.slow
def test_wheel_without_torch(tiny_bundle: Path, runner: Runner, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")

    def run(*command: object, fails: bool = False) -> str:
        result = subprocess.run(
            [str(part) for part in command], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert (result.returncode != 0) is fails, result.stdout + result.stderr
        return result.stderr if fails else result.stdout

    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    binaries = tmp_path / "empty" / "bin"
    run(binaries / "pip", "install", "--quiet", wheel)
    run(binaries / "python", "-c", "import torch", fails=True)
    output = run(binaries / "mythos-export", "generate", tiny_bundle, "--prompt", "JULIET.", "-n", 16, "--json")
    assert json.loads(output)["ids"] == runner.generate("JULIET.", 16).complete().ids
    run(binaries / "python", "-c", "from mythos_export import load, Runner, InputError; import runtimes, calibration")
    message = run(binaries / "mythos-export", "export", "random:mythos_1b", "-o", "never", fails=True)
    assert "pip install 'mythos-export[export]'" in message
