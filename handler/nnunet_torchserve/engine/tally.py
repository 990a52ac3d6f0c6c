"""What an engine has done and holds, in shared memory: readable by its workers, also after its death.

The engine writes numbers and knows nothing of who reads them: nobody has to ask it, so metrics cost it no message and
keep it neither busy nor alive. Each number has one thread of the engine that writes it.

A counter must reach the metrics once, not once a worker. So one of the workers is the relay of an engine: the one that
holds the lock on the shared memory, which the kernel frees when that worker dies. Beside the engine's totals the
memory holds how much of them was taken already. A new engine has a new tally, which begins with zeros.

A relay notes what it takes before it passes it on. If it dies between the two, what was counted since it last took is
lost; nothing is ever counted twice.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
from contextlib import suppress
from enum import IntEnum

import torch

from ..backend import Backend
from . import channel, shared_memory


class Total(IntEnum):
    """What only grows; the value is the number's place."""

    STARTS = 0
    RESTARTS = 1
    PASSES = 2
    BATCHES = 3
    SLOTS = 4
    SHARED_BATCHES = 5
    BUSY_MICROSECONDS = 6
    UNLOADS = 7
    RELOADS = 8
    """Loads on demand, after the networks were unloaded."""

    RELOADING_MICROSECONDS = 9
    """Of these loads, the check of the golden patch included."""


class Level(IntEnum):
    """What goes up and down; the value is the number's place."""

    CASES_IN_FLIGHT = 0
    """Cases that were granted memory and have not released it."""

    CASES_WAITING = 1
    """Cases that wait for memory."""

    CHARGED_BYTES = 2
    """Of the cases in flight."""

    PASSES_AHEAD = 3
    """Forward passes of cases that were not submitted yet."""

    PASSES_REMAINING = 4
    """Forward passes that the submitted cases still need."""

    DEVICE_BYTES = 5
    """Memory that the device has, 0 for a CPU."""

    CACHED_BYTES = 6
    """Of preprocessed volumes that are kept for later cases."""

    CASES_FOLLOWING = 7
    """Cases that wait for the answer of an equal one."""

    NETWORKS_LOADED = 8
    """1, or 0 while the networks are unloaded."""

    BACKEND = 9
    """What runs the networks: its place in :class:`~..backend.Backend`, from 1. An engine and its workers are of one
    archive, and have the same list."""


_BACKENDS = tuple(Backend)
_SIZE = (2 * len(Total) + len(Level)) * torch.int64.itemsize


class Tally:
    """An engine's own."""

    def __init__(self) -> None:
        """All zeros, in new shared memory."""
        shared, self.descriptor = shared_memory.share((_SIZE // torch.int64.itemsize,), torch.int64, "nnunet-tally")
        self._numbers = shared.numpy()

    def total(self, total: Total, value: int) -> None:
        """Note a total."""
        self._numbers[total] = value

    def level(self, level: Level, value: int) -> None:
        """Note a level."""
        self._numbers[2 * len(Total) + level] = value

    def runs(self, backend: Backend) -> None:
        """Note what runs the networks."""
        self.level(Level.BACKEND, 1 + _BACKENDS.index(backend))


class TallyReader:
    """An engine's tally, seen from a worker. Used by one thread."""

    def __init__(self, descriptor: int, process: int) -> None:
        """Map it.

        Args:
            descriptor: as the engine sent it; closed here.
            process: a pidfd of the engine; closed by :meth:`close`.

        Raises:
            ChannelError: it has another size.
        """
        self._process = process
        try:
            if os.fstat(descriptor).st_size != _SIZE:
                msg = "the tally has another size"
                raise channel.ChannelError(msg)
            # opened anew: a lock belongs to what was opened, and all workers were sent the same
            self._own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(descriptor)
        self.identity = os.fstat(self._own).st_ino
        self._memory = mmap.mmap(self._own, _SIZE)
        self._numbers = memoryview(self._memory).cast("q")

    def close(self) -> None:
        """Unmap it, and be its relay no longer."""
        self._numbers.release()
        self._memory.close()
        os.close(self._own)
        os.close(self._process)

    def is_alive(self) -> bool:
        """Whether the engine lives."""
        look = select.poll()
        look.register(self._process, select.POLLIN)
        return not look.poll(0)

    def become_relay(self) -> bool:
        """Whether this worker is the one that passes this engine's numbers on."""
        with suppress(BlockingIOError):
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def take(self) -> dict[Total, int]:
        """What was added to each total since anybody took it. For the relay only."""
        added = {}
        for total in Total:
            value = self._numbers[total]
            added[total] = value - self._numbers[len(Total) + total]
            self._numbers[len(Total) + total] = value
        return added

    def level(self, level: Level) -> int:
        """A level, as the engine last wrote it."""
        return self._numbers[2 * len(Total) + level]

    @property
    def backend(self) -> Backend | None:
        """What runs the networks; ``None`` if the engine has not said it."""
        place = self.level(Level.BACKEND)
        return _BACKENDS[place - 1] if 0 < place <= len(_BACKENDS) else None
