"""How far a student is from its teacher's probabilities, beside the loss on labels.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531): both outputs are
softened by a temperature T, and the loss is multiplied by T², so that its gradients keep their size when T changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, kl_div, log_softmax, logsigmoid

_CERTAIN = 2**-12
"""What probabilities of regions are cut at, here and at 1 less this. They are cached in float16, which has no number
between 1 - 2^-11 and 1: what lies beyond the middle becomes 1, whose logit is infinite. Near 0 it has many. Without the
cut "surely inside" would pull a student's logit up without bound, and "surely outside" would not."""

Divergence = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Of logits and probabilities (B, C, *spatial), at a temperature."""


def label_divergence(logits: torch.Tensor, probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) over the classes of a voxel, the mean over voxels.

    Args:
        logits: of the student, (B, C, *spatial).
        probabilities: of the teacher at temperature 1, likewise; they add up to 1 but for rounding.
        temperature: above 0. The softmax of logits over T is proportional to the probabilities to the power of 1 / T.
    """
    softened = probabilities.float() ** (1 / temperature)
    softened = softened / softened.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    student = log_softmax(logits.float() / temperature, 1)
    voxels = logits.numel() // logits.shape[1]
    return temperature**2 * kl_div(student, softened, reduction="sum") / voxels


def region_divergence(logits: torch.Tensor, probabilities: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) of each region, which a voxel is in or not, the mean over voxels and regions.

    Args:
        logits: of the student, (B, R, *spatial).
        probabilities: of the teacher at temperature 1, likewise; taken for no nearer to 0 and 1 than 2^-12.
        temperature: above 0.
    """
    probable = probabilities.float().clamp(_CERTAIN, 1 - _CERTAIN)
    inside, outside = probable ** (1 / temperature), (1 - probable) ** (1 / temperature)
    both = inside + outside
    cooled = logits.float() / temperature
    found = kl_div(logsigmoid(cooled), inside / both, reduction="sum")
    found = found + kl_div(logsigmoid(-cooled), outside / both, reduction="sum")
    return temperature**2 * found / logits.numel()


class DistillationLoss(nn.Module):
    """A trainer's own loss, and while there are soft targets the divergence from them.

    Soft targets come at the finest scale. Each output of deep supervision is held against the voxels that its labels
    are of (``nearest-exact``, as ``DownsampleSegForDSTransform``), with the weight that its loss on labels has.

    Attributes:
        labels: the trainer's own.

    Raises:
        ValueError: a weight below 0, or a temperature that is not above it.
    """

    def __init__(self, labels: nn.Module, divergence: Divergence, weight: float, temperature: float) -> None:
        super().__init__()
        if not (weight >= 0 and temperature > 0):
            msg = f"distillation takes a weight of at least 0 and a temperature above 0, not {weight} and {temperature}"
            raise ValueError(msg)
        self.labels = labels
        self._divergence, self._weight, self._temperature = divergence, weight, temperature
        self._soft: torch.Tensor | None = None

    @contextmanager
    def taught(self, soft: torch.Tensor) -> Iterator[None]:
        """What is computed meanwhile is of this batch.

        Args:
            soft: (B, C, *spatial), on the device.
        """
        self._soft = soft.float()
        try:
            yield
        finally:
            self._soft = None

    def forward(self, output: Any, target: Any) -> torch.Tensor:
        """As the trainer's own loss: tensors, or one for each scale."""
        loss: torch.Tensor = self.labels(output, target)
        if self._soft is None:
            return loss
        return loss + self._weight * self._from_teacher(output, self._soft)

    def _from_teacher(self, output: Any, soft: torch.Tensor) -> torch.Tensor:
        """The weighted sum over scales; of a loss that has no weights, the finest scale alone."""
        is_one = isinstance(output, torch.Tensor)
        outputs, weights = ([output] if is_one else output), (1.0,)
        if not is_one:  # nnU-Net's DeepSupervisionWrapper says how much each counts
            weights = getattr(self.labels, "weight_factors", weights)
        found = soft.new_zeros(())
        for weight, logits in zip(weights, outputs, strict=False):
            if weight != 0:
                is_finest = soft.shape[2:] == logits.shape[2:]
                taken = soft if is_finest else interpolate(soft, logits.shape[2:], mode="nearest-exact")
                found = found + weight * self._divergence(logits, taken, self._temperature)
        return found
