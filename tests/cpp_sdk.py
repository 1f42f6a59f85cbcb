"""Builds the C and C++ library and programs that use it."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CPP = ROOT / "runtimes" / "cpp"


def tool(name: str) -> str:
    """A program of this environment, else of the machine."""
    own = Path(sysconfig.get_path("scripts"), name)
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name} to build the library")
    return found


def run(*command: object, input: str = "", **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        input=input,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@contextmanager
def built(preset: str, *options: str) -> Iterator[Path]:
    """Builds the library where `make cpp` does, whose folder keeps what need not be built again."""
    cmake, builds = tool("cmake"), CPP / "build" / platform.machine()
    if shutil.which(os.environ.get("CXX", "c++")) is None or not Path("/usr/include/openssl").is_dir():
        pytest.skip("needs a C++ compiler and OpenSSL's headers (Debian: g++ and libssl-dev)")
    builds.mkdir(parents=True, exist_ok=True)
    with (builds / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(cmake, "-S", CPP, "--preset", preset, "-B", builds / preset, f"-DPYTHON={sys.executable}", *options)
        run(cmake, "--build", builds / preset, "--parallel", "2")
        yield builds / preset


def install_sdk(prefix: Path) -> None:
    with built("release") as build:
        run(tool("cmake"), "--install", build, "--prefix", prefix)
