"""`optimum-cli export mythos`: the options and the work of `mythos-export export`."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from typer.main import get_command

from mythos_export.cli import main
from mythos_export.cli.app import app


class MythosExportCommand(BaseOptimumCLICommand):
    """What Optimum registers. Exit codes and messages are those of `mythos-export`."""

    COMMAND = CommandInfo(name="mythos", help="Export a checkpoint to an ONNX bundle with mythos-export.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Gives Optimum's parser the options of `mythos-export export`."""
        for parameter in _parameters():
            _add(parser, parameter)

    def run(self) -> None:
        main(["export", *_arguments(self.args)])


def _parameters() -> list[Any]:
    command: Any = get_command(app)
    parameters: list[Any] = command.commands["export"].params
    return parameters


def _add(parser: ArgumentParser, parameter: Any) -> None:
    """Values stay text: `mythos-export` reads them, and says what is wrong with them."""
    told: dict[str, Any] = {"help": (parameter.help or "").replace("%", "%%")}
    if parameter.param_type_name == "argument":
        parser.add_argument(parameter.name, metavar=parameter.metavar, **told)
    elif parameter.is_flag:
        parser.add_argument(*parameter.opts, dest=parameter.name, action="store_true", **told)
    else:
        kind = "append" if parameter.multiple else "store"
        required = parameter.required
        metavar = parameter.metavar or parameter.name.upper()
        parser.add_argument(
            *parameter.opts, dest=parameter.name, action=kind, required=required, metavar=metavar, **told
        )


def _arguments(args: Namespace) -> list[str]:
    """The command line again."""
    options: list[str] = []
    positional: list[str] = []
    for parameter in _parameters():
        value = getattr(args, parameter.name)
        if parameter.param_type_name == "argument":
            positional.append(value)
        elif parameter.is_flag:
            options += parameter.opts[:1] if value else []
        else:
            values = value if isinstance(value, list) else [] if value is None else [value]
            options += [f"{parameter.opts[0]}={item}" for item in values]
    return [*options, "--", *positional]
