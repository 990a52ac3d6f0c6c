"""The patch engine in the caller's own process: for tests and for library use."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..backend import Backend
from ..bundle import ModelBundle
from ..cases import Price, Settings
from ..errors import Busy, Deadline, OutOfMemory
from ..limits import Limits
from ..options import Priority
from .accumulator import CaseAccumulator, Layout, new_accumulator
from .admission import NEVER_FITS, Admission, Budget, Claim
from .core import CaseInFlight, EngineCore, Outcome, as_serving_error
from .golden import load_networks
from .network import Networks
from .prediction import Keep, Prediction, Reservation, Watcher
from .scheduler import Policy


class LocalEngine:
    """Cases of all calling threads in flight on the networks that it holds.

    Threads: its methods may be called by any thread. The callers drive the engine themselves: one of them at a time
    holds the lock and makes a forward pass for whichever case is most urgent. Nothing outlives a call, also when it
    raises: no thread is started, and the case's buffers go with it.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        device: torch.device,
        max_patch_batch: int = 1,
        policy: Policy = Policy.SHORTEST_REMAINING,
        limits: Limits | None = None,
        backend: Backend = Backend.EAGER,
    ) -> None:
        """Load the networks and check the golden patch.

        Args:
            bundle: the model.
            device: where the networks run.
            max_patch_batch: patches in one forward pass, always exactly as many (a batch that is not full is
                padded). 1 is bit-equal to stock on a CPU.
            policy: which case goes first.
            limits: what all cases may take together.
            backend: what runs the networks; no other one is taken in its place.

        Raises:
            BundleError: the weights do not fit, or the golden patch gives other logits; or archive, device or machine
                have not what the backend needs.
        """
        limits = limits or Limits()
        self._core = EngineCore(load_networks(bundle, device, backend, max_patch_batch), max_patch_batch, policy)
        self._lock = threading.Lock()
        self._outcomes: dict[int, Outcome] = {}
        self._numbers = itertools.count()
        self._admission = Admission(Budget(limits.memory_bytes, limits.passes, limits.waiting_cases))
        self._room = threading.Condition()

    @property
    def backend(self) -> Backend:
        """What runs the networks."""
        return self._core.networks.backend

    @property
    def networks(self) -> Networks:
        """What it holds, for whoever reads what is said of them."""
        return self._core.networks

    @contextmanager
    def reserve(
        self,
        price: Price,
        deadline: float | None,
        *,
        guaranteed: bool = False,
        watcher: Watcher | None = None,
        answer_key: str | None = None,  # noqa: ARG002 (nothing is kept here)
        priority: Priority = Priority.INTERACTIVE,
    ) -> Iterator[Reservation]:
        """See :meth:`~.prediction.Engine.reserve`."""
        began = time.monotonic()
        claim = Claim(next(self._numbers), price.bytes, price.passes, guaranteed, priority)
        if claim.exceeds(self._admission.budget) and not guaranteed:
            raise OutOfMemory(NEVER_FITS)
        try:
            with self._room:
                if not self._admission.ask(claim):
                    raise Busy(self._admission.busy_message(), 1)
                self._admission.grant()
                while not self._admission.is_charged(claim.number):
                    if watcher is not None:
                        watcher.queued(self._admission.ahead_of(claim.number))
                    self._wait_for_room(deadline)
            yield Reservation(time.monotonic() - began, amend=lambda known: self._amend(claim, known, deadline))
        finally:
            with self._room:
                self._admission.release(claim.number)
                self._admission.grant()
                self._room.notify_all()

    def _amend(self, claim: Claim, price: Price, deadline: float | None) -> None:
        """See :class:`~.prediction.Reservation`."""
        amended = replace(claim, bytes=price.bytes, passes=price.passes)
        if amended.exceeds(self._admission.budget) and not claim.guaranteed:
            raise OutOfMemory(NEVER_FITS)
        with self._room:
            self._admission.amend(amended)
            self._admission.grant()
            self._room.notify_all()
            try:
                while self._admission.is_growing(claim.number):
                    if self._admission.stuck() == claim.number:
                        raise Busy(self._admission.stuck_message(), 1)
                    self._wait_for_room(deadline)
            finally:
                self._admission.give_up(claim.number)

    def _wait_for_room(self, deadline: float | None) -> None:
        """Until something was released, or the time has run out."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            msg = "the time for this request ran out while it waited for memory"
            raise Deadline(msg)
        self._room.wait(left)

    def predict(
        self,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None = None,
        watcher: Watcher | None = None,
        keep: Keep | None = None,  # noqa: ARG002 (nothing is kept here)
        passes_after: int = 0,
    ) -> Prediction:
        """See :meth:`~.prediction.Engine.predict`. What does not fit a GPU is summed on the host, as stock does."""
        arrived = time.monotonic()
        accumulator = self._accumulator(data, settings)
        number = next(self._numbers)
        case = CaseInFlight(
            number,
            settings.member,
            accumulator,
            arrived,
            deadline,
            priority=settings.priority,
            passes_after=passes_after,
        )
        with self._lock:
            self._core.admit(case)
        try:
            outcome = self._drive_until_done(case, watcher)
        finally:
            with self._lock:
                self._core.drop(case.case_id)
        if outcome.error is not None:
            raise outcome.error
        queue_s, network_s = case.times(time.monotonic())
        logits = case.accumulator.result().cpu()[case.accumulator.unpad]
        return Prediction(logits, queue_s, network_s, self.backend)

    def _accumulator(self, data: torch.Tensor, settings: Settings) -> CaseAccumulator:
        networks = self._core.networks.of(settings.member)
        layout = Layout(networks.classes, networks.patch_size, networks.device, self._core.batch)
        with torch.inference_mode():
            try:
                return new_accumulator(data, settings, layout)
            except torch.OutOfMemoryError:
                return new_accumulator(data, settings, replace(layout, device=torch.device("cpu")))
            except Exception as error:
                raise as_serving_error(error) from error

    def _drive_until_done(self, case: CaseInFlight, watcher: Watcher | None) -> Outcome:
        while True:
            if watcher is not None:
                watcher.passes(case.accumulator.added)
            with self._lock:
                if case.case_id in self._outcomes:
                    return self._outcomes.pop(case.case_id)
                for outcome in self._core.step(time.monotonic()):
                    self._outcomes[outcome.case.case_id] = outcome
