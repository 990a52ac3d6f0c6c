"""Several cases at once, as many as the servers take.

How many that is, is a matter of the servers (:mod:`.servers`), where all requests of a client wait for a place. A
flight only sees to it that one of its cases is always there to take the next one, and no more: a case holds memory.

Threads: each case has one of its own, from the first byte that is sent to the end of ``finish``. One more takes cases
from the caller's iterable, and starts those threads: so outcomes that are ready are handed on while the iterable makes
up its mind, and cases go on while whoever takes the outcomes is busy. One condition guards what they share. When the
iteration ends early, the cases in flight are given up, and it waits until they are.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Generic, TypeVar

from .answers import Answer
from .errors import ClientError
from .stopping import Stop

MOST_KEPT = 16
"""Outcomes that wait for an earlier case's or for whoever takes them."""

MOST_FINISHING = 4
"""Cases whose answers are being written or unpacked: where that is slower than the servers, they would pile up."""

MOST_RESTING = 4
"""Cases that pause after the death of their worker."""

_LOOK_S = 1.0
"""For which Ctrl-C may have to wait on some systems."""

_LONGEST_END_S = 60.0
"""For cases that are given up, some of which may be writing a file."""

_LONGEST_TAKE_S = 1.0
"""For an iterable that is asked for its next case just then; nothing can wake it."""

Given = TypeVar("Given")
Thing = TypeVar("Thing")

Finish = Callable[[Thing, Answer], Given]
"""What is to become of a case and its answer; called in the thread of the case."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[Thing, Given]):
    """What became of a case.

    Attributes:
        case: the case.
        index: its place among the cases, from 0.
        value: what ``finish`` returned; ``None`` if it failed.
        error: why it failed; ``None`` if it did not.
        answer: the answer without its content: warnings, timing, tries; ``None`` if it failed.
    """

    case: Thing
    index: int
    value: Given | None = None
    error: ClientError | None = None
    answer: Answer | None = None


class Stage(Enum):
    """Where a case is."""

    QUEUES = auto()
    """It has no place at a server yet, or none again."""

    RESTS = auto()
    """Its worker died, and it pauses."""

    FLIES = auto()
    """A server has it."""

    FINISHES = auto()
    """Its answer is being written or unpacked."""


class Seat:
    """What the thread of a case tells the flight."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self.stage = Stage.QUEUES

    def placed(self) -> None:
        """A server has room for it."""
        self._enter(Stage.FLIES)

    def put_back(self, *, rests: bool) -> None:
        """It is to be sent again, after a pause of its own if it ``rests``."""
        self._enter(Stage.RESTS if rests else Stage.QUEUES)

    def finishes(self) -> None:
        """It is answered."""
        self._enter(Stage.FINISHES)

    def _enter(self, stage: Stage) -> None:
        with self._changed:
            self.stage = stage
            self._changed.notify_all()


Ask = Callable[[Thing, Stop, Seat], Answer]
"""Sends one case and returns its answer; raises :class:`ClientError`. The seat is told how far it is."""


