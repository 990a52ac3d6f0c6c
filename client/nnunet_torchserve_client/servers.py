"""The servers that a client may ask: which one is next, which one is left alone for a while, how much each takes.

Every request of a client, whichever call it belongs to, takes a place at a server and gives it back. All wait for one
in the same queue, first come, first served; so pauses belong to servers, and a case that was refused is simply the
first in the queue again. A server has room for one more request while all of these hold:

- Few of ours wait there for a worker. Nobody tells a client how many workers there are, or how many other clients. But
  a request whose answer has begun has a worker, and one whose answer has not begun waits in TorchServe's queue. So the
  workers never run dry, and that queue stays free for others.
- It has a place. The number of places is unbounded until the server refuses a request beside others of ours: then it is
  what these others are. A place is free again when one of them ends. One more than that is tried from time to time:
  soon after one was taken up, more and more rarely after one was refused.
- It is not left alone. That is so, longer each time, after it could not be reached; after it refused the only request
  of ours; while it drains; and, if there are others, while it says to every case what only a broken server says. Then
  one request at a time tries it, until one is taken up.

A request may ask to be alone: it waits until this client has no other in flight, and keeps others waiting.

Threads: one lock guards everything; each request waits on a condition of its own, and whoever changes something hands
the places out.
"""

from __future__ import annotations

import math
import random
import threading
import time
from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import (
    OF_ONE_SERVER,
    BadAnswer,
    Busy,
    Cancelled,
    ClientError,
    CutOff,
    Draining,
    ServerError,
    Silent,
    TooLate,
    Unreachable,
)
from .stopping import Stop

if TYPE_CHECKING:
    import httpx

WAITING_CASES = 2
"""Requests at each server that no worker has taken up yet: while one is sent, another may wait."""

WAITING_BATCH_CASES = 1
"""The same of those with ``priority: batch``."""

LONGEST_ABSENCE_S = 30.0
"""For which a server is left alone that says nothing of when to come again."""

RAREST_PROBE_S = 60.0
"""Between two tries of one place more, at most: a refused request costs its upload."""

MOST_FAULTS = 3
"""Errors of a server in a row after which they are taken for its own, and not for those of the cases."""

_MOST_DOUBLINGS = 16

_BATCH_STANDS_BACK_S = 60.0
"""By which a batch case must have waited longer than an interactive one to go first."""


@dataclass(slots=True)
class Server:
    """One server.

    Attributes:
        url: its base URL, without a slash at the end.
        http: its connections.
        pause_s: for which it is left alone at first, and until one place more is tried.
        in_flight: requests that have a place.
        waiting: those of them that no worker has taken up.
        begun: how many have ever had a place.
        places: how many it has, as far as is known.
        probe_at: ``time.monotonic()`` from which one more may be tried.
        probe_pause_s: before that, when it was last refused.
        not_before: ``time.monotonic()`` before which it is left alone.
        setbacks: how often in a row it was left alone.
        faults: errors of its own in a row.
        reached: whether it has ever answered.
    """

    url: str
    http: httpx.Client
    pause_s: float
    in_flight: int = 0
    waiting: int = 0
    begun: int = 0
    places: float = math.inf
    probe_at: float = 0.0
    probe_pause_s: float = 0.0
    not_before: float = 0.0
    setbacks: int = 0
    faults: int = 0
    reached: bool = False

    def has_room(self, now: float, *, batch: bool) -> bool:
        """Whether it may be asked now."""
        if now < self.not_before or (self.setbacks and self.waiting):
            return False
        if self.in_flight >= self.places and (self.in_flight > self.places or now < self.probe_at):
            return False
        return self.waiting < (WAITING_BATCH_CASES if batch else WAITING_CASES)

    def next_change(self, now: float) -> float:
        """``time.monotonic()`` at which it may have room by itself."""
        return min((at for at in (self.not_before, self.probe_at) if at > now), default=math.inf)

    def taken_up(self, now: float, *, probes: bool) -> None:
        """A worker has one of its requests.

        Args:
            now: ``time.monotonic()``.
            probes: whether that was one more than it had places.
        """
        if not self.faults:
            self.setbacks = 0
        if probes:
            self.places += 1
            self.probe_pause_s = 0.0
            self.probe_at = now + self.pause_s

    def note(
        self, error: ClientError | None, now: float, *, waited: bool, company: Company, among_others: bool
    ) -> None:
        """Learn from how a request ended, while it still has its place.

        Args:
            error: ``None`` if it was answered.
            now: ``time.monotonic()``.
            waited: whether no worker had taken it up.
            company: what it was sent beside.
            among_others: whether there are other servers, to which its cases go meanwhile.
        """
        self.reached = self.reached or _answered(error)
        if isinstance(error, CutOff | Cancelled | TooLate) or (isinstance(error, Silent) and waited):
            return  # it says nothing of the server: one that is silent may just have a long queue
        if isinstance(error, Unreachable | Silent):
            self._leave_alone(now, None)
        elif isinstance(error, Busy):
            self._refused(error, now, company)
        elif isinstance(error, OF_ONE_SERVER):
            self.faults += 1
            if among_others and (not isinstance(error, ServerError) or self.faults >= MOST_FAULTS):
                self._leave_alone(now, None)
        elif error is None or error.status is not None:
            self.setbacks = self.faults = 0

    def _refused(self, error: Busy, now: float, company: Company) -> None:
        others = max(company.others, self.in_flight - 1)  # those that it was sent beside may have ended meanwhile
        if isinstance(error, Draining) or (not others and self.begun == company.begun):
            self._leave_alone(now, error.retry_after_s)
            return
        self.places = min(self.places, max(1, others))
        if now >= self.probe_at:  # those that were in flight together are one refusal
            self.probe_pause_s = min(2 * self.probe_pause_s or self.pause_s, RAREST_PROBE_S)
            self.probe_at = now + max(error.retry_after_s or 0.0, self.probe_pause_s)

    def _leave_alone(self, now: float, seconds: float | None) -> None:
        """For so long; ``None`` is longer each time. With jitter, for other clients do the same."""
        if seconds is not None:
            until = now + seconds + random.uniform(0, self.pause_s)  # noqa: S311 (no secret)
        elif now < self.not_before:  # those that were in flight together are one setback
            return
        else:
            longest = min(LONGEST_ABSENCE_S, self.pause_s * 2.0 ** min(self.setbacks, _MOST_DOUBLINGS))
            until = now + longest * random.uniform(0.5, 1.0)  # noqa: S311 (no secret)
        self.setbacks += now >= self.not_before
        self.not_before = max(self.not_before, until)


@dataclass(frozen=True, slots=True)
class Company:
    """What a request was sent beside.

    Attributes:
        others: requests of ours that were in flight at its server.
        begun: :attr:`Server.begun`, itself included.
    """

    others: int
    begun: int


def _answered(error: ClientError | None) -> bool:
    """Whether a server has answered; what this machine cannot do says nothing of that."""
    if error is None or isinstance(error, CutOff | BadAnswer):
        return True
    return error.status is not None and not isinstance(error, Unreachable)


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
    company: Company = Company(0, 0)
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
