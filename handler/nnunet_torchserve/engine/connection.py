"""A worker's connection to the engine, and where its case is. Two threads send on it; the main thread owns the rest."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum, auto

from . import channel
from .admission import Claim
from .messages import Message


class State(Enum):
    """Where a connection's case is, as the main thread sees it."""

    IDLE = auto()
    FOLLOWING = auto()
    """An equal case is computed; it gets that one's answer."""

    WAITING = auto()
    GRANTED = auto()
    SUBMITTED = auto()


HOLDING = (State.GRANTED, State.SUBMITTED)


class Connection:
    """One worker."""

    def __init__(self, endpoint: socket.socket) -> None:
        self.endpoint = endpoint
        self.state = State.IDLE
        self.claim = Claim(0, 0, 0)
        self.watched = False
        self.passes_ahead = 0
        self.arrived: float | None = None
        self._listening = False
        self._lock = threading.Lock()
        self._open = True

    @property
    def case_id(self) -> int:
        """Its case's number."""
        return self.claim.number

    @property
    def is_answered(self) -> bool:
        """Whether the worker has got what it waited for, if it waited."""
        with self._lock:
            return not self._listening

    def expect(self) -> None:
        """The worker waits for an answer now: it gets heartbeats until then."""
        with self._lock:
            self._listening = True

    def beat(self, message: Message) -> None:
        """Send a sign of life if the worker waits; one that does not read would fill its socket with them."""
        self._send(message, (), last=False)

    def answer(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send what the worker waits for, without waiting; a worker that does not read is given up."""
        return self._send(message, descriptors, last=True)

    def close(self) -> None:
        """Close once, never under a send."""
        with self._lock:
            self._open = False
            self.endpoint.close()

    def _send(self, message: Message, descriptors: Sequence[int], *, last: bool) -> bool:
        with self._lock:
            if not self._open or not self._listening:
                return False
            self._listening = not last
            try:
                channel.send(self.endpoint, message, descriptors)
            except OSError:  # it has left, or does not read: it will see the end, and the main thread too
                with suppress(OSError):
                    self.endpoint.shutdown(socket.SHUT_RDWR)
                return False
            return True
