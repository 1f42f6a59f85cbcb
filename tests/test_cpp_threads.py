"""The C++ tests (tests/cpp, GoogleTest): header, threads, lifetimes; as they are, and under ThreadSanitizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cpp_sdk import ROOT, built, run

from runtimes import native_operators

OPERATORS = {"MYTHOS_OPERATORS": str(native_operators.LIBRARY)} if native_operators.is_available() else {}
needs_googletest = pytest.mark.skipif(
    not Path("/usr/include/gtest").is_dir(), reason="needs GoogleTest (Debian: libgtest-dev)"
)


def build_tests(preset: str, folder: Path, *options: str) -> Path:
    with built(preset, "-DMYTHOS_TESTS=ON", *options) as build:
        shutil.copytree(build / "tests", folder / "tests")
    return folder / "tests" / "runtime_tests"


@needs_googletest
def test_the_cpp_tests(tiny_bundle: Path, tmp_path: Path) -> None:
    tests = build_tests("release", tmp_path)
    assert "  PASSED  " in run(tests, MYTHOS_TEST_CPP_BUNDLE=str(tiny_bundle), **OPERATORS)


@needs_googletest
@pytest.mark.slow
def test_threads_under_thread_sanitizer(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without text, which takes long to build; `make cpp-tsan` has it, and ten minutes."""
    tests = build_tests("tsan", tmp_path, "-DMYTHOS_TEXT=OFF")
    how = {"TSAN_OPTIONS": f"halt_on_error=1 suppressions={ROOT}/tests/cpp/races.supp", "MYTHOS_TEST_SECONDS": "60"}
    said = run(tests, "--gtest_filter=Header*:Threads*", MYTHOS_TEST_CPP_BUNDLE=str(tiny_bundle), **how, **OPERATORS)
    assert "  PASSED  " in said
