"""Which cases the next forward pass serves: pure functions of what is waiting.

The order is decided anew before every batch, and a pass is short (a mirrored patch is eight of them), so a small case
never waits for a large one to end, nor an interactive one for a batch one. Interactive and shortest first alone would
starve a large batch case under a stream of others; so every few batches the case that came first goes first, whatever
it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..options import FoldName, Priority

NetworkKey = tuple[str, FoldName]
"""A member's name, and a fold of it."""

OLDEST_EVERY = 8
"""Every how many batches the oldest case goes first. It gets at least an eighth of the device, so that every case ends;
a small case loses at most an eighth. Ageing by time would let a case that has run for long hold up every newcomer
until it ends (docs/adr/0003)."""


class Policy(StrEnum):
    """How cases of one priority are ordered."""

    SHORTEST_REMAINING = "shortest_remaining"
    FIFO = "fifo"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the scheduler knows of a case.

    Attributes:
        case_id: the engine's number for it.
        arrived: monotonic seconds.
        remaining: forward passes still to be made.
        network: what the next pass needs: a member and a fold.
        network_remaining: passes left before another network is needed.
        suspect: it was in a batch that killed an engine, and runs alone.
        priority: whether somebody waits for it.
    """

    case_id: int
    arrived: float
    remaining: int
    network: NetworkKey
    network_remaining: int
    suspect: bool = False
    priority: Priority = Priority.INTERACTIVE


@dataclass(frozen=True, slots=True)
class Share:
    """How many passes of a batch go to one case."""

    case_id: int
    passes: int


def in_order(waiting: Iterable[Waiting], policy: Policy, turn: int) -> list[Waiting]:
    """The cases, most urgent first: interactive ones, by the policy; ties go to the one that came first.

    Args:
        waiting: every case that has a pass to make.
        policy: how they are ordered.
        turn: the number of the batch.
    """
    by_arrival = sorted(waiting, key=lambda case: (case.arrived, case.case_id))
    ordered = by_arrival if policy is Policy.FIFO else sorted(by_arrival, key=lambda case: case.remaining)
    ordered = sorted(ordered, key=lambda case: case.priority is Priority.BATCH)
    if turn % OLDEST_EVERY == OLDEST_EVERY - 1 and by_arrival:
        ordered.remove(by_arrival[0])
        ordered.insert(0, by_arrival[0])
    return ordered


def next_batch(waiting: Sequence[Waiting], policy: Policy, turn: int, size: int) -> list[Share]:
    """Fill one batch.

    The most urgent case takes what it can; what is left goes to the next ones that need the same network. A suspect
    shares its batch with nobody.

    Args:
        waiting: every case that has a pass to make.
        policy: how they are ordered.
        turn: the number of the batch.
        size: passes in a batch.

    Returns:
        The shares, all of one network, ``size`` passes at most in all; empty only if nothing waits.
    """
    ordered = in_order(waiting, policy, turn)
    if not ordered:
        return []
    first = ordered[0]
    shares: list[Share] = []
    left = size
    for case in ordered:
        if case is not first and (case.network != first.network or case.suspect or first.suspect):
            continue
        passes = min(left, case.network_remaining)
        shares.append(Share(case.case_id, passes))
        left -= passes
        if left == 0:
            break
    return shares
