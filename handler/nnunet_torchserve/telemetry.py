"""What is known of a request afterwards: where its time went, and the one line that the log has of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class RequestRecord:
    """One request for the log; nothing of the image or of a person.

    Attributes:
        request_id: as the answer has it.
        model: name and version.
        clock: seconds in each stage.
        shape: (Z, Y, X) of the image as sent, once its header is read.
        patches: windows of one fold.
        passes: forward passes in all.
        status: of the answer.
        code: of the problem, if it is one.
    """

    request_id: str
    model: str
    clock: StageClock = field(default_factory=StageClock)
    shape: tuple[int, ...] | None = None
    patches: int | None = None
    passes: int | None = None
    status: int = 0
    code: str | None = None

    def line(self) -> str:
        """One JSON object; stage times in milliseconds."""
        stages = {str(stage): round(seconds * 1000, 1) for stage, seconds in self.clock.seconds.items()}
        document = {
            "id": self.request_id,
            "model": self.model,
            "status": self.status,
            "code": self.code,
            "shape": self.shape,
            "patches": self.patches,
            "passes": self.passes,
            "ms": stages,
        }
        return json.dumps(document)
