"""Stop a server so that nothing is lost.

An order lets every worker refuse from its next request on. Two waits follow, which together may take the grace period.

First for the *work*: what workers took before the order, and what waits in TorchServe's queue, which the first free
worker refuses. Then for *quiet*: a moment at which no request is on its way in or out. TorchServe cannot close its port
and finish what it has; whatever is on a connection when it ends is reset. So refused clients are told to come again
together, once in a period (:data:`PERIOD_S`): for the rest of each nobody comes who keeps to that, and the kernel knows
whether anybody uploads still, or is given an answer (:mod:`.connections`). A period that is too short for the uploads
that are seen is doubled. Those who come again at once, whatever they are told, are waited for only so long, and not in
the middle of anybody else's request.

Who asks for the end once more gets it at once. What is cut then, or at the end of the grace period, is said.

Threads: the caller's, and one that asks the management API, which may take seconds to answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from nnunet_torchserve.draining import ORDERS, retry_after_s

from . import connections, ending
from .connections import InUse
from .errors import ToolError
from .orders import Descriptions, Report, Target, give_order, reports
from .server import Server, read_state

PERIOD_S = 4
LONGEST_PERIOD_S = 64
"""Clients come once in a period, and a period is doubled while it is too short for what they bring."""

QUIET_S = (1.5, 0.6)
"""So long after a period's begin, and before its end, no refused client comes: not in its first second, for Retry-After
is whole seconds, nor so late that TorchServe still has its port open when the next one begins."""

LINGER_S = 9.0
"""Of waiting for quiet, since the last large request, with clients that come again at once."""

ONE_EXCHANGE_S = 2.0
"""A request that is on its way for that long is a large one, and not one of many."""

STALLED_S = 10.0
"""Without a byte: an upload whose client has gone, or an answer that nobody reads."""

SILENCE_S = 30.0
"""Of TorchServe's management API: then workers and kernel are believed alone."""

MUTE_S = 30.0
"""Without a new report of a worker, which writes ten a second: on a full disk it cannot. Then the kernel is believed in
its place, which knows whether anybody waits for an answer."""

_POLL_S = 0.1
_QUIET_POLLS, _IDLE_POLLS = 3, 8
"""So often in a row nothing may be in flight, and every worker be idle: a request may be in TorchServe's own hands."""

_FIRST_WORD_S = 1.0
"""For the management API, however much whoever stops it is in a hurry."""

_LAST_ANSWERS_S = 1.5
_LEAVE_S = 0.5
"""For TorchServe, which closes its port at once and then waits for two seconds for more requests."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stop went.

    Attributes:
        was_running: whether there was a server.
        lost: what was in hand when it ended; empty if nothing was.
        was_cut_short: whether it ended because the grace period was over.
    """

    was_running: bool
    lost: str = ""
    was_cut_short: bool = False


