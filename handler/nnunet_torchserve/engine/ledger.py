"""What the engines of this machine hold of one memory, so that several models share it.

Each engine writes what it holds to a file of its own in its own directory; an engine counts for as long as it holds
the lock of its life, so a killed one counts no longer. There is no lock on the whole: an engine writes what it wants
to hold before it looks at the others, so of two that want the same bytes at least one sees the other. What somebody
has wanted for longer counts like what is held: a large case would otherwise wait for good beside a busy model.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from .folder import is_alive


class Ledger:
    """One engine's entry in the ledger of one memory."""

    def __init__(self, folder: Path, memory: str) -> None:
        """Name the entry; it is what it was before.

        Args:
            folder: the engine's own directory, beside those of the others.
            memory: a name, such as ``host`` or ``cuda:0``.
        """
        self._folder = folder
        self._name = "holds-" + memory.replace(":", "-")

    def hold(self, size: int, wanted: int = 0, since: float = math.inf) -> None:
        """Say how many bytes this engine holds, or is about to, and how many more it has wanted since when.

        Args:
            size: bytes.
            wanted: bytes on top.
            since: monotonic seconds, which all processes of a machine share.
        """
        unfinished = self._folder / f".{self._name}"
        with suppress(OSError):  # a cleaned-up directory or a full disk: this engine's own budget still holds
            unfinished.write_text(f"{size} {wanted} {since}")
            unfinished.replace(self._folder / self._name)

    def elsewhere(self, since: float = math.inf) -> int:
        """Bytes that other living engines hold, or have wanted for longer than ``since``."""
        total = 0
        for entry in self._folder.parent.glob(f"*/{self._name}"):
            if entry.parent != self._folder and is_alive(entry.parent):
                size, wanted, their_since = _read(entry)
                total += size + (wanted if their_since < since else 0)
        return total

    def is_wanted_elsewhere(self) -> bool:
        """Whether another living engine wants more bytes than it has."""
        entries = self._folder.parent.glob(f"*/{self._name}")
        return any(e.parent != self._folder and _read(e)[1] > 0 and is_alive(e.parent) for e in entries)

    def try_hold(self, size: int, capacity: int) -> bool:
        """Hold ``size`` bytes if that and what others hold is at most ``capacity``; else hold what was held before."""
        before = self.held()
        self.hold(size)
        if size + self.elsewhere(-math.inf) <= capacity:
            return True
        self.hold(before)
        return False

    def held(self) -> int:
        """Bytes that this engine, or a dead one before it, holds."""
        return _read(self._folder / self._name)[0]


def _read(entry: Path) -> tuple[int, int, float]:
    with suppress(OSError, ValueError):
        size, wanted, since = entry.read_text().split()
        return int(size), int(wanted), float(since)
    return 0, 0, math.inf
