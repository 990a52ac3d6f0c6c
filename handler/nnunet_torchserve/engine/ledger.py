"""What the engines of this machine hold of one memory, so that several models share it.

Each engine writes what it holds to a file of its own in its own directory; an engine counts for as long as it holds
the lock of its life, so a killed one counts no longer. There is no lock on the whole: an engine writes what it wants
to hold before it looks at the others, so of two that want the same bytes at least one sees the other. What somebody
has wanted for longer counts like what is held: a large case would otherwise wait for good beside a busy model.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .folder import is_alive

logger = logging.getLogger(__name__)

_RECORD_BYTES = 120
_READS = 3


class Ledger:
    """One engine's entry in the ledger of one memory."""

    def __init__(self, folder: Path, memory: str) -> None:
        """Name the entry; it is what it was before, until something is held.

        Args:
            folder: the engine's own directory, beside those of the others.
            memory: a name, such as ``host`` or ``cuda:0``.
        """
        self._folder = folder
        self._name = "holds-" + memory.replace(":", "-")
        self._file: int | None = None
        self._record = b""

    def hold(self, size: int, wanted: int = 0, since: float = math.inf, kept: int = 0) -> None:
        """Say how many bytes this engine holds, or is about to, and how many more it has wanted since when.

        Args:
            size: bytes.
            wanted: bytes on top.
            since: monotonic seconds, which all processes of a machine share.
            kept: bytes that it holds too, but for no case.
        """
        record = _record(size, wanted, since, kept)
        if record == self._record:
            return
        with suppress(OSError):  # a cleaned-up directory or a full disk: this engine's own budget still holds
            if self._file is None:
                self._file = os.open(self._folder / self._name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # in place: a file renamed over another takes a millisecond on some file systems
            os.pwrite(self._file, record, 0)
            self._record = record

    def elsewhere(self, since: float = math.inf) -> int:
        """Bytes that other living engines hold, or have wanted for longer than ``since``."""
        return sum(
            entry.size + entry.kept + (entry.wanted if entry.since < since else 0)
            for entry in self._entries_elsewhere()
        )

    def wanted_elsewhere(self) -> int:
        """Bytes that other living engines want beyond what they hold."""
        return sum(entry.wanted for entry in self._entries_elsewhere())

    def try_hold(self, size: int, capacity: int) -> bool:
        """Hold ``size`` bytes if that and what others hold is at most ``capacity``; else hold what was held before."""
        before = self.held()
        self.hold(size)
        if size + self.elsewhere(-math.inf) <= capacity:
            return True
        self.hold(before)
        return False

    def held(self) -> int:
        """Bytes that this engine, or a dead one before it, holds for cases."""
        return _read(self._folder / self._name).size

    def _entries_elsewhere(self) -> list[_Entry]:
        try:
            files = self._folder.parent.glob(f"*/{self._name}")
            return [_read(file) for file in files if file.parent != self._folder and is_alive(file.parent)]
        except OSError:  # no descriptor is left, say: whoever cannot look takes everything for taken
            logger.exception("the other engines' ledgers cannot be read")
            return [_Entry(size=sys.maxsize)]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One engine's, as :meth:`Ledger.hold` wrote it."""

    size: int = 0
    wanted: int = 0
    since: float = math.inf
    kept: int = 0


def _record(size: int, wanted: int, since: float, kept: int) -> bytes:
    """One line of fixed length with its own checksum: a reader may see half of a new one and half of an old one."""
    numbers = f"{size} {wanted} {since} {kept}"
    return f"{numbers} {zlib.crc32(numbers.encode())}".ljust(_RECORD_BYTES - 1).encode() + b"\n"


def _read(file: Path) -> _Entry:
    for _ in range(_READS):
        with suppress(FileNotFoundError, ValueError):
            numbers, _, checksum = file.read_text().strip().rpartition(" ")
            if zlib.crc32(numbers.encode()) == int(checksum):
                size, wanted, since, kept = numbers.split()
                return _Entry(int(size), int(wanted), float(since), int(kept))
    return _Entry()
