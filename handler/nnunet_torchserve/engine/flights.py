"""Equal requests at the same time: one of them is computed, the others wait for its answer. Pure bookkeeping.

Cases are the engine's numbers. If the case that is computed ends without an answer, whatever the reason, the one that
has waited for longest is computed in its place: an error is never shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Flight:
    key: str
    leader: int
    followers: list[int] = field(default_factory=list)


class Flights:
    """The keys that are computed, and who waits for them. Used by one thread."""

    def __init__(self) -> None:
        self._by_key: dict[str, _Flight] = {}
        self._by_case: dict[int, _Flight] = {}

    @property
    def waiting(self) -> int:
        """Cases that wait for another one's answer."""
        return sum(len(flight.followers) for flight in self._by_key.values())

    def join(self, key: str, case: int, *, may_wait: bool = True) -> bool:
        """Whether a case waits for an equal one; else it is computed, and later ones wait for it.

        Args:
            key: equal for equal cases.
            case: the engine's number.
            may_wait: else it is computed in any case, by itself if an equal one is computed already.
        """
        flight = self._by_key.get(key)
        if flight is None:
            flight = self._by_key[key] = _Flight(key, case)
        elif may_wait:
            flight.followers.append(case)
        else:
            return False
        self._by_case[case] = flight
        return case != flight.leader

    def followers(self, case: int) -> int:
        """How many wait for a case. If there are none, nobody will any more."""
        flight = self._by_case.get(case)
        if flight is None or flight.leader != case:
            return 0
        if not flight.followers:
            self._end(flight)
        return len(flight.followers)

    def land(self, case: int) -> list[int]:
        """The cases that get the answer of this one."""
        flight = self._by_case.get(case)
        if flight is None or flight.leader != case:
            return []
        self._end(flight)
        return flight.followers

    def leave(self, case: int) -> int | None:
        """A case has ended without an answer; the one that is to be computed instead, if it was the computed one."""
        flight = self._by_case.pop(case, None)
        if flight is None:
            return None
        if flight.leader != case:
            flight.followers.remove(case)
            return None
        if not flight.followers:
            self._end(flight)
            return None
        flight.leader = flight.followers.pop(0)
        return flight.leader

    def _end(self, flight: _Flight) -> None:
        del self._by_key[flight.key]
        for case in (flight.leader, *flight.followers):
            self._by_case.pop(case, None)
