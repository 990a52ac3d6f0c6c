"""How far a call is: bars on a terminal, lines elsewhere.

Threads: events come from the threads of the cases, one at a time; the rest from whoever waits for them, and from the
thread that takes cases. Rich's own lock guards the bars; a lock of each watcher guards what it counts.

Rich is loaded when something is to be shown, for a program's own start should not wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from .events import Event, Kind

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_EVERY_S = 30.0
"""Where there are no bars, silence is broken so often."""

_LONGEST_NAME = 40

_STATES = {Kind.SENDING: "is sent", Kind.WAITING: "waits for a worker", Kind.RECEIVING: "is received"}
_STAGES = {"preprocess": "preprocessing", "network": "network", "export": "export", "postprocess": "postprocessing"}


class Watcher(Protocol):
    """Shows what happens."""

    def event(self, event: Event) -> None:
        """Something happened to a case."""

    def one_done(self) -> None:
        """A case is done, or failed."""

    def line(self, text: str) -> None:
        """Something to be read."""


def state_of(event: Event) -> str | None:
    """What a case does now, in words; ``None`` if the event changes nothing of that."""
    if event.kind is Kind.QUEUED:
        return f"waits for memory, {event.position} before it" if event.position else "waits for memory, is next"
    if event.kind is Kind.PROGRESS:
        stage = _STAGES.get(event.stage or "", event.stage)
        return stage if event.member is None else f"{shortened(event.member)}: {stage}"
    if event.kind is Kind.RETRY:
        when = f"in {event.pause_s:.0f} s" if event.pause_s else "when a server has room"
        return f"{event.reason}; again {when}"
    return _STATES.get(event.kind)


class Bars:
    """A bar for all cases, and one for each in flight."""

    def __init__(self, progress: Progress, what: str, total: int | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._total = total
        self._done = 0
        self._all = progress.add_task(what, total=total, state=self._count())
        self._cases: dict[str, TaskID] = {}

    def event(self, event: Event) -> None:
        """See :class:`Watcher`."""
        if event.kind in (Kind.ANSWERED, Kind.FAILED):
            if event.case in self._cases:
                self._progress.remove_task(self._cases.pop(event.case))
            return
        state = state_of(event)
        if state is None:
            return
        if event.case not in self._cases:
            self._cases[event.case] = self._progress.add_task(shortened(event.case), total=None, state=state)
        counted = event.total > 0
        self._progress.update(
            self._cases[event.case],
            total=event.total if counted else None,
            completed=event.done if counted else 0,
            state=f"{state} {event.done}/{event.total}" if counted and event.kind is Kind.PROGRESS else state,
        )

    def one_done(self) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            self._done += 1
        self._progress.update(self._all, completed=self._done, state=self._count())

    def line(self, text: str) -> None:
        """See :class:`Watcher`."""
        self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _count(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done}/{self._total}"


class Lines:
    """For logs: what is told, and every half minute what is in flight."""

    def __init__(self, console: Console, total: int | None) -> None:
        self._console, self._total = console, total
        self._lock = threading.Lock()
        self._states: dict[str, str] = {}
        self._done = 0
        self._last = time.monotonic()

    def event(self, event: Event) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            if event.kind in (Kind.ANSWERED, Kind.FAILED):
                self._states.pop(event.case, None)
            elif (state := state_of(event)) is not None:
                share = f" {100 * event.done // event.total} %" if event.total and event.kind is Kind.PROGRESS else ""
                self._states[event.case] = state + share
            if time.monotonic() - self._last >= LINE_EVERY_S and self._states:
                states = "; ".join(f"{shortened(case)} {state}" for case, state in self._states.items())
                self._print(f"{self._count()} done; {states}")

    def one_done(self) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            self._done += 1

    def line(self, text: str) -> None:
        """See :class:`Watcher`."""
        with self._lock:
            self._print(text)

    def _count(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done} of {self._total}"

    def _print(self, text: str) -> None:
        self._last = time.monotonic()
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


class Nothing:
    """Shows nothing."""

    def event(self, event: Event) -> None:
        """See :class:`Watcher`."""

    def one_done(self) -> None:
        """See :class:`Watcher`."""

    def line(self, text: str) -> None:
        """See :class:`Watcher`."""


@contextmanager
def shown(what: str, total: int | None, *, wanted: bool) -> Iterator[Watcher]:
    """Show bars on stderr for the length of the block, if that is a terminal; else nothing.

    Args:
        what: words before the bar of all cases.
        total: cases, ``None`` if nobody knows.
        wanted: ``False`` shows nothing.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if wanted and console.is_terminal:
        with watched(what, total, console) as watcher:
            yield watcher
    else:
        yield Nothing()


@contextmanager
def watched(what: str, total: int | None, console: Console) -> Iterator[Watcher]:
    """Show bars for the length of the block; lines, if the console is no terminal.

    Args:
        what: words before the bar of all cases.
        total: cases, ``None`` if nobody knows.
        console: where to.
    """
    if not console.is_terminal:
        yield Lines(console, total)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress, what, total)


def shortened(name: str) -> str:
    """A case's name for a terminal: of one line, and not too long."""
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def printable(text: str) -> str:
    """Without characters that a terminal obeys: a file may be called anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
