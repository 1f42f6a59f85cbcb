"""The TensorRT plugins through their own interface, on the host: what TensorRT asks of them before anything runs.

Runs where the headers of TensorRT 10 (TENSORRT_ROOT, or the system's), nvcc and the CUDA kernels' library are. The program that it
compiles enqueues every plugin on a GPU when it is run with "device"; no TensorRT 10 was at hand to build an engine with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from runtimes import cuda_kernels

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "runtimes" / "native"


def tensorrt_headers() -> Path | None:
    places = [Path("/usr/include"), Path("/usr/include") / str(sysconfig.get_config_var("MULTIARCH"))]
    if root := os.environ.get("TENSORRT_ROOT"):
        places.insert(0, Path(root) / "include")
    return next((place for place in places if (place / "NvInferRuntime.h").is_file()), None)


def test_plugins_before_anything_runs(tmp_path: Path) -> None:
    headers, nvcc, kernels = tensorrt_headers(), shutil.which("nvcc"), cuda_kernels.LIBRARY
    if headers is None or nvcc is None or not kernels.is_file():
        pytest.skip("needs the headers of TensorRT 10 (TENSORRT_ROOT=...), nvcc, and `make cuda`")
    program = tmp_path / "tensorrt_plugins"
    files = [ROOT / "tests" / "native" / "tensorrt_plugins.cc", SOURCES / "tensorrt" / "plugins.cc", kernels]
    options = ["-std=c++17", f"-I{headers}", f"-I{SOURCES / 'cuda'}", f"-Xlinker=-rpath={kernels.parent}"]
    subprocess.run([nvcc, *options, *map(str, files), "-o", str(program)], check=True)
    done = subprocess.run([str(program), "host"], text=True, capture_output=True)
    assert (done.returncode, done.stdout.strip().endswith(" 0 wrong")) == (0, True), done.stdout
