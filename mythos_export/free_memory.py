"""What tests take of a GPU's memory."""

from __future__ import annotations

from runtimes import cuda
from runtimes.errors import BackendError


class FreeMemory:
    """How much less of the GPU's memory is free while tests run than when this was made. Where none is wanted, or none can be used,
    it sees nothing."""

    def __init__(self, is_wanted: bool) -> None:
        self._least: int | None = None
        if not is_wanted:
            return
        try:
            self._before = self._least = cuda.free_bytes()
        except BackendError:
            return  # whoever uses the GPU tells of it

    def look(self) -> None:
        """Once more."""
        if self._least is not None:
            self._least = min(self._least, cuda.free_bytes())

    def taken(self) -> int | None:
        """Bytes; None where it sees nothing."""
        return None if self._least is None else self._before - self._least
