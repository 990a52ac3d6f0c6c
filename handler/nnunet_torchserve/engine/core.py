"""The heart of the engine: cases in flight, one forward pass at a time.

Owned by one thread at a time. It knows neither sockets nor processes: :class:`~.local.LocalEngine` drives it in the
caller's process, :mod:`.process` in a process of its own.

Every step of a case is guarded by itself: whatever goes wrong with one case, the others do not notice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import CaseFailed, Deadline, OutOfMemory, ServingError
from .accumulator import CaseAccumulator, Unit
from .network import FoldNetworks
from .scheduler import Policy, Share, Waiting, next_batch

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CaseInFlight:
    """One admitted case.

    Attributes:
        case_id: the engine's number for it.
        accumulator: its passes and sums.
        arrived: monotonic seconds at admission.
        deadline: monotonic seconds after which it is given up, or ``None``.
        suspect: see :class:`~.scheduler.Waiting`.
        first_pass: when its first pass began.
    """

    case_id: int
    accumulator: CaseAccumulator
    arrived: float
    deadline: float | None = None
    suspect: bool = False
    first_pass: float | None = field(default=None)

    def waiting(self) -> Waiting:
        """How the scheduler sees it."""
        accumulator = self.accumulator
        return Waiting(
            case_id=self.case_id,
            arrived=self.arrived,
            remaining=len(accumulator) - accumulator.added,
            fold=accumulator.unit(accumulator.added).fold,
            fold_remaining=accumulator.passes_per_fold - accumulator.added % accumulator.passes_per_fold,
            suspect=self.suspect,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case that left the engine: finished, or with the error that ended it."""

    case: CaseInFlight
    error: ServingError | None = None


@dataclass(frozen=True, slots=True)
class _Pass:
    case: CaseInFlight
    unit: Unit


class EngineCore:
    """Cases in flight on the networks of one device."""

    def __init__(
        self,
        networks: FoldNetworks,
        batch: int = 1,
        policy: Policy = Policy.SHORTEST_REMAINING,
        before_pass: Callable[[Sequence[int]], None] = lambda _cases: None,
    ) -> None:
        """Start empty.

        Args:
            networks: the fold networks.
            batch: passes in a batch, always exactly as many: a batch that is not full is padded, so that an answer
                does not depend on who else is served.
            policy: how cases are ordered.
            before_pass: told which cases are in a batch before it runs, and an empty list after: the flight record.
        """
        self.networks = networks
        self._batch = batch
        self._policy = policy
        self._before_pass = before_pass
        self._cases: dict[int, CaseInFlight] = {}

    def __len__(self) -> int:
        """Cases in flight."""
        return len(self._cases)

    def admit(self, case: CaseInFlight) -> None:
        """Take a case in."""
        self._cases[case.case_id] = case

    def drop(self, case_id: int) -> bool:
        """Forget a case and its buffers; whether it was there."""
        return self._cases.pop(case_id, None) is not None

    @torch.inference_mode()
    def step(self, now: float) -> list[Outcome]:
        """Make one forward pass for the most urgent cases.

        Args:
            now: monotonic seconds.

        Returns:
            The cases that left the engine: finished, out of time, or failed.
        """
        outcomes = [self._fail(case, _out_of_time()) for case in self._expired(now)]
        shares = next_batch([case.waiting() for case in self._cases.values()], self._policy, now, self._batch)
        if not shares:
            return outcomes
        passes = [each for share in shares for each in self._passes(share, now)]
        self._before_pass([share.case_id for share in shares])
        try:
            outcomes += self._run(passes)
        finally:
            self._before_pass([])
        return outcomes

    def _expired(self, now: float) -> list[CaseInFlight]:
        return [case for case in self._cases.values() if case.deadline is not None and now >= case.deadline]

    def _passes(self, share: Share, now: float) -> list[_Pass]:
        case = self._cases[share.case_id]
        if case.first_pass is None:
            case.first_pass = now
        first = case.accumulator.added
        return [_Pass(case, case.accumulator.unit(number)) for number in range(first, first + share.passes)]

    def _run(self, passes: Sequence[_Pass]) -> list[Outcome]:
        """Forward a batch; what fails as a whole is retried case by case, so that only the guilty one fails."""
        try:
            logits = self._forward(passes)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other cases go on)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            cases = list({each.case.case_id: each.case for each in passes}.values())
            if len(cases) == 1:
                return [self._fail(cases[0], as_serving_error(error))]
            logger.warning("a batch of %d cases failed (%s); trying them one by one", len(cases), type(error).__name__)
            return [outcome for case in cases for outcome in self._run([each for each in passes if each.case is case])]
        return [outcome for each, patch in zip(passes, logits, strict=False) for outcome in self._add(each, patch)]

    def _forward(self, passes: Sequence[_Pass]) -> torch.Tensor:
        patches = [each.case.accumulator.patch(each.unit) for each in passes]
        patches += [patches[-1]] * (self._batch - len(patches))
        batch = torch.stack([patch.to(self.networks.device) for patch in patches])
        with self.networks.autocast():
            return self.networks.forward(passes[0].unit.fold, batch)

    def _add(self, each: _Pass, logits: torch.Tensor) -> list[Outcome]:
        if each.case.case_id not in self._cases:  # an earlier pass of this batch ended it
            return []
        try:
            each.case.accumulator.add(each.unit, logits.to(each.case.accumulator.device))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            return [self._fail(each.case, as_serving_error(error))]
        if each.case.accumulator.done:
            self.drop(each.case.case_id)
            return [Outcome(each.case)]
        return []

    def _fail(self, case: CaseInFlight, error: ServingError) -> Outcome:
        self.drop(case.case_id)
        return Outcome(case, error)


def as_serving_error(error: Exception) -> ServingError:
    """The error that a client gets for whatever went wrong with its case."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemory("this case does not fit the device's memory")
    logger.error("a case failed", exc_info=error)
    return CaseFailed("the network failed on this case; the server's log has the reason")


def _out_of_time() -> ServingError:
    return Deadline("the time for this request ran out while its patches were predicted")