def stop_gracefully(
    state_dir: Path,
    grace_s: float | None = None,
    hurry: Callable[[], bool] = lambda: False,
    between: Callable[[], object] = lambda: None,
    tell: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """Stop the server of a state directory.

    Args:
        state_dir: where it was started.
        grace_s: seconds for what is in hand; ``None``: the longest response timeout of its models.
        hurry: whether to end it now.
        between: called several times a second.
        tell: told what is waited for, when that changes.

    Raises:
        ToolError: TorchServe did not end.
    """
    server = read_state(state_dir)
    if server is None or (process := server.process()) is None:
        ending.stop(state_dir)  # what one that ended by itself has left
        return Outcome(was_running=False)
    lost, was_cut_short = "", False
    if server.ready:  # else it has promised nothing yet
        stop = _Stop(server, hurry, between, tell)
        grace_s = server.response_timeout_s if grace_s is None else grace_s
        deadline = time.monotonic() + grace_s
        lost = stop.run(grace_s)
        was_cut_short = bool(lost) and not hurry() and time.monotonic() >= deadline
        if lost and not hurry():
            stop.let_workers_go(process)
    ending.stop(state_dir, _LEAVE_S)
    if server.ready and not lost and hurry():
        lost = "a second signal, and no time to see what was in hand"
    return Outcome(was_running=True, lost=lost, was_cut_short=was_cut_short)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that is on its way in, or its answer on its way out.

    Attributes:
        seconds: that it has lasted.
        came_back: its client was answered a moment ago, and did not wait until it was to come again.
    """

    seconds: float
    came_back: bool


@dataclass(frozen=True, slots=True)
class _Followed:
    seen: InUse
    since: float
    changed: float
    came_back: bool


class Exchanges:
    """The connections that are in use, followed over time."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Followed] = {}
        self._answered: set[bytes] = set()

    def look(
        self, seen: Collection[InUse], now: float, *, working: bool = False, may_come: bool = True
    ) -> list[Exchange]:
        """The exchanges that get on, or that a worker may be at.

        Args:
            seen: the connections in use now.
            now: in monotonic seconds.
            working: whether workers have requests: a connection may be silent for as long as a case takes.
            may_come: whether refused clients may come now.
        """
        known = {}
        for each in seen:
            last = self._known.get(each.cookie)
            is_next = last is not None and each.taken > last.seen.taken and not each.is_leaving
            if last is None or is_next:  # that was answered, and this is the next one
                known_before = is_next or bool(self._answered & {each.cookie, each.peer})
                known[each.cookie] = _Followed(each, now, now, not working and not may_come and known_before)
                continue
            moved = (each.taken, each.received, each.is_leaving) != (
                last.seen.taken,
                last.seen.received,
                last.seen.is_leaving,
            )
            known[each.cookie] = _Followed(each, last.since, now if moved or working else last.changed, last.came_back)
        if not working:
            for cookie, last in self._known.items():
                if cookie not in known or known[cookie].since > last.since:
                    self._answered |= {cookie, last.seen.peer}
        self._known = known
        return [Exchange(now - each.since, each.came_back) for each in known.values() if now - each.changed < STALLED_S]


class _Stop:
    """One stop."""

    def __init__(
        self,
        server: Server,
        hurry: Callable[[], bool],
        between: Callable[[], object],
        tell: Callable[[str], object],
    ) -> None:
        self._target = Target(server.management_url, Path(server.control_dir))
        self._port = int(urlsplit(server.inference_url).port or 0)
        self._hurry, self._between, self._tell = hurry, between, tell
        self._exchanges = Exchanges()
        self._descriptions = Descriptions(self._target)
        self._period = PERIOD_S
        self._is_ordered = self._is_silent = False
        self._kernel_tells = False
        self._heard: dict[int, tuple[int | None, float]] = {}
        self._mute: set[int] = set()
        self._was_mute: set[int] = set()

    def run(self, grace_s: float) -> str:
        """Order, and wait; returns what is in hand when the time is over, or nothing."""
        began = time.monotonic()
        before = {pid: report.number for pid, report in reports(self._target.control).items()}
        refused = self._refused()
        standing = self._standing()
        not_before = began
        if refused and standing:  # somebody was refused a moment ago, and will come when that order said
            told_s = max(retry_after_s(text, time.time()) for text in standing.values())
            not_before, refused = began + told_s + 1, -1
        self._order()
        try:
            if work := self._wait_for_work(before, began + grace_s):
                return work
            return self._wait_for_quiet(refused, not_before, began + grace_s)
        except KeyboardInterrupt:  # whoever stops it from another process has thought better of it
            self._target.order.unlink(missing_ok=True)
            if (own := standing.get(self._target.order.name)) is not None:
                self._target.order.write_text(own)
            raise

    def _standing(self) -> dict[str, str]:
        """The orders that stand, by name."""
        found = {}
        for file in (self._target.control / ORDERS).glob("[!.]*"):
            with suppress(OSError):
                found[file.name] = file.read_text()
        return found

    def _order(self) -> None:
        try:
            give_order(self._target, {"together_s": self._period})
            self._is_ordered = True
        except OSError as error:
            if not self._is_ordered:
                self._tell(f"stopping; workers cannot be told to refuse what comes: {error.strerror or error}")

    def let_workers_go(self, front_end: psutil.Process) -> None:
        """Kill the workers, so that TorchServe answers what they had, "Worker died.", before it ends itself."""
        with suppress(psutil.NoSuchProcess):
            for worker in front_end.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
        until = time.monotonic() + _LAST_ANSWERS_S
        while time.monotonic() < until and connections.in_use(self._port) and not self._hurry():
            self._pause()

    def _wait_for_work(self, before: dict[int, int], deadline: float) -> str:
        began = heard = time.monotonic()
        told, work = "", "no word yet of what workers and queue hold"
        while True:
            self._pause()
            self._look_at_connections(working=True)
            answer = self._descriptions.take(_POLL_S)
            now = time.monotonic()
            if isinstance(answer, list):
                heard = now
                work = self._work(before, answer)
            self._is_silent = now - heard > SILENCE_S
            if isinstance(answer, ToolError) or self._is_silent:
                work = self._work_of_workers(before) or ("" if self._is_silent else str(answer))
            if work and work != told and answer is not None:
                told = work
                self._tell(f"stopping; first, {work} is finished or refused")
            knows = heard > began or now - began > _FIRST_WORD_S  # so that what is lost can be named
            if not work or (knows and (self._hurry() or now > deadline)):
                return work

    def _work(self, before: dict[int, int], states: list[dict[str, Any]]) -> str:
        """What was taken before the order and what nobody has refused yet, in words.

        Args:
            before: numbers of reports from before the order: they say nothing.
            states: of the model versions, as the management API has them.
        """
        reported = reports(self._target.control)
        serving = [_serving(state) if self._is_ordered else [] for state in states]
        for pid in (pid for own in serving for pid in own):
            self._listen(pid, reported.get(pid))
        for state, own in zip(states, serving, strict=True):
            name = f"{state['modelName']}/{state['modelVersion']}"
            for pid in own:
                report = reported.get(pid)
                if pid not in self._mute and (report is None or report.number == before.get(pid) or report.works):
                    return f"a request of {name} with worker {pid}"
            if pending := int((state.get("jobQueueStatus") or {}).get("pendingRequests", 0)):
                return f"{pending} requests of {name} in the queue"
        return ""

    def _work_of_workers(self, before: dict[int, int]) -> str:
        """The same, as far as workers say it themselves."""
        for pid, report in self._living().items():
            if pid not in self._mute and (report.number == before.get(pid) or report.works):
                return f"a request with worker {pid}"
        return ""

    def _living(self) -> dict[int, Report]:
        """The reports of the workers that there are."""
        found = {pid: report for pid, report in reports(self._target.control).items() if psutil.pid_exists(pid)}
        for pid, report in found.items():
            self._listen(pid, report)
        return found

    def _listen(self, pid: int, report: Report | None) -> None:
        """Note whether a worker reports nothing any more, while somebody else knows of its requests."""
        now, number = time.monotonic(), None if report is None else report.number
        last, since = self._heard.setdefault(pid, (number, now))
        if number != last:
            self._heard[pid] = number, now
            self._mute.discard(pid)
        elif now - since > MUTE_S and self._kernel_tells and pid not in self._mute:
            self._mute.add(pid)
            self._was_mute.add(pid)
            self._tell(f"stopping; worker {pid} does not say what it does (a full disk?): its client is waited for")

    def _wait_for_quiet(self, refused_before: int, not_before: float, deadline: float) -> str:
        """Wait for the moment; returns what was in use when there was none."""
        lingers_since = began = time.monotonic()
        quiet = idle_polls = 0
        while True:
            now, clock = time.monotonic(), time.time()
            living = self._living()
            idle = all(pid in self._mute or report.idle for pid, report in living.items())
            works = any(report.works for pid, report in living.items() if pid in self._was_mute)
            lasting = self._look_at_connections(working=works or bool(self._mute) or not self._is_ordered)
            idle_polls = idle_polls + 1 if idle else 0
            quiet = quiet + 1 if idle and not lasting else 0
            nobody = now >= not_before and nobody_comes(clock, self._period)
            enough = quiet >= _QUIET_POLLS and idle_polls >= _IDLE_POLLS
            if enough and ((self._refused() == refused_before and not self._mute) or nobody):
                return self._in_use(idle)
            if self._hurry() or now > deadline:
                return self._in_use(idle)
            if any(each.seconds >= ONE_EXCHANGE_S for each in lasting or ()):
                lingers_since = now
            has_lingered = now - lingers_since > LINGER_S
            if has_lingered and nobody and all(each.came_back for each in lasting or ()):
                return self._in_use(idle)
            longest = max((each.seconds for each in lasting or () if not each.came_back), default=0.0)
            if min(longest, now - began) > self._period - sum(QUIET_S) and self._period < LONGEST_PERIOD_S:
                not_before = max(not_before, now + self._period + 1)  # who was told the old one comes within it
                self._period *= 2
                self._order()
            self._pause()

    def _look_at_connections(self, *, working: bool) -> list[Exchange] | None:
        """The exchanges; ``None`` if the kernel does not tell."""
        seen = connections.in_use(self._port)
        self._kernel_tells = seen is not None
        if seen is None:
            return None
        may_come = not nobody_comes(time.time(), PERIOD_S)
        return self._exchanges.look(seen, time.monotonic(), working=working, may_come=may_come)

    def _in_use(self, idle: bool) -> str:
        """The connections that are cut, in words.

        Args:
            idle: whether every worker was; where the kernel does not tell, it is all that is known.
        """
        seen = connections.in_use(self._port)
        if seen is None:
            return "" if idle else "a request with a worker"
        count = len(seen) if self._is_silent else len(self._exchanges.look(seen, time.monotonic()))
        return f"a request or an answer on its way, on {count} connections" if count else ""

    def _refused(self) -> int:
        return sum(report.refused for report in reports(self._target.control).values())

    def _pause(self) -> None:
        self._between()
        time.sleep(_POLL_S)


def _serving(state: dict[str, Any]) -> list[int]:
    """The processes of the workers of a model version that may have a request."""
    ready = [int(worker["pid"]) for worker in state["workers"] if worker["status"] == "READY"]
    return [pid for pid in ready if psutil.pid_exists(pid)]


def nobody_comes(now: float, period_s: float = PERIOD_S) -> bool:
    """Whether this is the part of a period in which no refused client comes.

    Args:
        now: seconds of the wall clock.
        period_s: of which all longer ones are multiples.

    >>> [nobody_comes(now) for now in (40.0, 40.9, 42.0, 43.9)]
    [False, False, True, False]
    """
    return QUIET_S[0] <= now % period_s <= period_s - QUIET_S[1]
