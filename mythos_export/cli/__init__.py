"""The command line: one small function a subcommand. What they do lives in the modules they call."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from mythos_export.cli import building, bundles, quantizing, running, sdk  # noqa: F401 (each adds its commands)
from mythos_export.cli.app import app
from runtimes.errors import MythosError


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. arguments: default those of the process. Exit codes: 0 done, 1 a check failed, 2 bad
    input, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(given, prog_name="mythos-export")
    except MythosError as error:
        _fail(str(error), given)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors"}:
            raise
        extra = "build" if given[:1] == ["build"] else "export"
        needed = f"this needs the package {error.name}, which is not installed"
        _fail(f"{needed}; run: pip install 'mythos-export[{extra}]'", given)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as in `… | head`; nothing is left to tell anyone
        sys.exit(0)


def _fail(message: str, given: Sequence[str]) -> None:
    if "--json" in given:
        print(json.dumps({"error": message}, ensure_ascii=False))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
