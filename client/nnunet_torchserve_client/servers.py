"""The servers that a client may ask: which one is next, which one is left alone for a while, how much each takes.

A request takes a place at a server and gives it back. A server has as many places as it has never refused: the number
is unbounded until it says that it has enough to do, is then what it had in hand, and is tried one higher from time to
time. A server that could not be reached is left out, longer each time, and has one place until it answers again.

A request may ask to be alone: it waits until this client has no other in flight, and keeps others waiting.

Threads: one condition guards everything; requests wait on it in :meth:`Servers.place`.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from .errors import BadAnswer, Busy, Cancelled, ClientError, CutOff, Silent, TooLate, Unreachable
from .stopping import Stop

LONGEST_ABSENCE_S = 30.0
"""For which a server that could not be reached is left alone."""

_MOST_DOUBLINGS = 16

_FIRST_PROBE, _RAREST_PROBE = 8, 1024
"""Answers for each place before one more is tried, at first and at most: a refused request costs its upload, so twice
as many after each."""


@dataclass(slots=True)
class Server:
    """One server.

    Attributes:
        url: its base URL, without a slash at the end.
        http: its connections.
        pause_s: for which it is left alone after a first loss.
        in_flight: requests that have a place.
        places: how many it has, as far as is known.
        not_before: ``time.monotonic()`` before which it is left alone.
        losses: how often in a row it could not be reached.
        refusals: how often in a row it had enough to do.
        answers: since its places last changed.
        probe_after: answers for each place before one more is tried.
    """

    url: str
    http: httpx.Client
    pause_s: float
    in_flight: int = 0
    places: float = math.inf
    not_before: float = 0.0
    losses: int = 0
    refusals: int = 0
    answers: int = 0
    probe_after: int = _FIRST_PROBE

    def has_place(self, now: float) -> bool:
        """Whether it may be asked now."""
        return now >= self.not_before and self.in_flight < (1 if self.losses else self.places)

    def note(self, error: ClientError | None, now: float, *, among_others: bool) -> None:
        """Learn from how a request ended, while it still has its place.

        Args:
            error: ``None`` if it was answered.
            now: ``time.monotonic()``.
            among_others: whether there are other servers, to which its cases go meanwhile.
        """
        if isinstance(error, CutOff | Cancelled | TooLate):  # says nothing of the server
            return
        if isinstance(error, Unreachable | Silent):
            self._lost(now)
            return
        self.losses = 0
        if isinstance(error, Busy):
            self._refused(now, error.retry_after_s or 0.0, among_others=among_others)
        elif error is None:
            self._answered()

    def _lost(self, now: float) -> None:
        if now >= self.not_before:  # those that were in flight together are one loss
            self.losses += 1
            self.not_before = now + self._absence(self.losses)

    def _refused(self, now: float, retry_after_s: float, *, among_others: bool) -> None:
        self.refusals += 1
        self.answers = 0
        if self.in_flight > 1:
            if self.in_flight <= self.places < math.inf:  # one more than before was tried
                self.probe_after = min(2 * self.probe_after, _RAREST_PROBE)
            self.places = min(self.places, self.in_flight - 1)
        if among_others:
            self.not_before = now + max(retry_after_s, self._absence(self.refusals))

    def _answered(self) -> None:
        self.refusals = 0
        self.answers += 1
        if self.answers >= self.probe_after * self.places:
            self.places += 1
            self.answers = 0

    def _absence(self, times: int) -> float:
        """Seconds to leave it alone after so many bad answers in a row; with jitter, for other clients do the same."""
        longest = min(LONGEST_ABSENCE_S, self.pause_s * 2.0 ** min(times - 1, _MOST_DOUBLINGS))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)


def _answered(error: ClientError | None) -> bool:
    """Whether a server has answered; what this machine cannot do says nothing of that."""
    if error is None or isinstance(error, CutOff | BadAnswer):
        return True
    return error.status is not None and not isinstance(error, Unreachable)


class Servers:
    """All of them."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = list(servers)
        self._changed = threading.Condition()
        self._alone = False
        self._waiting_alone = 0
        self._turn = 0
        self.reached = False
        """Whether any of them has ever answered."""

    def __len__(self) -> int:
        return len(self._servers)

    @property
    def urls(self) -> list[str]:
        """Their base URLs."""
        return [server.url for server in self._servers]

    def close(self) -> None:
        """End the connections."""
        for server in self._servers:
            server.http.close()

    def present(self) -> int:
        """How many of them may be asked; at least one."""
        now = time.monotonic()
        return max(1, sum(now >= server.not_before for server in self._servers))

    def has_place_beside(self, url: str | None) -> bool:
        """Whether a request would find a place now at another server than this one."""
        now = time.monotonic()
        with self._changed:
            return any(server.url != url and server.has_place(now) for server in self._servers)

    @contextmanager
    def place(self, stop: Stop, deadline: float, *, alone: bool = False) -> Iterator[Server]:
        """A place at a server for the length of the block, which is noted if it raises a :class:`ClientError`.

        Args:
            stop: ends the wait.
            deadline: ``time.monotonic()`` at which the wait is given up.
            alone: no other request of this client is in flight meanwhile.

        Raises:
            Cancelled: see ``stop``.
            TooLate: see ``deadline``.
        """
        with stop.telling(self._wake):
            server = self._wait(stop, deadline, alone=alone)
        try:
            yield server
        except ClientError as error:
            self._note(server, error)
            raise
        else:
            self._note(server, None)
        finally:
            with self._changed:
                server.in_flight -= 1
                self._alone = self._alone and not alone
                self._changed.notify_all()

    def _note(self, server: Server, error: ClientError | None) -> None:
        with self._changed:
            server.note(error, time.monotonic(), among_others=len(self) > 1)
            self.reached = self.reached or _answered(error)

    def _wait(self, stop: Stop, deadline: float, *, alone: bool) -> Server:
        with self._changed:
            self._waiting_alone += alone
            try:
                while True:
                    stop.check()
                    kept_out = self._alone or (bool(self._in_flight()) if alone else self._waiting_alone > 0)
                    server = None if kept_out else self._choose()
                    if server is not None:
                        server.in_flight += 1
                        self._alone = alone
                        return server
                    self._changed.wait(self._pause(deadline))
            finally:
                self._waiting_alone -= alone

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _in_flight(self) -> int:
        return sum(server.in_flight for server in self._servers)

    def _choose(self) -> Server | None:
        """The one with the least to do, those with the same in turn."""
        now = time.monotonic()
        self._turn += 1
        order = self._servers[self._turn % len(self) :] + self._servers[: self._turn % len(self)]
        return min((each for each in order if each.has_place(now)), key=lambda each: each.in_flight, default=None)

    def _pause(self, deadline: float) -> float:
        """Seconds until something may change by itself."""
        now = time.monotonic()
        if now >= deadline:
            msg = "no server would take it before the client's deadline"
            raise TooLate(msg)
        absences = [server.not_before - now for server in self._servers if server.not_before > now]
        return min(deadline - now, *absences) if absences else deadline - now
