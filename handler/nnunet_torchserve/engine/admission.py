"""Which cases may take memory now: pure functions of what is charged and what waits.

A case is charged from the moment that its header is priced until the last byte of its answer, because decoding and
export take as much memory as the network. Cases wait in the order in which they came, and none overtakes: a large
case would otherwise never find room under a stream of small ones. Only interactive cases overtake batch ones, and the
batch case that has waited for longest no more than a few times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from ..options import Priority

OVERTAKEN_AT_MOST = 8
"""Times that interactive cases may be charged before a batch case that came earlier; then it has its turn, and they
wait for it as they do for each other. As the scheduler's share of the oldest case (docs/adr/0006)."""

NEVER_FITS = "this case needs more memory or forward passes than the engine has for all cases"


@dataclass(frozen=True, slots=True)
class Budget:
    """What all cases of an engine may take together.

    Attributes:
        bytes: memory.
        passes: forward passes.
        waiting: cases that may wait for it; the next one is refused.
        shared_bytes: memory that the cases of all engines may take together; ``None`` where there is no other.
    """

    bytes: int
    passes: int
    waiting: int
    shared_bytes: int | None = None

    def beside(self, elsewhere: int) -> Budget:
        """What is left of it while other engines hold ``elsewhere`` bytes."""
        if self.shared_bytes is None:
            return self
        return replace(self, bytes=min(self.bytes, self.shared_bytes - elsewhere))


@dataclass(frozen=True, slots=True)
class Claim:
    """What one case takes.

    Attributes:
        number: the engine's number for it.
        bytes, passes: see :class:`Budget`.
        guaranteed: it does not wait: it holds its memory already because an engine died under it, or it is a new
            worker's trial.
        priority: whether somebody waits for it.
    """

    number: int
    bytes: int
    passes: int
    guaranteed: bool = False
    priority: Priority = Priority.INTERACTIVE

    def exceeds(self, budget: Budget) -> bool:
        """Whether it would not fit even alone."""
        return self.bytes > budget.beside(0).bytes or self.passes > budget.passes


def in_turn(waiting: Sequence[Claim], overtaken: int) -> list[Claim]:
    """The order in which claims are granted.

    Args:
        waiting: in the order of their arrival.
        overtaken: how often the first batch claim among them was overtaken.

    Returns:
        Interactive claims first; but a batch claim that was overtaken often enough stays where it came.
    """
    batch = [claim for claim in waiting if claim.priority is Priority.BATCH]
    if batch and overtaken >= OVERTAKEN_AT_MOST:
        turn = waiting.index(batch[0]) + 1
        return [*waiting[:turn], *in_turn(waiting[turn:], 0)]
    return [claim for claim in waiting if claim.priority is not Priority.BATCH] + batch


def admissible(waiting: Sequence[Claim], charged: Iterable[Claim], budget: Budget) -> list[Claim]:
    """The waiting claims that may be charged now.

    Args:
        waiting: in the order of :func:`in_turn`.
        charged: already granted.
        budget: what all of them may take together; guaranteed claims may exceed it.

    Returns:
        Every guaranteed claim, and of the others the first ones, as far as they fit.
    """
    granted = [claim for claim in waiting if claim.guaranteed]
    taken = [*charged, *granted]
    used_bytes, used_passes = sum(c.bytes for c in taken), sum(c.passes for c in taken)
    for claim in waiting:
        if claim.guaranteed:
            continue
        used_bytes, used_passes = used_bytes + claim.bytes, used_passes + claim.passes
        if used_bytes > budget.bytes or used_passes > budget.passes:
            break
        granted.append(claim)
    return granted


@dataclass(slots=True)
class Admission:
    """Claims of one engine: those charged and those that wait. Used by one thread at a time.

    Attributes:
        budget: what they may take together.
        elsewhere: bytes that others hold of the same memory.
    """

    budget: Budget
    elsewhere: int = 0
    _charged: dict[int, Claim] = field(default_factory=dict)
    _waiting: dict[int, Claim] = field(default_factory=dict)
    _overtaken: int = 0
    """How often the batch claim that waits for longest was overtaken."""

    @property
    def waiting(self) -> int:
        """Claims that wait."""
        return len(self._waiting)

    @property
    def charged(self) -> int:
        """Granted claims."""
        return len(self._charged)

    @property
    def charged_bytes(self) -> int:
        """Bytes of the granted claims."""
        return sum(claim.bytes for claim in self._charged.values())

    def is_charged(self, number: int) -> bool:
        """Whether a claim was granted."""
        return number in self._charged

    def ahead_of(self, number: int) -> int:
        """How many claims wait in front of one that waits."""
        return sum(1 for _ in takewhile(lambda other: other.number != number, self._in_turn()))

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the claims that wait."""
        return sum(claim.bytes for claim in self._waiting.values())

    @property
    def charged_passes(self) -> int:
        """Passes of the granted claims."""
        return sum(claim.passes for claim in self._charged.values())

    @property
    def first_waiting_bytes(self) -> int:
        """Bytes of the claim whose turn is next."""
        return next((claim.bytes for claim in self._in_turn()), 0)

    def busy_message(self) -> str:
        """Why a claim was refused."""
        return f"as many cases as allowed ({self.waiting}) wait for memory already; try again later"

    def ask(self, claim: Claim) -> bool:
        """Queue a claim; ``False``, and nothing is kept, if too many wait already; batch claims keep no other out."""
        rivals = [each for each in self._waiting.values() if claim.priority in (each.priority, Priority.BATCH)]
        full = len(rivals) >= self.budget.waiting
        if not claim.guaranteed and full and not self.would_fit(claim, self.elsewhere):
            return False
        self._waiting[claim.number] = claim
        return True

    def enter(self, claim: Claim) -> None:
        """Queue a claim that was taken in before, however many wait, where its number places it."""
        self._waiting = dict(sorted([*self._waiting.items(), (claim.number, claim)]))

    def grant(self) -> list[int]:
        """Charge whatever may be charged now; the numbers of those claims."""
        granted: list[int] = []
        while claims := self._admissible(self.elsewhere):  # one by one: each may be the last that overtakes
            claim = claims[0]
            first = self._first_batch()
            self.release(claim.number)
            self._charged[claim.number] = claim
            if first is not None and first.number < claim.number and not claim.guaranteed:
                self._overtaken += claim.priority is not Priority.BATCH
            granted.append(claim.number)
        return granted

    def could_grant(self, elsewhere: int) -> bool:
        """Whether a claim that waits could be charged if only ``elsewhere`` bytes were held elsewhere."""
        return bool(self._admissible(elsewhere))

    def release(self, number: int) -> None:
        """Forget a claim, whether it waits or is charged."""
        first = self._first_batch()
        if first is not None and first.number == number:
            self._overtaken = 0
        self._waiting.pop(number, None)
        self._charged.pop(number, None)

    def would_fit(self, claim: Claim, elsewhere: int) -> bool:
        """Whether a claim could be charged, after those that wait, if only ``elsewhere`` bytes were held elsewhere."""
        return claim in self._admissible(elsewhere, claim)

    def _first_batch(self) -> Claim | None:
        return next((claim for claim in self._waiting.values() if claim.priority is Priority.BATCH), None)

    def _in_turn(self, *more: Claim) -> list[Claim]:
        return in_turn([*self._waiting.values(), *more], self._overtaken)

    def _admissible(self, elsewhere: int, *more: Claim) -> list[Claim]:
        return admissible(self._in_turn(*more), self._charged.values(), self.budget.beside(elsewhere))
