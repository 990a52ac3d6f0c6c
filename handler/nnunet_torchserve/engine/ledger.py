"""What the engines of this machine hold of one memory, so that several models share it.

Each engine writes what it holds to a file of its own in its own directory; an engine counts for as long as it holds
the lock of its life, so a killed one counts no longer. There is no lock on the whole: an engine writes what it wants
to hold before it looks at the others, so of two that want the same bytes at least one sees the other.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from .folder import is_alive


class Ledger:
    """One engine's entry in the ledger of one memory."""

    def __init__(self, folder: Path, memory: str) -> None:
        """Start with nothing held.

        Args:
            folder: the engine's own directory, beside those of the others.
            memory: a name, such as ``host`` or ``cuda:0``.
        """
        self._folder = folder
        self._name = "holds-" + memory.replace(":", "-")
        self.hold(0)

    def hold(self, size: int) -> None:
        """Say how many bytes this engine holds, or is about to."""
        unfinished = self._folder / f".{self._name}"
        with suppress(OSError):  # a cleaned-up directory or a full disk: this engine's own budget still holds
            unfinished.write_text(str(size))
            unfinished.replace(self._folder / self._name)

    def elsewhere(self) -> int:
        """Bytes that other living engines hold."""
        held = 0
        for entry in self._folder.parent.glob(f"*/{self._name}"):
            if entry.parent == self._folder or not is_alive(entry.parent):
                continue
            with suppress(OSError, ValueError):
                held += int(entry.read_text())
        return held

    def try_hold(self, size: int, capacity: int) -> bool:
        """Hold ``size`` bytes if that and what others hold is at most ``capacity``; else hold what was held before."""
        before = self._held()
        self.hold(size)
        if size + self.elsewhere() <= capacity:
            return True
        self.hold(before)
        return False

    def _held(self) -> int:
        with suppress(OSError, ValueError):
            return int((self._folder / self._name).read_text())
        return 0
