"""Calls in turns, as often as there is time for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.harness.spread import interval_of_median, spread

LEAST_ROUNDS = 3

Side = TypeVar("Side", bound=str)


@dataclass(frozen=True, slots=True)
class Turns:
    """How often things are measured.

    Attributes:
        most: rounds at most, beside one that warms up.
        budget_s: seconds after which no further round begins; so many as have a spread are made all the same.
        quiet: returns when the machine is idle.
    """

    most: int
    budget_s: float
    quiet: Callable[[], None]

    def of(self, calls: Mapping[Side, Callable[[], float | None]]) -> dict[Side, list[float]]:
        """Seconds of each call, one after the other and again; who is first takes turns too.

        Args:
            calls: what is done; a call that returns seconds has measured itself.
        """
        seconds: dict[Side, list[float]] = {side: [] for side in calls}
        sides = list(calls)
        began = time.perf_counter()
        for number in range(self.most + 1):
            if number > min(LEAST_ROUNDS, self.most) and time.perf_counter() - began > self.budget_s:
                break
            first = number % len(sides)
            for side in (*sides[first:], *sides[:first]):
                self.quiet()
                started = time.perf_counter()
                own = calls[side]()
                took = time.perf_counter() - started if own is None else own
                if number:  # the first round warms up
                    seconds[side].append(took)
        return seconds


def compared(seconds: Mapping[Side, list[float]], against: Side) -> dict[str, Any]:
    """Spreads, and how many times sooner than one of them each other one is, round by round."""
    found: dict[str, Any] = {"seconds": {str(side): spread(values) for side, values in seconds.items()}}
    for side, values in seconds.items():
        if side != against:
            ratios = [slow / fast for slow, fast in zip(seconds[against], values, strict=True)]
            found.setdefault("times_sooner", {})[str(side)] = spread(ratios)
            found.setdefault("times_sooner_95", {})[str(side)] = interval_of_median(ratios)
    return found
