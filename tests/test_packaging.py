"""Who imports whom, and the wheels, with the native operators and without: no torch, and yet they load a bundle and generate."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from cpp_sdk import tool

from runtimes import native_operators
from runtimes.runner import Runner

ROOT = Path(__file__).parent.parent
LIBRARY = "runtimes/native/lib/libmythos_ops.so"
CPP_LIBRARY = "runtimes/cpp/sdk/lib/libmythos_runtime.so"
FORBIDDEN = {
    "runtimes": {"torch", "onnx", "mythos_export", "calibration"},
    "calibration": {"mythos_export"},
    "mythos_export": {"tests", "open_mythos"},
    "optimum": {"torch", "transformers"},
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


class Shell:
    """Runs commands in a folder, with no more of this environment than the tested versions and the headers already found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
        self.environment["MYTHOS_TEXT"] = "OFF"  # of the C++ library, which takes minutes to build in
        cache = ROOT / "runtimes" / "native" / "build" / platform.machine() / "CMakeCache.txt"
        for line in cache.read_text().splitlines() if cache.is_file() else []:
            name, _, value = line.partition(":PATH=")
            if name.endswith("_INCLUDE_DIR") and Path(value).is_dir():
                self.environment[name] = value

    def __call__(self, *command: object, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(part) for part in command],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert (result.returncode != 0) is fails, result.stdout + result.stderr
        return result


@pytest.mark.slow
def test_wheel_without_torch(tiny_bundle: Path, runner: Runner, tmp_path: Path) -> None:
    """From the source distribution, into an empty environment."""
    run = Shell(tmp_path)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == set(FORBIDDEN)
    assert {Path(name).suffix for name in names if name.startswith("runtimes/native/")} <= {".so"}
    assert "mythos_export/shakespeare/tokenizer.json" in names
    assert wheel.name.endswith("-py3-none-any.whl") is not (LIBRARY in names)
    venv.create(tmp_path / "empty", with_pip=True)
    binaries = tmp_path / "empty" / "bin"
    run(binaries / "pip", "install", "--quiet", wheel)
    run(binaries / "python", "-c", "import torch", fails=True)
    output = run(binaries / "mythos-export", "generate", tiny_bundle, "--prompt", "JULIET.", "-n", 16, "--json").stdout
    assert json.loads(output)["ids"] == runner.generate("JULIET.", 16).complete().ids
    run(binaries / "python", "-c", "from mythos_export import load, Runner, InputError; import runtimes, calibration")
    message = run(binaries / "mythos-export", "export", "random:mythos_1b", "-o", "never", fails=True).stderr
    assert "pip install 'mythos-export[export]'" in message
    if native_operators.is_available():  # what can be built here is in the wheel
        health = json.loads(run(binaries / "mythos-export", "doctor", "--json").stdout)
        assert health["native_operators"] == native_operators.instruction_set()
        assert health["native_library"].endswith(LIBRARY)
        assert str(ROOT) not in health["native_library"]
    if CPP_LIBRARY not in names:
        assert "run: pip install" in run(binaries / "mythos-export", "cpp-config", "--lib-dir", fails=True).stderr
        pytest.skip("the C++ library could not be built into the wheel here: it needs a compiler and OpenSSL's headers")
    package = run(binaries / "mythos-export", "cpp-config", "--cmake-dir").stdout.strip()
    run(tool("cmake"), "-S", ROOT / "examples" / "cpp", "-B", tmp_path / "build", f"-Dmythos_runtime_DIR={package}")
    run(tool("cmake"), "--build", tmp_path / "build", "--target", "generate")
    tokens = run(tmp_path / "build" / "generate", tiny_bundle, "5,6,7", 16).stdout.split()
    assert [int(token) for token in tokens] == runner.generate([5, 6, 7], 16).complete().ids


@pytest.mark.slow
def test_wheel_without_a_compiler(tiny_bundle: Path, runner: Runner, tmp_path: Path) -> None:
    """The build says what it lacks and leaves the operators out; what it makes works, and says how to get them."""
    run = Shell(tmp_path)
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, CXX=str(tmp_path / "nothing"))
    assert "native operators are not built: found no C++ compiler" in built.stderr
    assert "This wheel is without the native operators" in built.stdout
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(("runtimes/native/", "runtimes/cpp/"))]
        archive.extractall(tmp_path / "installed")
    command = [sys.executable, "-m", "mythos_export.cli"]
    paths = {"PYTHONPATH": str(tmp_path / "installed")}
    health = json.loads(run(*command, "doctor", "--json", **paths).stdout)
    assert health["native_operators"] is None
    assert "pip install" in health["missing"]["native operators"]
    assert "the portable bodies run: " in run(*command, "doctor", **paths).stdout
    generate = [*command, "generate", tiny_bundle, "--prompt", "JULIET.", "-n", 16, "--json"]
    assert json.loads(run(*generate, **paths).stdout)["ids"] == runner.generate("JULIET.", 16).complete().ids
    assert "pip install --verbose" in run(*generate, "--native", fails=True, **paths).stderr
    assert "pip install --verbose" in run(*command, "cpp-config", "--json", fails=True, **paths).stderr
