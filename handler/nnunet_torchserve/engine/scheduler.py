"""Which cases the next forward pass serves: pure functions of what is waiting.

The order is decided anew before every pass, and a pass is short (a mirrored patch is eight of them), so a small case
never waits for a large one to end. Shortest-remaining-first alone would starve a large case under a stream of small
ones; so a case's remaining passes count less the longer it waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..options import FoldName

AGEING_PASSES_PER_S = 50.0
"""Passes that a second of waiting is worth. A case of 10,000 passes goes first after at most 200 s, whatever arrives;
below that a case that is 50 passes shorter may overtake one that is a second older."""


class Policy(StrEnum):
    """How cases are ordered."""

    SHORTEST_REMAINING = "shortest_remaining"
    FIFO = "fifo"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the scheduler knows of a case.

    Attributes:
        case_id: the engine's number for it.
        arrived: monotonic seconds.
        remaining: forward passes still to be made.
        fold: whose network the next pass needs.
        fold_remaining: passes left before another fold's network is needed.
        suspect: it was in a batch that killed an engine, and runs alone.
    """

    case_id: int
    arrived: float
    remaining: int
    fold: FoldName
    fold_remaining: int
    suspect: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """How many passes of a batch go to one case."""

    case_id: int
    passes: int


def in_order(waiting: Iterable[Waiting], policy: Policy, now: float) -> list[Waiting]:
    """The cases, most urgent first; ties go to the one that came first."""
    if policy is Policy.FIFO:
        return sorted(waiting, key=lambda case: (case.arrived, case.case_id))
    return sorted(
        waiting,
        key=lambda case: (case.remaining - AGEING_PASSES_PER_S * (now - case.arrived), case.arrived, case.case_id),
    )


def next_batch(waiting: Sequence[Waiting], policy: Policy, now: float, size: int) -> list[Share]:
    """Fill one batch.

    The most urgent case takes what it can; what is left goes to the next ones that need the same fold's network. A
    suspect shares its batch with nobody.

    Args:
        waiting: every case that has a pass to make.
        policy: how they are ordered.
        now: monotonic seconds.
        size: passes in a batch.

    Returns:
        The shares, all of one fold, ``size`` passes at most in all; empty only if nothing waits.
    """
    ordered = in_order(waiting, policy, now)
    if not ordered:
        return []
    first = ordered[0]
    shares: list[Share] = []
    left = size
    for case in ordered:
        if case is not first and (case.fold != first.fold or case.suspect or first.suspect):
            continue
        passes = min(left, case.fold_remaining)
        shares.append(Share(case.case_id, passes))
        left -= passes
        if left == 0:
            break
    return shares