class _Flight(Generic[Thing, Given]):
    """The cases of one call."""

    def __init__(self, ask: Ask[Thing], finish: Finish[Thing, Given], stop: Stop, *, ordered: bool) -> None:
        self._ask, self._finish = ask, finish
        self._given_up, self._stop, self._ordered = stop, Stop(), ordered
        self._changed = threading.Condition()
        self._seats: dict[int, Seat] = {}
        self._threads: list[threading.Thread] = []
        self._done: dict[int, Outcome[Thing, Given]] = {}
        self._crash: BaseException | None = None
        self._taker: threading.Thread | None = None
        self._begun = self._handed_on = 0
        self._no_more = False

    def run(self, cases: Iterator[Thing]) -> Iterator[Outcome[Thing, Given]]:
        """Send them all, hand on what becomes of them."""
        with self._given_up.telling(self._stop.set), self._stop.telling(self._wake):
            self._taker = threading.Thread(target=self._take, args=(cases,), name="cases", daemon=True)
            self._taker.start()
            while (outcome := self._next()) is not None:
                yield outcome

    def end(self) -> None:
        """Give up what is in flight, and wait for it."""
        self._stop.set()
        latest = time.monotonic() + _LONGEST_END_S
        if self._taker is not None and self._taker.is_alive():  # an interrupt may have come before it was
            self._taker.join(_LONGEST_TAKE_S)
        with self._changed:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, latest - time.monotonic()))

    def _next(self) -> Outcome[Thing, Given] | None:
        """The next outcome; ``None`` after the last."""
        with self._changed:
            while not self._changed.wait_for(self._stirs, _LOOK_S):
                pass
            if self._crash is not None:
                raise self._crash
            self._stop.check()
            if self._ready() not in self._done:
                return None
            outcome = self._done.pop(self._ready())
            self._handed_on += 1
            self._changed.notify_all()
            return outcome

    def _stirs(self) -> bool:
        """Whether there is something for who takes the outcomes."""
        over = self._no_more and self._handed_on == self._begun
        return over or self._crash is not None or self._stop.is_set or self._ready() in self._done

    def _take(self, cases: Iterator[Thing]) -> None:
        """Give each case a thread, when there is room for it."""
        crash: BaseException | None = None
        try:
            while self._waits_for_room():
                self._begin(next(cases))
        except StopIteration:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again where the outcomes are iterated)
            crash = error
        with self._changed:
            self._no_more = True
            self._crash = self._crash or crash
            self._changed.notify_all()

    def _waits_for_room(self) -> bool:
        """Return when one more case may be taken; ``False`` if none is wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over() or self._may_begin())
            return not self._is_over()

    def _is_over(self) -> bool:
        return self._stop.is_set or self._crash is not None

    def _begin(self, case: Thing) -> None:
        with self._changed:
            if self._is_over():
                return
            index, seat = self._begun, Seat(self._changed)
            thread = threading.Thread(target=self._fly, args=(index, case, seat), name=f"case-{index}", daemon=True)
            self._seats[index] = seat
            self._begun += 1
            thread.start()  # whoever ends the flight waits for threads that have been started
            self._threads = [*(each for each in self._threads if each.is_alive()), thread]

    def _fly(self, index: int, case: Thing, seat: Seat) -> None:
        outcome: Outcome[Thing, Given] | None = None
        crash: BaseException | None = None
        try:
            answer = self._ask(case, self._stop, seat)
            seat.finishes()
            value = self._finish(case, answer)
            outcome = Outcome(case, index, value, None, replace(answer, content=b""))
        except ClientError as error:
            outcome = Outcome(case, index, None, error)
        except BaseException as error:  # noqa: BLE001 (raised again where the cases are iterated)
            crash = error
        with self._changed:
            del self._seats[index]
            if outcome is not None:
                self._done[index] = outcome
            self._crash = self._crash or crash
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _ready(self) -> int:
        """The outcome that is to be handed on next, if it is there."""
        return self._handed_on if self._ordered else next(iter(self._done), -1)

    def _may_begin(self) -> bool:
        """Whether one more case is to be there."""
        stages = Counter(seat.stage for seat in self._seats.values())
        return (
            not stages[Stage.QUEUES]
            and stages[Stage.RESTS] < MOST_RESTING
            and stages[Stage.FINISHES] < MOST_FINISHING
            and len(self._done) < MOST_KEPT
        )


def fly(
    ask: Ask[Thing],
    cases: Iterable[Thing],
    finish: Finish[Thing, Given],
    *,
    ordered: bool,
    stop: Stop,
) -> Generator[Outcome[Thing, Given], None, None]:
    """Send cases, several at a time.

    Args:
        ask: sends one.
        cases: are taken when there is room for one, by a thread of their own. To wait for an outcome there is no use:
            one more case is taken before it is sent.
        finish: called with each answer, in the case's own thread.
        ordered: whether outcomes come in the order of the cases.
        stop: gives everything up.

    Yields:
        The outcome of each case.
    """
    flight = _Flight(ask, finish, stop, ordered=ordered)
    try:
        yield from flight.run(iter(cases))
    finally:
        flight.end()
