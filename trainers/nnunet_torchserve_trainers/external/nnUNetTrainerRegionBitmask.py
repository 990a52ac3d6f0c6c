"""Region-based training: the loader ships regions as bits of one channel; up to 63 channels."""

from nnunet_torchserve_trainers.region_trainers import nnUNetTrainerRegionBitmask

__all__ = ["nnUNetTrainerRegionBitmask"]
