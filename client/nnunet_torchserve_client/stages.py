"""Where the time of a case went: the server's own stages, and what the client sees before and after them."""

from __future__ import annotations

import time
from collections.abc import Mapping

from .answers import Answer
from .events import Event, Kind

TRANSFER, WAIT, PAUSE, WRITE = "transfer", "worker", "pause", "write"
"""Where a case's time goes, beside the server's own stages: to and from the server; until a worker took it, here and in
TorchServe's queue; between two tries; into files."""

_LEAST_S = 0.05


def listed_stages(stages: Mapping[str, float]) -> str:
    """For people: the longest first, without what is not worth a word."""
    longest_first = sorted(stages.items(), key=lambda stage: -stage[1])
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in longest_first if seconds >= _LEAST_S)


class Waits:
    """How long cases waited for a worker, here and in TorchServe's queue, and between tries.

    Events tell it, which come one at a time. A case's first wait for a place began when it was first tried, which its
    answer says.
    """

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._first_sent: dict[str, float] = {}
        self._waited: dict[str, float] = {}
        self._paused: dict[str, float] = {}

    def event(self, event: Event) -> None:
        """Note the time."""
        now, case = time.monotonic(), event.case
        if (since := self._since.pop(case, None)) is not None:
            self._waited[case] = self._waited.get(case, 0.0) + max(0.0, now - since)
        if event.kind is Kind.SENDING:
            self._first_sent.setdefault(case, now)
        elif event.kind is Kind.WAITING:
            self._since[case] = now
        elif event.kind is Kind.RETRY:
            self._paused[case] = self._paused.get(case, 0.0) + event.pause_s
            self._since[case] = now + event.pause_s

    def stages(self, case: str, answer: Answer) -> dict[str, float]:
        """Where the time of a case went, until its answer was there; the case is forgotten."""
        now = time.monotonic()
        waited, paused = self._waited.pop(case, 0.0), self._paused.pop(case, 0.0)
        waited += max(0.0, self._first_sent.pop(case, now) - (now - answer.seconds))
        waited -= answer.timing.get("decode", 0.0)  # the first event comes when the image has been read
        stages = {WAIT: max(0.0, waited), PAUSE: paused, **answer.timing}
        stages[TRANSFER] = max(0.0, answer.seconds - sum(stages.values()))
        return stages
