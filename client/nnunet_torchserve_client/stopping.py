"""Giving up what is in flight, at once, from another thread.

A thread that waits for a server can be woken by nothing but its connection. So each connection is known to the
:class:`Stop` of its call, which ends them all. The server is not told: TorchServe has no way for that; a request that
has been sent ends by its ``timeout_s``.

Threads: any may set a stop; one lock guards what it knows, and no callback runs with it held.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import Cancelled


class Stop:
    """Whether a call, and whatever it began, is given up."""

    def __init__(self) -> None:
        self._set = threading.Event()
        self._lock = threading.Lock()
        self._told: dict[int, Callable[[], object]] = {}
        self._next = 0

    def set(self) -> None:
        """Give up."""
        with self._lock:
            self._set.set()
            told = list(self._told.values())
        for each in told:
            each()

    @property
    def is_set(self) -> bool:
        """Whether it is given up."""
        return self._set.is_set()

    def check(self) -> None:
        """Raise :class:`Cancelled` if it is given up."""
        if self._set.is_set():
            msg = "given up by the caller"
            raise Cancelled(msg)

    def wait(self, seconds: float) -> None:
        """Sleep, unless it is or gets given up."""
        self._set.wait(seconds)

    @contextmanager
    def telling(self, callback: Callable[[], object]) -> Iterator[None]:
        """For the length of the block ``callback`` is called when it is given up, by whoever does so."""
        with self._lock:
            self._next += 1
            key = self._next
            self._told[key] = callback
        try:
            self.check()
            yield
        finally:
            with self._lock:
                del self._told[key]


class Line:
    """The connection of one request, which may be cut."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_cut = False

    def connected(self, connection: object) -> None:
        """This is the connection's socket, by now."""
        if not isinstance(connection, socket.socket):
            return
        with self._lock:
            self._socket = connection
            if self._is_cut:
                _shut(connection)

    def cut(self) -> None:
        """End the connection; who waits on it is woken."""
        with self._lock:
            self._is_cut = True
            if self._socket is not None:
                _shut(self._socket)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)  # below TLS, whose state another thread uses
