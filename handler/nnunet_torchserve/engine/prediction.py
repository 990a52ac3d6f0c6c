"""What an engine is to its callers, wherever the networks live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..cases import Settings


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the engine gives for one case.

    Attributes:
        logits: float16 (classes, z, y, x) on the network's grid, on the CPU.
        queue_s: seconds before the case's first forward pass.
        network_s: seconds from there to its last.
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
            CaseFailed: the logits are not finite, or the network failed on this case.
            OutOfMemory: the device cannot hold this case.
        """
