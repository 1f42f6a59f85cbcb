"""Where libraries built from runtimes/native lie: in the checkout or the installed package, beside their sources' folder."""

from __future__ import annotations

from pathlib import Path

_NATIVE = Path(__file__).parent / "native"


def library_path(name: str) -> Path:
    """The file of a library, which need not exist. name: without "lib" and ".so"."""
    return _NATIVE / "lib" / f"lib{name}.so"


def is_checkout() -> bool:
    """Whether the sources are here, to build a library from; an installed package has none."""
    return (_NATIVE / "CMakeLists.txt").is_file()
