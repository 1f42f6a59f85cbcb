"""The command for programs in C and C++: cpp-config."""

from __future__ import annotations

from typing import Annotated

import typer

from mythos_export.cli.app import Json, app, emit
from runtimes.errors import InputError


@app.command("cpp-config")
def cpp_config(
    cmake_dir: Annotated[bool, typer.Option("--cmake-dir", help="Of the CMake package: mythos_runtime_DIR.")] = False,
    include_dir: Annotated[bool, typer.Option("--include-dir", help="Of mythos/runtime.h and runtime.hpp.")] = False,
    lib_dir: Annotated[bool, typer.Option("--lib-dir", help="Of libmythos_runtime.so.")] = False,
    as_json: Json = False,
) -> None:
    """Folders of the C and C++ library, one a line in the order below, for builds of programs that use it."""
    from runtimes.sdk import find_sdk

    asked = {"cmake": cmake_dir, "include": include_dir, "lib": lib_dir}
    folders = {f"{name}_dir": str(folder) for name, folder in find_sdk().items() if as_json or asked[name]}
    if not folders:
        raise InputError("expected --cmake-dir, --include-dir, --lib-dir or --json")
    emit(as_json, folders, "\n".join(folders.values()))
