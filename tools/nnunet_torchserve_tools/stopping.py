"""Stop a server so that nothing is lost.

An order lets every worker refuse from its next request on. Two waits follow, which together may take the grace period.

First for the *work*: what workers took before the order, and what waits in TorchServe's queue, which the first free
worker refuses. Then for *quiet*: a moment at which no request is on its way in or out. TorchServe cannot close its port
and finish what it has; whatever is on a connection when it ends is reset. So refused clients are told to come again
together, once in a period (:data:`PERIOD_S`): for the rest of each nobody comes who keeps to that, and the kernel knows
whether anybody uploads still, or is given an answer (:mod:`.connections`). Those who come again at once, whatever they
are told, are waited for only so long.

Who asks for the end once more gets it at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from . import connections, ending
from .connections import InUse
from .errors import ToolError
from .orders import Target, give_order, reports, versions
from .server import Server, read_state

PERIOD_S = 4
QUIET_S = (1.5, 3.4)
"""The part of each period in which no refused client comes: not in its first second, for Retry-After is whole seconds,
nor so late that TorchServe still has its port open when the next one begins."""

LINGER_S = 9.0
"""Of waiting for quiet, with clients that come again at once: two periods and the rest of one."""

ONE_EXCHANGE_S = 2.0
"""A request that is on its way for that long is a large one, and not one of many."""

STALLED_S = 10.0
"""Without a byte: an upload whose client has gone, or an answer that nobody reads."""

SILENCE_S = 30.0
"""Of TorchServe's management API: it will answer nobody else either."""

_POLL_S = 0.1
_QUIET_POLLS, _BLIND_POLLS = 3, 8
"""So often in a row nothing may be in flight; without the kernel's word a request may be in TorchServe's own hands."""

_LAST_ANSWERS_S = 1.5
_LEAVE_S = 0.5
"""For TorchServe, which closes its port at once and then waits for two seconds for more requests."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stop went.

    Attributes:
        was_running: whether there was a server.
        lost: what was in hand when it ended; empty if nothing was.
    """

    was_running: bool
    lost: str = ""


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
    lost = ""
    if server.ready:  # else it has promised nothing yet
        stop = _Stop(server, hurry, between, tell)
        lost = stop.run(server.response_timeout_s if grace_s is None else grace_s)
        if lost and not hurry():
            stop.let_workers_go(process)
    ending.stop(state_dir, _LEAVE_S)
    return Outcome(was_running=True, lost=lost)


class Exchanges:
    """The connections that are in use, followed over time."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[InUse, float, float]] = {}

    def look(self, seen: Iterable[InUse], now: float) -> list[float]:
        """For each exchange that gets on, how many seconds it has lasted.

        Args:
            seen: the connections in use now.
            now: in monotonic seconds.
        """
        known = {}
        for each in seen:
            before, since, changed = self._known.get(each.cookie, (each, now, now))
            if each.taken > before.taken and not each.is_leaving:  # that was answered, and this is the next one
                since = now
            if (each.taken, each.received) != (before.taken, before.received):
                changed = now
            known[each.cookie] = (each, since, changed)
        self._known = known
        return [now - since for _, since, changed in known.values() if now - changed < STALLED_S]


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

    def run(self, grace_s: float) -> str:
        """Order, and wait; returns what is in hand when the time is over, or nothing."""
        deadline = time.monotonic() + grace_s
        before = {pid: report.number for pid, report in reports(self._target.control).items()}
        refused = self._refused()
        give_order(self._target, {"together_s": PERIOD_S})
        try:
            if work := self._wait_for_work(before, deadline):
                return work
            self._wait_for_quiet(refused, deadline)
        except KeyboardInterrupt:  # whoever stops it from another process has thought better of it
            self._target.order.unlink(missing_ok=True)
            raise
        return ""

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
        heard, told = time.monotonic(), ""
        while True:
            self._pause()
            self._look_at_connections()
            try:
                work = self._work(before)
                heard = time.monotonic()
            except ToolError as error:
                work = str(error)
            now = time.monotonic()
            if work and work != told:
                told = work
                self._tell(f"stopping; first, {work} is finished or refused")
            if not work or self._hurry() or now > deadline or now - heard > SILENCE_S:
                return work

    def _work(self, before: dict[int, int]) -> str:
        """What was taken before the order and what nobody has refused yet, in words.

        Args:
            before: numbers of reports from before the order: they say nothing.
        """
        reported = reports(self._target.control)
        for state in versions(self._target):
            name = f"{state['modelName']}/{state['modelVersion']}"
            for worker in state["workers"]:
                pid = int(worker["pid"])
                if worker["status"] != "READY" or not psutil.pid_exists(pid):
                    continue  # it takes no requests
                report = reported.get(pid)
                if report is None or report.number == before.get(pid) or report.works:
                    return f"a request of {name} with worker {pid}"
            if pending := int((state.get("jobQueueStatus") or {}).get("pendingRequests", 0)):
                return f"{pending} requests of {name} in the queue"
        return ""

    def _wait_for_quiet(self, refused_before: int, deadline: float) -> None:
        began, quiet = time.monotonic(), 0
        while True:
            now = time.monotonic()
            lasting = self._look_at_connections()
            idle = all(report.idle for pid, report in reports(self._target.control).items() if psutil.pid_exists(pid))
            quiet = quiet + 1 if idle and not lasting else 0
            enough = quiet >= (_BLIND_POLLS if lasting is None else _QUIET_POLLS)
            if enough and (self._refused() == refused_before or nobody_comes(time.time())):
                return
            if self._hurry() or now > deadline:
                return
            if now - began > LINGER_S and not any(each >= ONE_EXCHANGE_S for each in lasting or ()):
                return
            self._pause()

    def _look_at_connections(self) -> list[float] | None:
        """For how long each exchange lasts; ``None`` if the kernel does not tell."""
        seen = connections.in_use(self._port)
        return None if seen is None else self._exchanges.look(seen, time.monotonic())

    def _refused(self) -> int:
        return sum(report.refused for report in reports(self._target.control).values())

    def _pause(self) -> None:
        self._between()
        time.sleep(_POLL_S)


def nobody_comes(now: float) -> bool:
    """Whether this is the part of a period in which no refused client comes.

    Args:
        now: seconds of the wall clock.

    >>> [nobody_comes(now) for now in (40.0, 40.9, 42.0, 43.9)]
    [False, False, True, False]
    """
    return QUIET_S[0] <= now % PERIOD_S <= QUIET_S[1]
