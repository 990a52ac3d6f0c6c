"""The heart of the engine: cases in flight, one forward pass at a time.

Owned by one thread at a time. It knows neither sockets nor processes: :class:`~.local.LocalEngine` drives it in the
caller's process, :mod:`.compute` in the engine's.

Every step of a case is guarded by itself: whatever goes wrong with one case, the others do not notice. Only a GPU
that has failed ends them all, because every later call to it would fail too.

On CUDA the host runs one batch ahead of the device: while a batch runs, the next one is chosen, gathered and
launched, and a case is reported when the device has finished its last batch.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import CaseFailed, Deadline, OutOfMemory, ServingError
from ..options import Priority
from .accumulator import CaseAccumulator, Unit
from .faults import Faults
from .network import Networks
from .scheduler import Policy, Share, Waiting, next_batch

logger = logging.getLogger(__name__)


class DeviceLostError(Exception):
    """The device has failed; nothing more can be computed in this process."""


@dataclass(slots=True)
class CaseInFlight:
    """One admitted case.

    Attributes:
        case_id: the engine's number for it.
        member: whose networks it needs.
        accumulator: its passes and sums.
        arrived: monotonic seconds at admission.
        deadline: monotonic seconds after which it is given up, or ``None``.
        suspect: see :class:`~.scheduler.Waiting`.
        first_pass: when its first pass began.
        priority: see there too.
        passes_after: that the case needs for other members afterwards.
    """

    case_id: int
    member: str
    accumulator: CaseAccumulator
    arrived: float
    deadline: float | None = None
    suspect: bool = False
    first_pass: float | None = None
    priority: Priority = Priority.INTERACTIVE
    passes_after: int = 0

    def waiting(self) -> Waiting:
        """How the scheduler sees it."""
        accumulator = self.accumulator
        return Waiting(
            case_id=self.case_id,
            arrived=self.arrived,
            remaining=len(accumulator) - accumulator.added + self.passes_after,
            network=(self.member, accumulator.unit(accumulator.added).fold),
            network_remaining=accumulator.same_fold,
            suspect=self.suspect,
            priority=self.priority,
        )

    def times(self, ended: float) -> tuple[float, float]:
        """Seconds before its first pass, and from there until ``ended``."""
        started = self.first_pass or self.arrived
        return started - self.arrived, ended - started


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case that left the engine: finished, or with the error that ended it."""

    case: CaseInFlight
    error: ServingError | None = None


