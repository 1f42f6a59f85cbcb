"""The command line's application, the options that commands share, and how they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from runtimes.errors import InputError

app = typer.Typer(
    name="mythos-export",
    help="OpenMythos training checkpoints to ONNX bundles, and everything to run, check and time them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no remarks.")]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .pt or .safetensors checkpoint, a folder of step_*.pt, random:VARIANT[:SEED] or random:config.json.",
    ),
]
LoopList = Annotated[str | None, typer.Option("--loops", metavar="N,N,…", help="Loop counts; default the trained one.")]
Native = Annotated[
    bool | None,
    typer.Option("--native/--no-native", help="The operators' native kernels; default where they are built."),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="CPU threads; default all cores.")]


def emit(as_json: bool, plain: Any, text: str = "") -> None:
    """Prints one JSON object, or text."""
    if as_json:
        print(json.dumps(plain, ensure_ascii=False))
    elif text:
        print(text)


def numbers(text: str | None, option: str) -> list[int] | None:
    """1,4,8 as numbers; None where nothing was given."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'{option} is "{text}"; expected whole numbers with commas between, such as 1,4,8') from None
