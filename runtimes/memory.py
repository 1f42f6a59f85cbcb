"""A limit on what a runner holds in the host's memory: its weights and the caches of its sequences."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from runtimes.errors import BackendError, MemoryLimitError


def gigabytes(n_bytes: int) -> str:
    """3.69 GB."""
    return f"{n_bytes / 1e9:.3g} GB"


class MemoryBudget:
    """Bytes that a runner may hold; limit None: any number. Raises MemoryLimitError for weights that are larger."""

    def __init__(self, limit: int | None, weights: int) -> None:
        if limit is not None and weights > limit:
            raise MemoryLimitError(
                f"the weights take {gigabytes(weights)}, more than the memory_limit of {gigabytes(limit)}; raise it, or "
                "quantize the bundle"
            )
        self._limit, self._weights = limit, weights
        self._shares: weakref.WeakSet[MemoryShare] = weakref.WeakSet()
        self._lock = threading.Lock()

    def share(self) -> MemoryShare:
        """One that holds nothing yet; what it holds is free again once nobody refers to it."""
        return MemoryShare(self)

    def take(self, share: MemoryShare, n_bytes: int, what: str) -> None:
        """Lets a share hold so many bytes from here on; raises MemoryLimitError, and leaves it as it was, for too many."""
        with self._lock:
            others = sum(other.n_bytes for other in self._shares if other is not share)
            over = 0 if self._limit is None else self._weights + others + n_bytes - self._limit
            if self._limit is not None and over > 0:
                raise MemoryLimitError(
                    f"{what} takes {gigabytes(n_bytes)}; with weights of {gigabytes(self._weights)} and other caches of "
                    f"{gigabytes(others)} it would exceed the memory_limit of {gigabytes(self._limit)} by {gigabytes(over)}; close "
                    "sessions, shorten them, or raise it"
                )
            share.n_bytes = n_bytes
            self._shares.add(share)


class MemoryShare:
    """Bytes taken from a budget for as long as this lives."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self.n_bytes = budget, 0

    def resize(self, n_bytes: int, what: str) -> None:
        """Raises MemoryLimitError where the budget has not so many; what: they are for."""
        self._budget.take(self, n_bytes, what)

    @contextmanager
    def allocating(self, n_bytes: int, what: str) -> Iterator[None]:
        """resize, for memory that is allocated meanwhile; raises MemoryLimitError too where the system does not give it."""
        before = self.n_bytes
        self.resize(n_bytes, what)
        try:
            yield
        except BackendError:  # a device that has no more
            self.n_bytes = before
            raise
        except MemoryError as error:
            self.n_bytes = before
            raise MemoryLimitError(
                f"{what} takes {gigabytes(n_bytes)}, which the system does not give; close sessions or shorten them"
            ) from error
