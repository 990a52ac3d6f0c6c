"""Distillation: trained on labels and on a teacher's probabilities, which soft-targets has cached."""

from nnunet_torchserve_trainers.distill_trainers import nnUNetTrainerDistill

__all__ = ["nnUNetTrainerDistill"]
