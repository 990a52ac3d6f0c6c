"""What is tried again, and how often.

A prediction changes nothing on a server, so it may be asked for again whenever the answer was lost or not given for
now. When, is a matter of the servers (:mod:`.servers`): a case that is to be tried again waits for a place there. Only
after the death of a worker it pauses by itself, for the server goes on.

Four things bound it: the client's deadline; three tries where workers die, for the case may be what kills them; a
first contact, without which the address is more likely wrong than the server away; and, for what a broken server says
to every case, one try at each server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import tenacity

from .errors import OF_ONE_SERVER, ClientError, CutOff, TooLate, Unavailable, Unreachable, WorkerDied
from .servers import Servers
from .stopping import Stop

MOST_DEATHS = 3
"""Tries of a case whose workers die; the last one is made while nothing else of this client is in flight."""

LONGEST_PAUSE_S = 30.0

Given = TypeVar("Given")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a case is tried.

    Attributes:
        deadline_s: seconds from the first try, all waiting included.
        first_contact_s: seconds for which a server that never answered is tried.
        pause_s: before another try after a worker's death; twice as much before each further one, and some jitter.
    """

    deadline_s: float = 3600.0
    first_contact_s: float = 20.0
    pause_s: float = 1.0


@dataclass(slots=True)
class Trial:
    """The tries of one case.

    Attributes:
        deadline: ``time.monotonic()`` at which it is given up.
        tries: requests so far.
        deaths: workers that died with it, as it seems.
        trouble: why the last try failed.
        faults: what servers said that may be their own fault; each is asked no more.
        forgiven: whether one of those deaths was taken for that of the whole server.
    """

    deadline: float
    started: float = field(default_factory=time.monotonic)
    tries: int = 0
    deaths: int = 0
    trouble: ClientError | None = None
    faults: list[ClientError] = field(default_factory=list)
    forgiven: bool = False

    def count(self, error: ClientError) -> None:
        """Count a death; an answer that was cut off is none if it was the whole server that went.

        That is so where the same server cannot be reached next, and once only: a case may kill whole containers.
        """
        self.deaths += isinstance(error, WorkerDied | CutOff)
        whole = isinstance(self.trouble, CutOff) and self.trouble.server == error.server
        if isinstance(error, Unreachable) and whole and not self.forgiven:
            self.deaths -= 1
            self.forgiven = True
        if isinstance(error, OF_ONE_SERVER):
            self.faults.append(error)

    @property
    def must_be_alone(self) -> bool:
        """Whether this is the last try of a case that may be what kills workers."""
        return self.deaths == MOST_DEATHS - 1

    @property
    def beside(self) -> set[str]:
        """Base URLs of the servers that are asked no more."""
        return {fault.server for fault in self.faults if fault.server is not None}

    @property
    def seconds(self) -> float:
        """Since the first try."""
        return time.monotonic() - self.started

    def verdict(self, last: ClientError) -> ClientError:
        """What is raised in the end: an error of all cases only where every server made one."""
        if last in self.faults:
            return next((fault for fault in self.faults if last.of_all_cases and not fault.of_all_cases), last)
        for fault in self.faults:
            last.reason += f"; and {fault.server} said: {fault.reason}"
        return last


@dataclass(frozen=True, slots=True)
class Retries:
    """The rules for one case.

    Attributes:
        patience: how long.
        servers: that may be asked.
        tell: is told of an error, the pause that the case makes by itself, and that until a server may be asked.
        stop: ends it.
    """

    patience: Patience
    servers: Servers
    tell: Callable[[ClientError, float, float], None]
    stop: Stop

    def run(self, once: Callable[[Trial], Given]) -> Given:
        """Call ``once`` until it returns, or raises what no further try mends, or the time is over.

        Raises:
            ClientError: the last one that ``once`` raised, with the number of tries in it.
        """
        trial = Trial(time.monotonic() + self.patience.deadline_s)

        def attempt() -> Given:
            self.stop.check()
            trial.tries += 1
            try:
                return once(trial)
            except TooLate as late:
                if trial.trouble is None:
                    raise
                if late.request_id is None:
                    trial.tries -= 1  # it waited for a place until the end, and was not sent
                raise trial.trouble from late  # what kept the case waiting says more than that it waited too long
            except ClientError as error:
                trial.count(error)
                trial.trouble = error
                raise

        pause_s = self.patience.pause_s
        backoff = tenacity.wait_exponential(pause_s, LONGEST_PAUSE_S) + tenacity.wait_random(0, pause_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._may_try_again(error, trial)),
            wait=lambda state: backoff(state) if isinstance(_error(state), WorkerDied | CutOff) else 0.0,
            stop=lambda state: self._is_over(_error(state), trial, state.upcoming_sleep),
            before_sleep=lambda state: self.tell(_error(state), state.upcoming_sleep, self._pause(trial)),
            sleep=self.stop.wait,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ClientError as error:
            final = trial.verdict(error)
            final.tries = trial.tries
            if final is error:
                raise
            raise final from error

    def _may_try_again(self, error: BaseException, trial: Trial) -> bool:
        if isinstance(error, WorkerDied | CutOff):
            return trial.deaths < MOST_DEATHS
        if isinstance(error, OF_ONE_SERVER):
            return not trial.beside.issuperset(self.servers.urls)
        return isinstance(error, Unavailable)

    def _pause(self, trial: Trial) -> float:
        return self.servers.pause_s(trial.beside)

    def _is_over(self, error: ClientError, trial: Trial, upcoming: float) -> bool:
        pause = max(upcoming, self._pause(trial))
        if self.stop.is_set or time.monotonic() + pause >= trial.deadline:
            return True
        stranger = isinstance(error, Unreachable) and not self.servers.reached(trial.beside)
        return stranger and trial.seconds + pause > self.patience.first_contact_s


def _error(state: tenacity.RetryCallState) -> ClientError:
    """What the try raised; nothing else is tried again."""
    outcome = state.outcome
    error = None if outcome is None else outcome.exception()
    if not isinstance(error, ClientError):
        msg = f"a try that failed without an error of this client: {error!r}"
        raise TypeError(msg)
    return error
