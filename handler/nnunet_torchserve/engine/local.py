"""The patch engine in the caller's own process: for tests, for library use, and for one worker a device."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..bundle import ModelBundle
from ..cases import Settings
from ..errors import Deadline, OutOfMemory
from ..tiling import STOCK_THREADS, Slicer
from .accumulator import CaseAccumulator
from .network import FoldNetworks, check_golden


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the engine gives for one case.

    Attributes:
        logits: float16 (classes, z, y, x) on the network's grid, on the CPU.
        queue_s: seconds that the case waited for the device.
        network_s: seconds on the device.
    """

    logits: torch.Tensor
    queue_s: float
    network_s: float


class Engine(Protocol):
    """Patches in, logits out; wherever the networks live."""

    def predict(self, data: torch.Tensor, settings: Settings, deadline: float | None) -> Prediction:
        """Predict one preprocessed case.

        Args:
            data: float32 (C, z, y, x) on the network's grid.
            settings: folds, mirroring, tiling.
            deadline: ``time.monotonic()`` after which the case is given up.

        Raises:
            Deadline: the time ran out; nothing of the case is kept.
            CaseFailed: the logits are not finite.
            OutOfMemory: the device cannot hold this case.
        """


class LocalEngine:
    """Runs one case after another on the networks that it holds.

    Threads: ``predict`` may be called by any thread; a lock lets one case run at a time. Nothing outlives the call,
    also when it raises: no thread is started and no buffer is kept.
    """

    def __init__(self, bundle: ModelBundle, device: torch.device, max_patch_batch: int = 1) -> None:
        """Load the networks and check the golden patch.

        Args:
            bundle: the model.
            device: where the networks run.
            max_patch_batch: patches in one forward pass, always exactly as many (the last batch is padded). 1 is
                bit-equal to stock on a CPU.

        Raises:
            BundleError: the weights do not fit, or the golden patch gives other logits.
        """
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        torch.set_num_threads(min(STOCK_THREADS, torch.get_num_threads()))
        self._device = device
        self._batch = max_patch_batch
        self._lock = threading.Lock()
        self._networks = FoldNetworks(bundle, device)
        check_golden(self._networks, bundle)

    def predict(self, data: torch.Tensor, settings: Settings, deadline: float | None = None) -> Prediction:
        """See :meth:`Engine.predict`."""
        arrived = time.perf_counter()
        timeout = -1 if deadline is None else max(0.0, deadline - time.monotonic())
        if not self._lock.acquire(timeout=timeout):
            _check(deadline)
        try:
            started = time.perf_counter()
            logits = self._predict(data, settings, deadline)
            return Prediction(logits, started - arrived, time.perf_counter() - started)
        finally:
            self._lock.release()

    def _predict(self, data: torch.Tensor, settings: Settings, deadline: float | None) -> torch.Tensor:
        try:
            return self._run(data, settings, deadline, self._device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        try:
            return self._run(data, settings, deadline, torch.device("cpu"))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            msg = "this case does not fit the device's memory"
            raise OutOfMemory(msg) from None

    @torch.inference_mode()
    def _run(
        self, data: torch.Tensor, settings: Settings, deadline: float | None, accumulate_on: torch.device
    ) -> torch.Tensor:
        networks = self._networks
        case = CaseAccumulator(data, networks.classes, networks.patch_size, settings, accumulate_on)
        with networks.autocast():
            for fold in settings.folds:
                for windows in _batches(case.windows, self._batch):
                    _check(deadline)
                    logits = networks.predict(fold, self._gather(case, windows), settings.mirroring_axes)
                    for window, patch_logits in zip(windows, logits, strict=False):
                        case.add(window, patch_logits.to(accumulate_on))
                case.finish_fold()
        return case.result()

    def _gather(self, case: CaseAccumulator, windows: Sequence[Slicer]) -> torch.Tensor:
        """The patches of a batch, (B, C, *patch); the last batch repeats its last patch to keep B."""
        padded = [*windows, *itertools.repeat(windows[-1], self._batch - len(windows))]
        return torch.stack([case.patch(window) for window in padded]).to(self._device)


def _batches(windows: Sequence[Slicer], size: int) -> Iterator[Sequence[Slicer]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        msg = "the time for this request ran out while its patches were predicted"
        raise Deadline(msg)
