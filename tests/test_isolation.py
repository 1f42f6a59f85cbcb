"""Work in a process of its own: results, errors, crashes."""

from __future__ import annotations

import os
import signal

import pytest

from mythos_export.build.isolation import isolated
from runtimes.errors import BackendError


def test_a_result_comes_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert isolated(divmod, 17, 5) == (3, 2)
    isolated(print, "what a compiler prints")
    assert "what a compiler prints" in capfd.readouterr().out


def test_an_error_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        isolated(divmod, 1, 0)
    with pytest.raises(BackendError, match="no way"):
        isolated(_refuse, "no way")


def _refuse(reason: str) -> None:
    raise BackendError(reason)


def test_a_crash_is_an_error() -> None:
    with pytest.raises(BackendError, match="_kill_itself crashed: killed by SIGSEGV"):
        isolated(_kill_itself, signal.SIGSEGV)
    with pytest.raises(BackendError, match="_exit crashed: exit code 3"):
        isolated(os._exit, 3)


def _kill_itself(number: int) -> None:
    os.kill(os.getpid(), number)
