"""Where the C and C++ library of this installation is, for programs that build against it."""

from __future__ import annotations

from pathlib import Path

from runtimes.errors import BackendError

_SDK = Path(__file__).parent / "cpp" / "sdk"
_SOURCE = Path(__file__).parent / "cpp" / "CMakeLists.txt"  # of a checkout; an installed package has none


def find_sdk() -> dict[str, Path]:
    """Its folders: cmake (for CMAKE_PREFIX_PATH or mythos_runtime_DIR), include, lib. Raises BackendError where it is not there."""
    folders = {
        "cmake": _SDK / "lib" / "cmake" / "mythos_runtime",
        "include": _SDK / "include",
        "lib": _SDK / "lib",
    }
    if not (folders["lib"] / "libmythos_runtime.so").exists():
        fix = "make cpp"
        if not _SOURCE.is_file():
            fix = (
                "pip install --verbose --force-reinstall --no-deps . "
                "in the source of mythos-export, with a C++17 compiler and OpenSSL's headers at hand (it says what is missing)"
            )
        raise BackendError(f"there is no libmythos_runtime in {folders['lib']}; run: {fix}")
    return folders