@dataclass(frozen=True, slots=True)
class _Pass:
    case: CaseInFlight
    unit: Unit


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch that the device may still be working on."""

    cases: list[int]
    outcomes: list[Outcome]
    finished: torch.cuda.Event
    suspect: bool


class EngineCore:
    """Cases in flight on the networks of one device."""

    def __init__(
        self,
        networks: Networks,
        batch: int = 1,
        policy: Policy = Policy.SHORTEST_REMAINING,
        before_pass: Callable[[Sequence[int]], None] = lambda _cases: None,
        faults: Faults | None = None,
    ) -> None:
        """Start empty.

        Args:
            networks: of all members.
            batch: passes in a batch, always exactly as many: a batch that is not full is padded, so that an answer
                does not depend on who else is served.
            policy: how cases are ordered.
            before_pass: told which cases the device works on before each batch, and what is left of them after it:
                the flight record.
            faults: ordered by a test.

        What it has done is counted: ``passes``; ``batches`` of them; the ``slots`` that those had; the
        ``shared_batches`` among them, with passes of more than one case.
        """
        self.networks = networks
        self.batch = batch
        self.passes = 0
        self.batches = 0
        self.slots = 0
        self.shared_batches = 0
        self._policy = policy
        self._before_pass = before_pass
        self._faults = faults or Faults([])
        self._cases: dict[int, CaseInFlight] = {}
        self._launched: _Launched | None = None
        self._turn = 0

    def __len__(self) -> int:
        """Cases in flight."""
        return len(self._cases) + (self._launched is not None)

    @property
    def remaining(self) -> int:
        """Passes that its cases still need."""
        return sum(len(case.accumulator) - case.accumulator.added for case in self._cases.values())

    def admit(self, case: CaseInFlight) -> None:
        """Take a case in."""
        self._cases[case.case_id] = case

    def drop(self, case_id: int) -> bool:
        """Forget a case and its buffers; whether it was there."""
        return self._cases.pop(case_id, None) is not None

    def passes_done(self, case_id: int) -> int | None:
        """Passes of a case whose logits are in; ``None`` if it is not in flight. Any thread may ask."""
        case = self._cases.get(case_id)
        return None if case is None else case.accumulator.added

    @contextmanager
    def blaming(self, case_id: int) -> Iterator[None]:
        """Name a case in the flight record, beside those that the device works on, while something is done for it."""
        running = self._launched.cases if self._launched else []
        self._before_pass([case_id, *running])
        try:
            yield
        finally:
            self._before_pass(running)

    @torch.inference_mode()
    def step(self, now: float) -> list[Outcome]:
        """Make one forward pass for the most urgent cases.

        Args:
            now: monotonic seconds.

        Returns:
            The cases that left the engine: finished, out of time, or failed.

        Raises:
            DeviceLostError: the device has failed.
        """
        outcomes = [self._fail(case, _out_of_time()) for case in self._expired(now)]
        shares = next_batch([case.waiting() for case in self._cases.values()], self._policy, self._turn, self.batch)
        before, self._launched = self._launched, None
        cases = [share.case_id for share in shares]
        suspect = any(self._cases[number].suspect for number in cases)
        if before is not None and (suspect or before.suspect):  # nobody else must be blamed for what a suspect does
            outcomes += _wait_for(before)
            before = None
        if shares:
            self._turn += 1
            self._before_pass(cases + (before.cases if before else []))
            ended = self._run([each for share in shares for each in self._passes(share, now)])
            if self.networks.device.type == "cuda":
                finished = torch.cuda.Event()  # type: ignore[no-untyped-call]
                finished.record()
                self._launched = _Launched(cases, ended, finished, suspect)
            else:
                outcomes += ended
        if before is not None:
            outcomes += _wait_for(before)
        self._before_pass(self._launched.cases if self._launched else [])
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
        passes = [each for each in passes if each.case.case_id in self._cases]  # an earlier part may have ended one
        if not passes:
            return []
        if len(passes) > self.batch:  # it was halved meanwhile
            parts = [passes[first : first + self.batch] for first in range(0, len(passes), self.batch)]
            return [outcome for part in parts for outcome in self._run(part)]
        failure: ServingError | None = None
        try:
            logits = self._forward(passes)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other cases go on)
            failure = as_serving_error(error)
        # out here the tensors of the failed pass are free
        if failure is None:
            self._count(passes)
            return [outcome for each, patch in zip(passes, logits, strict=False) for outcome in self._add(each, patch)]
        if isinstance(failure, OutOfMemory):
            return self._run_with_less_memory(passes, failure)
        cases = list({each.case.case_id: each.case for each in passes}.values())
        if len(cases) == 1:
            return [self._fail(cases[0], failure)]
        logger.warning("a batch of %d cases failed; trying them one by one", len(cases))
        return [outcome for case in cases for outcome in self._run([each for each in passes if each.case is case])]

    def _count(self, passes: Sequence[_Pass]) -> None:
        self.passes += len(passes)
        self.batches += 1
        self.slots += self.batch
        self.shared_batches += len({each.case.case_id for each in passes}) > 1

    def _run_with_less_memory(self, passes: Sequence[_Pass], failure: OutOfMemory) -> list[Outcome]:
        """Free what nobody uses, halve the batch for good, then take the case's sums to the host, then give it up."""
        torch.cuda.empty_cache()
        if self.batch > 1:
            self.batch //= 2
            logger.warning("out of device memory: batches of %d from now on", self.batch)
            return self._run(passes)
        case = passes[0].case
        try:
            moved = case.accumulator.move_to_host()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            return [self._fail(case, as_serving_error(error))]
        if moved:
            logger.warning("out of device memory: case %d is summed on the host", case.case_id)
            return self._run(passes)
        return [self._fail(case, failure)]

    def _forward(self, passes: Sequence[_Pass]) -> torch.Tensor:
        shapes = [each.case.accumulator.volume_shape for each in passes]
        self._faults.before_pass(shapes)
        patches = [self._on_device(each.case.accumulator.patch(each.unit)) for each in passes]
        patches += [patches[-1]] * (self.batch - len(patches))
        network = self.networks.of(passes[0].case.member)
        logits = network.forward(passes[0].unit.fold, torch.stack(patches))
        for shape, patch_logits in zip(shapes, logits, strict=False):
            self._faults.after_pass(shape, patch_logits)
        self._faults.spoil(shapes, self.networks.modules)
        return logits

    def _on_device(self, patch: torch.Tensor) -> torch.Tensor:
        """A patch where the network is; from the host through pinned memory, so that nothing waits for the copy."""
        device = self.networks.device
        if patch.device == device or device.type != "cuda":
            return patch
        pinned = torch.empty(patch.shape, dtype=patch.dtype, pin_memory=True)
        return pinned.copy_(patch).to(device, non_blocking=True)

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
    """The error that a client gets for whatever went wrong with its case.

    Raises:
        DeviceLostError: it was the device, which fails every later call too: only a new process helps.
    """
    if isinstance(error, ServingError):
        return error
    if _no_memory(error):
        return OutOfMemory("this case does not fit the engine's memory; try again later, or send a smaller volume")
    if type(error).__name__ in ("AcceleratorError", "DeviceLostError") or "CUDA error" in str(error):
        raise DeviceLostError(str(error)) from error
    logger.error("a case failed", exc_info=error)
    return CaseFailed("the network failed on this case; the server's log has the reason")


def _wait_for(launched: _Launched) -> list[Outcome]:
    launched.finished.synchronize()  # what it raises is the device's, and ends the engine
    return launched.outcomes


def _no_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return any(sign in text for sign in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))


def _out_of_time() -> ServingError:
    return Deadline("the time for this request ran out while its patches were predicted")
