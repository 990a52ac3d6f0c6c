"""Where the time of a request goes: stage names, the clock that measures them, and the Server-Timing header."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

SERVER_TIMING = "Server-Timing"


class Stage(StrEnum):
    """The stages of a request, in their order."""

    DECODE = "decode"
    PREPROCESS = "preprocess"
    QUEUE = "queue"
    NETWORK = "network"
    EXPORT = "export"
    ENCODE = "encode"


class StageClock:
    """Seconds spent in each stage of one request. Used by one thread."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Add the time of the ``with`` block to ``stage``, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: Stage, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @property
    def seconds(self) -> dict[Stage, float]:
        """Seconds per stage; a stage that was not reached is absent."""
        return dict(self._seconds)

    def server_timing(self) -> str:
        """The value of a Server-Timing header (W3C Server Timing), durations in milliseconds."""
        return ", ".join(f"{s};dur={self._seconds[s] * 1000:.1f}" for s in Stage if s in self._seconds)
