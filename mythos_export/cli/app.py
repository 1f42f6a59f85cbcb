"""The command line's application, the options that commands share, and how they print."""

from __future__ import annotations

import json
import re
from enum import Enum
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
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory", metavar="8GB", help="Refuse what would take more for weights and caches; MB, GB, MiB or GiB."
    ),
]


class DeviceKind(str, Enum):
    """What computes."""

    cpu = "cpu"
    cuda = "cuda"


DeviceName = Annotated[
    DeviceKind | None,
    typer.Option(
        "--device", help="Where onnxruntime runs: cpu, the default, or cuda, an NVIDIA GPU; cpu takes no engine."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="CPU threads; default all cores.")]


def emit(as_json: bool, plain: Any, text: str = "") -> None:
    """Prints one JSON object, or text."""
    if as_json:
        print(json.dumps(plain, ensure_ascii=False))
    elif text:
        print(text)


_UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def value_of(choice: Enum | None) -> Any:
    """What an option's choice stands for; None where nothing was given."""
    return None if choice is None else choice.value


def memory_size(text: str | None) -> int | None:
    """8GB or 512MiB as bytes; None where nothing was given."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise InputError(f'--max-memory is "{text}"; expected a size such as 8GB, 512MiB, or a number of bytes')
    return int(float(found[1]) * _UNITS[found[2].upper()])


def numbers(text: str | None, option: str) -> list[int] | None:
    """1,4,8 as numbers; None where nothing was given."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f'{option} is "{text}"; expected whole numbers with commas between, such as 1,4,8') from None
