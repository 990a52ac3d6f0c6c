"""One server: when it may be asked for one more case, and what is learned from how a request ended.

It has room for one more request while all of these hold:

- Few of ours wait there for a worker. Nobody tells a client how many workers there are, or how many other clients. But
  a request whose answer has begun has a worker, and one whose answer has not begun waits in TorchServe's queue. So the
  workers never run dry, and that queue stays free for others.
- It has a place. The number of places is unbounded until the server refuses a request beside others of ours: then it is
  what these others are. A place is free again when one of them ends. One more than that is tried from time to time:
  soon after one was taken up, more and more rarely after one was refused.
- It is not left alone. That is so, longer each time, after it could not be reached; after it refused the only request
  of ours; while it drains; and, if there are others, while it says to every case what only a broken server says. Then
  one request at a time tries it, until one is taken up.

Threads: it has no lock; :class:`~.servers.Servers` has the one for all of them.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
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
