"""The patch engine in the caller's own process: for tests and for library use."""

from __future__ import annotations

import itertools
import threading
import time

import torch

from ..bundle import ModelBundle
from ..cases import Settings
from ..errors import OutOfMemory
from .accumulator import CaseAccumulator
from .core import CaseInFlight, EngineCore, Outcome, as_serving_error
from .network import load_networks
from .prediction import Prediction
from .scheduler import Policy


class LocalEngine:
    """Cases of all calling threads in flight on the networks that it holds.

    Threads: ``predict`` may be called by any thread. The callers drive the engine themselves: one of them at a time
    holds the lock and makes a forward pass for whichever case is most urgent. Nothing outlives a call, also when it
    raises: no thread is started, and the case's buffers go with it.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        device: torch.device,
        max_patch_batch: int = 1,
        policy: Policy = Policy.SHORTEST_REMAINING,
    ) -> None:
        """Load the networks and check the golden patch.

        Args:
            bundle: the model.
            device: where the networks run.
            max_patch_batch: patches in one forward pass, always exactly as many (a batch that is not full is
                padded). 1 is bit-equal to stock on a CPU.
            policy: which case goes first.

        Raises:
            BundleError: the weights do not fit, or the golden patch gives other logits.
        """
        self._core = EngineCore(load_networks(bundle, device), max_patch_batch, policy)
        self._lock = threading.Lock()
        self._outcomes: dict[int, Outcome] = {}
        self._numbers = itertools.count()

    def predict(self, data: torch.Tensor, settings: Settings, deadline: float | None = None) -> Prediction:
        """See :meth:`~.prediction.Engine.predict`. What does not fit a GPU is summed on the host, as stock does."""
        device = self._core.networks.device
        try:
            return self._predict(data, settings, deadline, device)
        except OutOfMemory:
            if device.type == "cpu":
                raise
            return self._predict(data, settings, deadline, torch.device("cpu"))

    def _predict(
        self, data: torch.Tensor, settings: Settings, deadline: float | None, accumulate_on: torch.device
    ) -> Prediction:
        networks, arrived = self._core.networks, time.monotonic()
        try:
            with torch.inference_mode():
                accumulator = CaseAccumulator(
                    data, networks.classes, networks.patch_size, settings, accumulate_on, deadline=deadline
                )
        except Exception as error:
            raise as_serving_error(error) from error
        case = CaseInFlight(next(self._numbers), accumulator, arrived, deadline)
        with self._lock:
            self._core.admit(case)
        try:
            outcome = self._drive_until_done(case.case_id)
        finally:
            with self._lock:
                self._core.drop(case.case_id)
        if outcome.error is not None:
            raise outcome.error
        started, ended = case.first_pass or arrived, time.monotonic()
        logits = accumulator.result().cpu()[accumulator.unpad]
        return Prediction(logits, started - arrived, ended - started)

    def _drive_until_done(self, case_id: int) -> Outcome:
        while True:
            with self._lock:
                if case_id in self._outcomes:
                    return self._outcomes.pop(case_id)
                for outcome in self._core.step(time.monotonic()):
                    self._outcomes[outcome.case.case_id] = outcome
