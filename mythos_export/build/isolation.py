"""A function in a process of its own, for libraries whose compilers can crash."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from runtimes.errors import BackendError

P = ParamSpec("P")
R = TypeVar("R")


def isolated(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function of a module (arguments and result can be pickled) in a new process; returns what it returns, raises what it
    raises. Raises BackendError where the process dies."""
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder, "call"), Path(folder, "answer")  # not by pipes: compilers print what they like
        call.write_bytes(pickle.dumps((function, args, kwargs)))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        child = subprocess.run([sys.executable, "-m", __name__, call, answer], env=environment, check=False)
        if child.returncode or not answer.is_file():
            raise BackendError(f"{function.__name__} crashed: {_end(child.returncode)}")
        result, error = pickle.loads(answer.read_bytes())  # noqa: S301 (our own process wrote it)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _end(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _answer(call: Path, answer: Path) -> None:
    function, args, kwargs = pickle.loads(call.read_bytes())  # noqa: S301 (the parent process wrote it)
    outcome: tuple[object, Exception | None]
    try:
        outcome = function(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        outcome = None, error
    answer.write_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _answer(*map(Path, sys.argv[1:]))
