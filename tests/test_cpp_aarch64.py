"""The Runner in C++ for 64-bit ARM: cross-compiled and emulated, it gives Python's tokens and text. Minutes: `make cpp-aarch64`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cpp_sdk import CPP, ROOT, built, run, tool

from runtimes.runner import load

TOOLCHAIN = Path("/usr/aarch64-linux-gnu")
# onnxruntime reads what processor it has, and fails on this machine's description.
PROCESSOR = """processor\t: 0
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd07
CPU revision\t: 0

"""


@pytest.mark.skipif("MYTHOS_TEST_AARCH64" not in os.environ, reason="takes minutes; make cpp-aarch64 runs it")
def test_programs_give_pythons_tokens_on_aarch64(tiny_bundle: Path, tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64-static") or tool("qemu-aarch64")
    tool("aarch64-linux-gnu-g++")
    with built("aarch64") as build:
        run(tool("cmake"), "--install", build, "--prefix", tmp_path / "sdk")
    options = (
        f"-DCMAKE_TOOLCHAIN_FILE={CPP / 'cmake' / 'aarch64.cmake'}",
        f"-Dmythos_runtime_DIR={tmp_path / 'sdk' / 'lib' / 'cmake' / 'mythos_runtime'}",
    )
    run(tool("cmake"), "-S", ROOT / "examples" / "cpp", "-B", tmp_path / "build", *options)
    run(tool("cmake"), "--build", tmp_path / "build")
    system = tmp_path / "system"
    (system / "proc").mkdir(parents=True)
    (system / "proc" / "cpuinfo").write_text(PROCESSOR)
    (system / "lib").symlink_to(TOOLCHAIN / "lib")
    emulate = (emulator, "-cpu", "cortex-a57", "-L", system)
    python = load(tiny_bundle, "onnxruntime", native=False)
    ids = run(*emulate, tmp_path / "build" / "generate", tiny_bundle, "5,6,7", 32).split()
    assert [int(token) for token in ids] == python.generate([5, 6, 7], 32).complete().ids
    said = run(*emulate, tmp_path / "build" / "chat", tiny_bundle, 20, input="To be, or\n")
    assert said == f"{python.generate('To be, or' + chr(10), 20, stop=chr(10) * 2).complete().text}\n\n"
