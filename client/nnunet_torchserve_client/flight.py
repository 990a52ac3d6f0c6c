"""Several cases at once, as many as the servers take.

Nobody tells a client how many workers a server has, or how many other clients. But a request whose answer has begun has
a worker, and one whose answer has not begun waits in TorchServe's queue, first come, first served. So one more case is
sent whenever fewer than a few wait there: the workers never run dry, and the queue stays free for others. What a server
refuses lowers the number for a while (:mod:`.servers`).

Threads: each case has one of its own, from the first byte that is sent to the end of ``finish``. Whoever iterates takes
cases from the caller, starts threads and hands outcomes on; it alone touches the caller's iterable. One condition
guards what they share. When the iteration ends early, the cases in flight are given up, and it waits until they are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from .answers import Answer
from .errors import ClientError
from .stopping import Stop

WAITING_CASES = 2
"""Cases for each server that no worker has taken up yet: while one is sent, another may wait."""

WAITING_BATCH_CASES = 1
"""The same of cases with ``priority: batch``."""

MOST_KEPT = 16
"""Outcomes that wait for an earlier case's or for whoever takes them."""

MOST_FINISHING = 4
"""Cases whose answers are being written or unpacked: where that is slower than the servers, they would pile up."""

_LOOK_S = 1.0
"""Between two looks at what changes with time only: a server that is back."""

_LONGEST_END_S = 60.0
"""For cases that are given up, some of which may be writing a file."""

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


class Seat:
    """What the thread of a case tells the flight."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self.waits = True
        self.finishes = False

    def taken_up(self) -> None:
        """A worker has the case."""
        self._set(waits=False)

    def put_back(self) -> None:
        """It is to be sent again."""
        self._set(waits=True)

    def _set(self, *, waits: bool) -> None:
        with self._changed:
            self.waits = waits
            self._changed.notify_all()


Ask = Callable[[Thing, Stop, Seat], Answer]
"""Sends one case and returns its answer; raises :class:`ClientError`. The seat is told how far it is."""


class _Flight(Generic[Thing, Given]):
    """The cases of one call."""

    def __init__(
        self, ask: Ask[Thing], finish: Finish[Thing, Given], may_wait: Callable[[], int], stop: Stop, *, ordered: bool
    ) -> None:
        self._ask, self._finish, self._may_wait = ask, finish, may_wait
        self._given_up, self._stop, self._ordered = stop, Stop(), ordered
        self._changed = threading.Condition()
        self._seats: dict[int, Seat] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._done: dict[int, Outcome[Thing, Given]] = {}
        self._crash: BaseException | None = None
        self._begun = self._handed_on = 0
        self._no_more = False

    def run(self, cases: Iterator[Thing]) -> Iterator[Outcome[Thing, Given]]:
        """Send them all, hand on what becomes of them."""
        with self._given_up.telling(self._stop.set), self._stop.telling(self._wake):
            while not self._no_more or self._handed_on < self._begun:
                with self._changed:
                    self._changed.wait_for(self._stirs, _LOOK_S)
                    if self._crash is not None:
                        raise self._crash
                    begins = self._may_begin()
                    outcome = None if begins else self._done.pop(self._ready(), None)
                self._stop.check()
                if begins:
                    self._begin(cases)
                elif outcome is not None:
                    self._handed_on += 1
                    yield outcome

    def end(self) -> None:
        """Give up what is in flight, and wait for it."""
        self._stop.set()
        latest = time.monotonic() + _LONGEST_END_S
        with self._changed:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(max(0.0, latest - time.monotonic()))

    def _begin(self, cases: Iterator[Thing]) -> None:
        """Give the next case a thread, if there is one."""
        try:
            case = next(cases)
        except StopIteration:
            self._no_more = True
            return
        index, seat = self._begun, Seat(self._changed)
        thread = threading.Thread(target=self._fly, args=(index, case, seat), name=f"case-{index}", daemon=True)
        with self._changed:
            self._seats[index], self._threads[index] = seat, thread
        self._begun += 1
        thread.start()

    def _fly(self, index: int, case: Thing, seat: Seat) -> None:
        outcome: Outcome[Thing, Given] | None = None
        crash: BaseException | None = None
        try:
            answer = self._ask(case, self._stop, seat)
            seat.finishes = True
            value = self._finish(case, answer)
            outcome = Outcome(case, index, value, None, replace(answer, content=b""))
        except ClientError as error:
            outcome = Outcome(case, index, None, error)
        except BaseException as error:  # noqa: BLE001 (raised again where the cases are iterated)
            crash = error
        with self._changed:
            del self._seats[index], self._threads[index]
            if outcome is not None:
                self._done[index] = outcome
            self._crash = self._crash or crash
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _stirs(self) -> bool:
        """Whether there is something to do."""
        return self._crash is not None or self._stop.is_set or self._ready() in self._done or self._may_begin()

    def _ready(self) -> int:
        """The outcome that is to be handed on next, if it is there."""
        return self._handed_on if self._ordered else next(iter(self._done), -1)

    def _may_begin(self) -> bool:
        """Whether there is a place for one more case."""
        waiting = sum(seat.waits for seat in self._seats.values())
        finishing = sum(seat.finishes for seat in self._seats.values())
        is_full = len(self._done) >= MOST_KEPT or finishing >= MOST_FINISHING
        return not self._no_more and not is_full and waiting < self._may_wait()


def fly(
    ask: Ask[Thing],
    cases: Iterable[Thing],
    finish: Finish[Thing, Given],
    *,
    may_wait: Callable[[], int],
    ordered: bool,
    stop: Stop,
) -> Generator[Outcome[Thing, Given], None, None]:
    """Send cases, several at a time.

    Args:
        ask: sends one.
        cases: taken when there is a place for one.
        finish: called with each answer, in the case's own thread.
        may_wait: how many cases may wait for a worker now.
        ordered: whether outcomes come in the order of the cases.
        stop: gives everything up.

    Yields:
        The outcome of each case.
    """
    flight = _Flight(ask, finish, may_wait, stop, ordered=ordered)
    try:
        yield from flight.run(iter(cases))
    finally:
        flight.end()
