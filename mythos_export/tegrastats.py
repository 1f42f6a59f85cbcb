"""tegrastats, the tool on a Jetson that says what its rails draw: its lines, and a process of it that is read as it goes.

The board's draw is that of its input rail where the board has one (VIN of Thor, VDD_IN of the small modules, POM_5V_IN of Nano and
TX2), and else the sum of the rails (the AGX boards), without those that another rail feeds.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from typing import IO, cast

from mythos_export.power import Integral
from runtimes.errors import BackendError

COMMAND = "tegrastats"
_INTERVAL = 0.1  # seconds between lines
_FIRST_LINE = 5.0  # seconds to wait for one
_WHOLE_BOARD = ("VIN", "VDD_IN", "POM_5V_IN")
_FED_BY_OTHERS = ("VDDQ_VDD2_1V8AO", "NC")  # memory behind VIN_SYS_5V0; a channel without a connection
# "VDD_IN 4480mW/4480mW" of JetPack 5 and later, "POM_5V_IN 2591/2591" before: now, and in the mean since it started.
_RAIL = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?/(-?\d+)(?:mW)?(?!\S)")
_RAM = re.compile(r"(?<!\S)RAM (\d+)/(\d+)MB")
_GPU = re.compile(r"(?<!\S)GR3D_FREQ (\d+)%")


@dataclass(frozen=True)
class Statistics:
    """One line. watts: of the board, None where it names no rail; rails: of each; ram_bytes: in use; gpu: share of its time that
    the GPU was at work, from 0 to 1."""

    watts: float | None
    rails: dict[str, float]
    ram_bytes: int | None
    gpu: float | None


def parse(line: str) -> Statistics:
    """Reads a line; what it does not have stays None."""
    rails = {name: int(now) / 1000 for name, now, _ in _RAIL.findall(line)}
    ram, gpu = _RAM.search(line), _GPU.search(line)
    return Statistics(_board(rails), rails, int(ram[1]) << 20 if ram else None, int(gpu[1]) / 100 if gpu else None)


def _board(rails: dict[str, float]) -> float | None:
    for name in _WHOLE_BOARD:
        if name in rails:
            return rails[name]
    parts = [watts for name, watts in rails.items() if name not in _FED_BY_OTHERS]
    return sum(parts) if parts else None


def is_available() -> bool:
    """Whether this machine has the tool."""
    return shutil.which(COMMAND) is not None


class TegrastatsMeter:
    """The board's energy, from lines ten times a second. Raises BackendError where the tool does not start or names no rail."""

    source = "tegrastats, the whole board"

    def __init__(self) -> None:
        self._integral = Integral()
        self._ram_bytes, self._gpu = 0, 0.0
        self._first, self._problem = threading.Event(), "it printed nothing"
        arguments = [COMMAND, "--interval", str(int(_INTERVAL * 1000))]
        try:
            self._process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except OSError as error:
            raise BackendError(f"{COMMAND} cannot be started: {error}") from error
        self._lines = cast(IO[str], self._process.stdout)
        self._thread = threading.Thread(target=self._read, name=COMMAND, daemon=True)
        self._thread.start()
        if not self._first.wait(_FIRST_LINE) or self._problem:
            self.close()
            raise BackendError(f"{COMMAND} says nothing of power: {self._problem}")

    def _read(self) -> None:
        for line in self._lines:
            found = parse(line)
            if found.watts is None:
                self._problem = f"a line without a rail: {line.strip()}"
            else:
                self._problem = ""
                self._integral.add(found.watts)
                self._ram_bytes = max(self._ram_bytes, found.ram_bytes or 0)
                self._gpu = max(self._gpu, found.gpu or 0.0)
            self._first.set()
        self._first.set()

    def joules(self) -> float:
        """Since it was started."""
        return self._integral.joules()

    def about(self) -> dict[str, float]:
        """ram_bytes: of the board in use, at most; gpu_utilisation: the largest share of a line's time."""
        return {"ram_bytes": self._ram_bytes, "gpu_utilisation": self._gpu}

    def close(self) -> None:
        """Ends the process; may be called again."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        self._lines.close()
