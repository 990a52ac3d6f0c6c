"""A device that stops answering: what its workers know of it, so that they do not all wait for it again and again.

When an engine that had served can't be started again, whoever tried leaves a note in the engine's directory. Until
the time that it names, the workers of that device refuse their requests at once; then one of them tries, and no other.
The pause doubles with each failure, and a success takes the note away. Engines of other devices have directories, and
notes, of their own.

There are no threads here. The note is replaced in one step and read without a lock; two workers that saw the same
engine fail write the same. ``probe`` is a lock that the kernel frees however its holder dies: who has it may try.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0

_NOTE, _STARTED, _LOADED, _PROBE = "outage", "started", "loaded", "probe"


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of an outage. Seconds are monotonic: all processes of a machine share them, until it restarts.

    Attributes:
        failures: starts that failed, one after the other.
        until: when somebody may try again.
        started: when the engine was started that failed last.
    """

    failures: int
    until: float
    started: float


def pause_s(failures: int) -> float:
    """Seconds without a try after so many failures.

    >>> [pause_s(failures) for failures in (1, 2, 3, 7, 1000)]
    [5.0, 10.0, 20.0, 300.0, 300.0]
    """
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10))


class Outage:
    """The note of one engine, seen from a worker."""

    def __init__(self, folder: Path) -> None:
        """Look at the engine's own directory, which may not be there."""
        self._folder = folder

    def read(self) -> Note | None:
        """The note; ``None`` where there is no outage."""
        try:
            note = Note(**json.loads((self._folder / _NOTE).read_text()))
            # one from before the machine was restarted names a time that no pause reaches
            return note if note.until - time.monotonic() <= LONGEST_PAUSE_S else None
        except (OSError, ValueError, TypeError):
            return None

    def stands(self) -> bool:
        """Whether nobody may try now."""
        note = self.read()
        return note is not None and note.until > time.monotonic()

    def retry_after_s(self) -> float:
        """Seconds until somebody may try; while one does, the shortest pause."""
        note = self.read()
        left = 0.0 if note is None else note.until - time.monotonic()
        return left if left > 0 else FIRST_PAUSE_S

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Whether this worker may try; as long as the context lasts it is the only one during an outage."""
        if self.read() is None:
            yield True
            return
        if self.stands():
            yield False
            return
        try:
            probe = os.open(self._folder / _PROBE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # somebody cleans the directory up at this moment, the note too
            yield True
            return
        try:
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield not self.stands()  # who had it before may have failed meanwhile
        finally:
            os.close(probe)

    def note_start(self) -> None:
        """An engine is about to be started."""
        with suppress(OSError):  # first: on a full disk the old time of start stays
            (self._folder / _LOADED).unlink()
        self._replace(_STARTED, repr(time.monotonic()))

    def started(self) -> float:
        """Monotonic seconds when the last engine was started; 0 if that is not known."""
        started = self._seconds(_STARTED)
        return started if started <= time.monotonic() else 0.0  # else from before the machine was restarted

    def has_loaded(self, started: float) -> bool:
        """Whether the engine that was started then has said hello to anybody."""
        return started > 0 and self._seconds(_LOADED) == started

    def fail(self) -> Note:
        """The engine that was started last cannot be used: leave the note, once for each engine."""
        started, before = self.started(), self.read()
        if before is not None and before.started == started and before.until > time.monotonic():
            return before
        failures = 1 if before is None else before.failures + 1
        note = Note(failures, time.monotonic() + pause_s(failures), started)
        self._replace(_NOTE, json.dumps(asdict(note)))
        return note

    def end(self, started: float) -> None:
        """The engine that was started then, or a later one, has said hello."""
        with suppress(OSError):
            (self._folder / _NOTE).unlink()
        if started and not self.has_loaded(started):
            self._replace(_LOADED, repr(started))

    def _seconds(self, name: str) -> float:
        try:
            return float((self._folder / name).read_text())
        except (OSError, ValueError):
            return 0.0

    def _replace(self, name: str, text: str) -> None:
        unfinished = self._folder / f".{name}-{os.getpid()}"
        with suppress(OSError):  # a cleaned-up directory or a full disk: then every request tries
            unfinished.write_text(text)
            unfinished.replace(self._folder / name)
