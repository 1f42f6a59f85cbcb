"""What a test costs in energy: what a meter is (meters.py has some), and the watts of a test under one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

_SECONDS = 2.0  # least time a test is measured for: NVML's counter moves in steps of up to a tenth of a second
_MOST_RUNS = 200


class Meter(Protocol):
    """Something that counts energy. source: what it is, and of what."""

    source: str

    def joules(self) -> float:
        """Used since some moment before; only differences mean anything."""
        ...

    def about(self) -> dict[str, float]:
        """What else it saw so far, for --json."""
        ...

    def close(self) -> None:
        """Ends it; may be called again."""
        ...


class Power(NamedTuple):
    """watts: the mean over a test; joules: of one run of it; source: who counted."""

    watts: float
    joules: float
    source: str


class Stopwatch:
    """Times what happens in its with blocks, and counts the energy of that where it has a meter. at_end: called after each."""

    def __init__(self, meter: Meter | None = None, at_end: Callable[[], None] = lambda: None) -> None:
        self.seconds = self.joules = 0.0
        self.runs = 0
        self._meter, self._at_end = meter, at_end

    def __enter__(self) -> Stopwatch:
        self._before = self._meter.joules() if self._meter else 0.0
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
        self.joules += self._meter.joules() - self._before if self._meter else 0.0
        self.runs += 1
        self._at_end()


def measure(meter: Meter, test: Callable[[Stopwatch], None]) -> Power:
    """Runs a test, which uses the stopwatch it is given once, again and again for two seconds."""
    watch = Stopwatch(meter)
    while watch.seconds < _SECONDS and watch.runs < _MOST_RUNS:
        test(watch)
    return Power(watch.joules / watch.seconds, watch.joules / watch.runs, meter.source)


class Integral:
    """Energy out of samples of power, each of which holds until the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._joules, self._watts, self._at = 0.0, 0.0, time.perf_counter()

    def add(self, watts: float) -> None:
        """A sample of now."""
        with self._lock:
            self._advance()
            self._watts = watts

    def joules(self) -> float:
        """Up to now."""
        with self._lock:
            self._advance()
            return self._joules

    def _advance(self) -> None:
        now = time.perf_counter()
        self._joules, self._at = self._joules + self._watts * (now - self._at), now
