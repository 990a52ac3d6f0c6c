"""Preprocessed volumes that the engine keeps for later requests with the same image, bounded in bytes and in number.

The volumes stay what they came as, sealed shared memory: keeping one is keeping its descriptor, handing it out is
sending it. A kept volume gives way whenever a case waits for memory; nothing depends on finding one.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass

MOST_VOLUMES = 128
"""Each is a descriptor, of which a process may have a thousand."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One volume.

    Attributes:
        descriptor: of the sealed shared memory; the cache's to close.
        shape: (C, z, y, x), float32.
        note: what the worker wrote to it, for the workers.
        size: bytes.
    """

    descriptor: int
    shape: tuple[int, int, int, int]
    note: str
    size: int


class VolumeCache:
    """Key -> volume. Used by one thread."""

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes; 0 keeps nothing. What was not used for longest goes first."""
        self._limit = limit
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(kept.size for kept in self._kept.values())

    def find(self, key: str | None) -> Kept | None:
        """The volume under a key, which is the most recently used from now on."""
        if key is None or key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: str, kept: Kept) -> None:
        """Keep a volume, and close its descriptor sooner or later: at once if it is too large or there already."""
        if kept.size > self._limit or self.find(key) is not None:
            os.close(kept.descriptor)
            return
        self._kept[key] = kept
        while self.size > self._limit or len(self._kept) > MOST_VOLUMES:
            self.drop_oldest()

    def drop_oldest(self) -> int:
        """Forget the volume that was not used for longest; its bytes."""
        _, oldest = self._kept.popitem(last=False)
        os.close(oldest.descriptor)
        return oldest.size

    def clear(self) -> None:
        """Forget them all."""
        while self._kept:
            self.drop_oldest()
