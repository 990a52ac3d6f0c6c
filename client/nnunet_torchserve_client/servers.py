"""The servers that a client may ask, and the one queue of its requests for a place at one of them.

Every request of a client, whichever call it belongs to, takes a place at a server and gives it back. All wait for one
in the same queue, first come, first served; so pauses belong to servers, and a case that was refused is simply the
first in the queue again. When a server has room is its own matter (:mod:`.server`); of those that have, the one with
the least to do is next.

A request may ask to be alone: it waits until this client has no other in flight, and keeps others waiting.

Threads: one lock guards everything; each request waits on a condition of its own, and whoever changes something hands
the places out.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from .errors import ClientError, TooLate
from .server import Company, Server
from .stopping import Stop

_BATCH_STANDS_BACK_S = 60.0
"""By which a batch case must have waited longer than an interactive one to go first."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request wants of a place.

    Attributes:
        since: ``time.monotonic()`` when its case was first to be sent.
        deadline: ``time.monotonic()`` at which the wait is given up.
        batch: whether nobody waits for it.
        alone: no other request of this client is in flight meanwhile.
        beside: base URLs of servers that are not to be asked.
        is_first: whether its case has never been sent: then the deadline is put off while other cases get on.
    """

    since: float
    deadline: float
    batch: bool = False
    alone: bool = False
    beside: Collection[str] = ()
    is_first: bool = False


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request that waits."""

    wish: Wish
    granted: threading.Condition
    server: Server | None = None
    company: Company = field(default=Company(0, 0))
    probes: bool = False

    @property
    def turn(self) -> float:
        """The lower, the sooner."""
        return self.wish.since + (_BATCH_STANDS_BACK_S if self.wish.batch else 0.0)


@dataclass(slots=True, eq=False)
class Place:
    """The place of one request.

    Attributes:
        server: at which.
        company: what it was sent beside.
        probes: whether it is one more than the server had.
        waits: whether no worker has taken the request up yet.
    """

    server: Server
    company: Company
    probes: bool
    _servers: Servers = field(repr=False)
    waits: bool = True

    def taken_up(self) -> None:
        """A worker has the request."""
        self._servers.taken_up(self)


class Servers:
    """All of them."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = list(servers)
        self._lock = threading.RLock()
        self._queue: list[_Ticket] = []
        self._alone = False
        self._turn = 0
        self._moved = -math.inf

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

    def reached(self, beside: Collection[str] = ()) -> bool:
        """Whether any of them has ever answered.

        Args:
            beside: base URLs of servers that do not count.
        """
        return any(server.reached for server in self._servers if server.url not in beside)

    def pause_s(self, beside: Collection[str] = ()) -> float:
        """Seconds for which all of them are left alone; without end if there is none.

        Args:
            beside: base URLs of servers that do not count.
        """
        now = time.monotonic()
        with self._lock:
            opening = [server.not_before for server in self._servers if server.url not in beside]
        return max(0.0, min(opening, default=math.inf) - now)

    @contextmanager
    def place(self, wish: Wish, stop: Stop) -> Iterator[Place]:
        """A place at a server for the length of the block, which is noted if it raises a :class:`ClientError`.

        Args:
            wish: what it is for.
            stop: ends the wait.

        Raises:
            Cancelled: see ``stop``.
            TooLate: no server had room before the deadline.
        """
        ticket = _Ticket(wish, threading.Condition(self._lock))

        def wake() -> None:
            with self._lock:
                ticket.granted.notify()

        with stop.telling(wake):
            place = Place(self._wait(ticket, stop), ticket.company, ticket.probes, self)
        try:
            yield place
        except ClientError as error:
            self._note(place, error)
            raise
        else:
            self._note(place, None)
        finally:
            self._give_back(place.server, wish, waits=place.waits)

    def taken_up(self, place: Place) -> None:
        """See :meth:`Place.taken_up`."""
        with self._lock:
            if place.waits:
                now = time.monotonic()
                place.waits = False
                place.server.waiting -= 1
                place.server.taken_up(now, probes=place.probes)
                self._moved = now
                self._grant()

    def _give_back(self, server: Server, wish: Wish, *, waits: bool) -> None:
        with self._lock:
            server.in_flight -= 1
            server.waiting -= waits
            self._alone = self._alone and not wish.alone
            self._grant()

    def _note(self, place: Place, error: ClientError | None) -> None:
        with self._lock:
            place.server.note(
                error, time.monotonic(), waited=place.waits, company=place.company, among_others=len(self) > 1
            )

    def _wait(self, ticket: _Ticket, stop: Stop) -> Server:
        with self._lock:
            insort(self._queue, ticket, key=lambda each: each.turn)
            try:
                while True:
                    self._grant()
                    if ticket.server is not None:
                        return ticket.server
                    stop.check()
                    ticket.granted.wait(self._pause(ticket.wish))
            except BaseException:  # Ctrl-C too
                if ticket.server is None:
                    self._queue.remove(ticket)
                    self._grant()  # it may have kept others waiting
                else:
                    self._give_back(ticket.server, ticket.wish, waits=True)
                raise

    def _grant(self) -> None:
        """Hand out what places there are, in turn."""
        now = time.monotonic()
        someone_alone = any(ticket.wish.alone and self._may_ask_one(ticket.wish, now) for ticket in self._queue)
        for ticket in list(self._queue):
            if self._alone or not any(server.has_room(now, batch=False) for server in self._servers):
                return
            if (someone_alone and not ticket.wish.alone) or (ticket.wish.alone and self._in_flight()):
                continue
            server = self._choose(ticket.wish, now)
            if server is not None:
                ticket.probes = server.in_flight >= server.places
                server.begun += 1
                ticket.company = Company(server.in_flight, server.begun)
                server.in_flight += 1
                server.waiting += 1
                self._alone = ticket.wish.alone
                ticket.server = server
                self._queue.remove(ticket)
                ticket.granted.notify()

    def _may_ask_one(self, wish: Wish, now: float) -> bool:
        """Whether there is a server for it that is not left alone."""
        return any(server.url not in wish.beside and now >= server.not_before for server in self._servers)

    def _in_flight(self) -> int:
        return sum(server.in_flight for server in self._servers)

    def _choose(self, wish: Wish, now: float) -> Server | None:
        """The one with the least to do, those with the same in turn."""
        self._turn += 1
        order = self._servers[self._turn % len(self) :] + self._servers[: self._turn % len(self)]
        open_ones = (each for each in order if each.url not in wish.beside and each.has_room(now, batch=wish.batch))
        return min(open_ones, key=lambda each: each.in_flight, default=None)

    def _pause(self, wish: Wish) -> float:
        """Seconds until something may change by itself."""
        now, latest = time.monotonic(), wish.deadline
        if wish.is_first:
            latest += max(0.0, self._moved - wish.since)
        if now >= latest:
            msg = "no server would take it before the client's deadline"
            raise TooLate(msg)
        return min(latest, *(server.next_change(now) for server in self._servers)) - now
