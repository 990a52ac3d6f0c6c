"""nnU-Net's own trainer with packed region targets."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_torchserve_trainers.region_targets import RegionBitmaskMixin, RegionLabelmapMixin


class nnUNetTrainerRegionLabelmap(RegionLabelmapMixin, nnUNetTrainer):  # type: ignore[misc]
    """Ships the label map to the device and makes the regions there."""


class nnUNetTrainerRegionBitmask(RegionBitmaskMixin, nnUNetTrainer):  # type: ignore[misc]
    """Ships regions as bits of one channel and takes them apart on the device."""
