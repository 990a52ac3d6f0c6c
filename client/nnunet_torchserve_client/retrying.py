"""What is tried again, when, and how often.

A prediction changes nothing on a server, so it may be asked for again whenever the answer was lost or not given for
now. Three things bound that: the client's deadline; three tries where workers die, for the case may be what kills them;
and a first contact, without which the address is more likely wrong than the server away.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import tenacity

from .errors import ClientError, CutOff, TooLate, Unavailable, Unreachable, WorkerDied
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
        pause_s: before the second try; twice as much before each further one, and some jitter.
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
        forgiven: whether one of those deaths was taken for that of the whole server.
    """

    deadline: float
    started: float = field(default_factory=time.monotonic)
    tries: int = 0
    deaths: int = 0
    trouble: ClientError | None = None
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

    @property
    def must_be_alone(self) -> bool:
        """Whether this is the last try of a case that may be what kills workers."""
        return self.deaths == MOST_DEATHS - 1

    @property
    def seconds(self) -> float:
        """Since the first try."""
        return time.monotonic() - self.started


@dataclass(frozen=True, slots=True)
class Retries:
    """The rules for one case.

    Attributes:
        patience: how long.
        reached: whether any server has answered this client before.
        elsewhere: whether another server than the one with this URL would take the case now.
        tell: is told of an error and the pause after it.
        stop: ends it.
    """

    patience: Patience
    reached: Callable[[], bool]
    elsewhere: Callable[[str | None], bool]
    tell: Callable[[ClientError, float], None]
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
                late.tries = trial.tries
                if trial.trouble is None:
                    raise
                trial.trouble.tries = trial.tries  # what kept the case waiting says more than that it waited too long
                raise trial.trouble from late
            except ClientError as error:
                trial.count(error)
                trial.trouble = error
                error.tries = trial.tries
                raise

        pause_s = self.patience.pause_s
        backoff = tenacity.wait_exponential(pause_s, LONGEST_PAUSE_S) + tenacity.wait_random(0, pause_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._may_try_again(error, trial)),
            wait=lambda state: self._pause(_error(state), backoff(state)),
            stop=lambda state: self._is_over(_error(state), trial, state.upcoming_sleep),
            before_sleep=lambda state: self.tell(_error(state), state.upcoming_sleep),
            sleep=self.stop.wait,
            reraise=True,
        )
        return retrying(attempt)

    def _may_try_again(self, error: BaseException, trial: Trial) -> bool:
        if isinstance(error, WorkerDied | CutOff):
            return trial.deaths < MOST_DEATHS
        return isinstance(error, Unavailable)

    def _pause(self, error: ClientError, backoff: float) -> float:
        if not isinstance(error, WorkerDied | CutOff) and self.elsewhere(error.server):
            return 0.0
        if error.retry_after_s is not None:
            return error.retry_after_s + random.uniform(0, self.patience.pause_s)  # noqa: S311 (no secret)
        return backoff

    def _is_over(self, error: ClientError, trial: Trial, pause: float) -> bool:
        if self.stop.is_set or time.monotonic() + pause >= trial.deadline:
            return True
        stranger = isinstance(error, Unreachable) and not self.reached()
        return stranger and trial.seconds + pause > self.patience.first_contact_s


def _error(state: tenacity.RetryCallState) -> ClientError:
    """What the try raised; nothing else is tried again."""
    outcome = state.outcome
    error = None if outcome is None else outcome.exception()
    if not isinstance(error, ClientError):
        msg = f"a try that failed without an error of this client: {error!r}"
        raise TypeError(msg)
    return error
