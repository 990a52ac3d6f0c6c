"""nnU-Net's own trainer, taught by soft targets."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_torchserve_trainers.distillation import DistillMixin


class nnUNetTrainerDistill(DistillMixin, nnUNetTrainer):  # type: ignore[misc]
    """Trains on labels and on a teacher's probabilities."""
