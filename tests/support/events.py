"""A stream of events, read as docs/http.md says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import httpx

Event = dict[str, Any]

LAST = ("result", "error")
STAGES = ["preprocess", "network", "export"]


@dataclass(frozen=True)
class Stream:
    """What a whole stream said.

    Attributes:
        events: every event, the last one a result or an error.
        result: the bytes after it.
    """

    events: list[Event]
    result: bytes

    @property
    def last(self) -> Event:
        """The result or the error."""
        return self.events[-1]

    def of(self, kind: str, stage: str | None = None) -> list[Event]:
        """Events of a kind, and of a stage."""
        return [event for event in self.events if event["event"] == kind and event.get("stage") == stage]

    def kinds(self) -> list[str]:
        """Which events came, heartbeats left out, each run of one kind and stage once."""
        names = [str(event.get("stage", event["event"])) for event in self.events if event["event"] != "heartbeat"]
        return [name for position, name in enumerate(names) if position == 0 or names[position - 1] != name]


def read_stream(body: bytes) -> Stream:
    """Take a whole body apart; it must hold exactly one last event, and what that promises."""
    events: list[Event] = []
    while not events or events[-1]["event"] not in LAST:
        line, newline, body = body.partition(b"\n")
        assert newline, f"the stream ends without its last event, after {events[-3:]}"
        events.append(json.loads(line))
    assert len(body) == events[-1].get("length", 0)
    return Stream(events, body)


def assert_complete(stream: Stream, *, restarts: bool = False) -> None:
    """Every stage was begun and ended, in order, and never went back, unless an engine died."""
    assert stream.last["event"] == "result", stream.last
    assert [kind for kind in stream.kinds() if kind in STAGES] == STAGES
    for stage in STAGES:
        steps = stream.of("progress", stage)
        done, totals = [event["done"] for event in steps], {event["total"] for event in steps}
        assert len(totals) == 1
        assert (done[0], done[-1]) == (0, totals.pop())
        if not restarts:
            assert done == sorted(set(done))


class Reading:
    """A stream that is read event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._parts = response.iter_raw()
        self._left = b""

    def until(self, wanted: Callable[[Event], bool]) -> Event:
        """Read on to the first event that is ``wanted``."""
        while True:
            line, newline, left = self._left.partition(b"\n")
            if not newline:
                self._left += next(self._parts)
                continue
            self._left = left
            event: Event = json.loads(line)
            if wanted(event):
                return event

    def rest(self) -> Stream:
        """Read to the end."""
        return read_stream(b"".join(chain([self._left], self._parts)))
