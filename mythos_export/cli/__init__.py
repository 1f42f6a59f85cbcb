"""The command line: one small function a subcommand. What they do lives in the modules they call."""

from __future__ import annotations

import json
import sys

from mythos_export.cli import building, bundles, quantizing, running, sdk  # noqa: F401 (each adds its commands)
from mythos_export.cli.app import app
from runtimes.errors import MythosError


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 a check failed, 2 bad input, 130 interrupted."""
    try:
        app()
    except MythosError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"torch", "onnx", "onnxscript", "onnx_ir", "safetensors"}:
            raise
        extra = "build" if sys.argv[1:2] == ["build"] else "export"
        _fail(f"this needs the package {error.name}, which is not installed; run: pip install 'mythos-export[{extra}]'")
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as in `… | head`; nothing is left to tell anyone
        sys.exit(0)


def _fail(message: str) -> None:
    if "--json" in sys.argv:
        print(json.dumps({"error": message}, ensure_ascii=False))
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
