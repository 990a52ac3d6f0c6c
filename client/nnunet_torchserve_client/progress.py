"""How far a call is, on a terminal: what nnU-Net shows with tqdm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

from .events import Event, Kind


class Bars:
    """A bar for all cases, and one for each whose forward passes are counted."""

    def __init__(self, progress: Progress, what: str, total: int | None) -> None:
        self._progress = progress
        self._all = progress.add_task(what, total=total)
        self._cases: dict[str, TaskID] = {}

    def event(self, event: Event) -> None:
        """Something happened to a case."""
        if event.kind is Kind.PROGRESS and event.stage == "network":
            if event.case not in self._cases:
                self._cases[event.case] = self._progress.add_task(event.case)
            self._progress.update(self._cases[event.case], total=event.total, completed=event.done)
        elif event.kind in (Kind.ANSWERED, Kind.FAILED, Kind.RETRY) and event.case in self._cases:
            self._progress.remove_task(self._cases.pop(event.case))

    def one_done(self) -> None:
        """A case is done, or failed."""
        self._progress.advance(self._all)


@contextmanager
def shown(what: str, total: int | None, *, wanted: bool) -> Iterator[Bars]:
    """Show bars on stderr for the length of the block, if that is a terminal.

    Args:
        what: words before the bar of all cases.
        total: cases, ``None`` if nobody knows.
        wanted: ``False`` shows nothing.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (wanted and console.is_terminal)) as progress:
        yield Bars(progress, what, total)
