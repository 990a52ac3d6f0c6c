"""How far a call is, on a terminal: what nnU-Net shows with tqdm. rich is loaded only where there is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from .events import Event, Kind


class Shown(Protocol):
    """What is told how far a call is."""

    def event(self, event: Event) -> None:
        """Something happened to a case."""

    def one_done(self) -> None:
        """A case is done, or failed."""


class _Nobody:
    def event(self, event: Event) -> None:
        pass

    def one_done(self) -> None:
        pass


@contextmanager
def shown(what: str, total: int | None, *, wanted: bool) -> Iterator[Shown]:
    """Show a bar of cases on stderr for the length of the block, if that is a terminal.

    Args:
        what: words before the bar.
        total: cases, ``None`` if nobody knows.
        wanted: ``False`` shows nothing.
    """
    if not (wanted and sys.stderr is not None and sys.stderr.isatty()):
        yield _Nobody()
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        yield _Bars(bars, what, total)


class _Bars:
    def __init__(self, bars: object, what: str, total: int | None) -> None:
        from rich.progress import Progress, TaskID

        assert isinstance(bars, Progress)  # noqa: S101 (rich is loaded late)
        self._bars = bars
        self._all: TaskID = bars.add_task(what, total=total)
        self._cases: dict[str, TaskID] = {}

    def event(self, event: Event) -> None:
        if event.kind is Kind.PROGRESS and event.stage == "network":
            if event.case not in self._cases:
                self._cases[event.case] = self._bars.add_task(event.case)
            self._bars.update(self._cases[event.case], total=event.total, completed=event.done)
        elif event.kind in (Kind.ANSWERED, Kind.FAILED, Kind.RETRY) and event.case in self._cases:
            self._bars.remove_task(self._cases.pop(event.case))

    def one_done(self) -> None:
        self._bars.advance(self._all)
