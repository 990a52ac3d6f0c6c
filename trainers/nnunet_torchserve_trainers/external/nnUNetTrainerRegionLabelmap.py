"""Region-based training: the loader ships the label map, regions are made on the device."""

from nnunet_torchserve_trainers.region_trainers import nnUNetTrainerRegionLabelmap

__all__ = ["nnUNetTrainerRegionLabelmap"]
