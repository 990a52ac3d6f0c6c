"""Which cases may take memory now: pure functions of what is charged and what waits.

A case is charged from the moment that its header is priced until the last byte of its answer, because decoding and
export take as much memory as the network. Cases wait in the order in which they came, and none overtakes: a large
case would otherwise never find room under a stream of small ones. Only interactive cases overtake batch ones, and the
batch case that has waited for longest no more than a few times.

What a case takes may have been a guess, until it was preprocessed. If it takes more, it holds what it was charged for
and waits for the rest before all who hold nothing yet. Cases that only wait for each other would wait for ever: one of
them is refused (:meth:`Admission.stuck`).
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
    _amended: dict[int, Claim] = field(default_factory=dict)
    """Charged claims that turned out to be others, as they are to be charged."""

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
    def growing(self) -> int:
        """Charged claims that wait for more."""
        return len(self._amended)

    def is_growing(self, number: int) -> bool:
        """Whether a charged claim waits for more."""
        return number in self._amended

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the claims that wait, and those that charged ones wait for."""
        return sum(claim.bytes for claim in self._waiting.values()) + self._growth_bytes

    @property
    def _growth_bytes(self) -> int:
        return sum(max(0, claim.bytes - self._charged[number].bytes) for number, claim in self._amended.items())

    @property
    def charged_passes(self) -> int:
        """Passes of the granted claims."""
        return sum(claim.passes for claim in self._charged.values())

    @property
    def first_waiting_bytes(self) -> int:
        """Bytes of the claim whose turn is next; charged ones that wait for more have it together."""
        return self._growth_bytes or next((claim.bytes for claim in self._in_turn()), 0)

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

    def stuck_message(self) -> str:
        """Why a claim that was charged is refused after all."""
        return "this case needs more memory than its header told, and all of it is taken; try again later"

    def amend(self, claim: Claim) -> None:
        """A charged claim turned out to be another; :meth:`grant` charges that as soon as it fits."""
        self._amended[claim.number] = claim

    def stuck(self) -> int | None:
        """The latest of the claims that wait for more, if every charged one does: none of them will end by itself."""
        return max(self._amended) if self._amended and self._amended.keys() == self._charged.keys() else None

    def give_up(self, number: int) -> None:
        """A charged claim waits for no more, and stays as it was charged until it is released."""
        self._amended.pop(number, None)

    def enter(self, claim: Claim) -> None:
        """Queue a claim that was taken in before, however many wait, where its number places it."""
        self._waiting = dict(sorted([*self._waiting.items(), (claim.number, claim)]))

    def grant(self) -> list[int]:
        """Charge whatever may be charged now, amended claims first; the numbers of those claims."""
        granted: list[int] = []
        while grown := self._amendable(self.elsewhere):
            self._charged[grown.number] = self._amended.pop(grown.number)
            granted.append(grown.number)
        while claims := self._admissible(self.elsewhere):  # one by one: each may be the last that overtakes
            claim = claims[0]
            first = self._first_batch()
            self.release(claim.number)
            self._charged[claim.number] = claim
            if first is not None and first.number < claim.number and not claim.guaranteed:
                self._overtaken += claim.priority is not Priority.BATCH
            granted.append(claim.number)
        return granted

    def could_grow(self, elsewhere: int) -> bool:
        """Whether a charged claim that waits for more could have it if only ``elsewhere`` bytes were held elsewhere."""
        return self._amendable(elsewhere) is not None

    def could_grant(self, elsewhere: int) -> bool:
        """Whether a claim that waits could be charged if only ``elsewhere`` bytes were held elsewhere."""
        return self.could_grow(elsewhere) or bool(self._admissible(elsewhere))

    def release(self, number: int) -> None:
        """Forget a claim, whether it waits or is charged."""
        first = self._first_batch()
        if first is not None and first.number == number:
            self._overtaken = 0
        self._waiting.pop(number, None)
        self._charged.pop(number, None)
        self._amended.pop(number, None)

    def would_fit(self, claim: Claim, elsewhere: int) -> bool:
        """Whether a claim could be charged, after those that wait, if only ``elsewhere`` bytes were held elsewhere."""
        return claim in self._admissible(elsewhere, claim)

    def _first_batch(self) -> Claim | None:
        return next((claim for claim in self._waiting.values() if claim.priority is Priority.BATCH), None)

    def _in_turn(self, *more: Claim) -> list[Claim]:
        return in_turn([*self._waiting.values(), *more], self._overtaken)

    def _admissible(self, elsewhere: int, *more: Claim) -> list[Claim]:
        taken = [self._amended.get(number, claim) for number, claim in self._charged.items()]
        return admissible(self._in_turn(*more), taken, self.budget.beside(elsewhere))

    def _amendable(self, elsewhere: int) -> Claim | None:
        """The first amended claim that fits, or takes no more than it has."""
        for number, claim in sorted(self._amended.items()):
            before = self._charged[number]
            others = [other for other in self._charged.values() if other.number != number]
            is_less = claim.bytes <= before.bytes and claim.passes <= before.passes
            if is_less or admissible([claim], others, self.budget.beside(elsewhere)):
                return claim
        return None
