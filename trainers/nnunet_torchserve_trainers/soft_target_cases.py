"""Preprocessed cases whose images bring their soft targets along, as further channels.

nnU-Net's data loader crops an image and its labels, and hands both to the augmentation. A crop that holds the soft
targets too is cut out at the same place without another loader. :mod:`~.soft_target_transforms` takes them apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_torchserve_trainers.soft_target_files import SoftTargets

Index = tuple[slice, ...]


class ImageWithSoftTargets:
    """An image (C, Z, Y, X) and its soft targets (P, Z, Y, X), read as one array of C + P channels.

    nnU-Net pads with zeros what lies outside of an image. Outside, all is background, whose probability is 1; so that
    channel has what the probability lacks to 1, with a minus. :class:`~.soft_target_transforms.SoftTargetPipeline` adds
    the 1. Regions have no such channel: outside, a voxel is in none.

    Attributes:
        shape: (C + P, Z, Y, X).
        dtype: float32.
    """

    def __init__(self, image: Any, probabilities: Any, *, has_background: bool) -> None:
        self._image, self._probabilities, self._has_background = image, probabilities, has_background
        self.shape = (image.shape[0] + probabilities.shape[0], *image.shape[1:])
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, index: Index) -> npt.NDArray[np.float32]:
        """All channels of a box, whose first slice is a whole one."""
        image = self._image[index]
        first, *spatial = image.shape
        box = np.empty((self.shape[0], *spatial), self.dtype)
        box[:first] = image
        box[first:] = self._probabilities[index]
        if self._has_background:
            box[first] -= 1
        return box


class CasesWithSoftTargets:
    """A dataset of nnU-Net's, for its data loader.

    Attributes:
        identifiers: names of its cases.
    """

    def __init__(self, cases: Any, targets: SoftTargets, *, has_background: bool) -> None:
        self._cases, self._targets, self._has_background = cases, targets, has_background
        self.identifiers = cases.identifiers

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        """As the dataset's, but for the image."""
        image, *others = self._cases.load_case(identifier)
        probabilities = self._targets.load(identifier)
        return ImageWithSoftTargets(image, probabilities, has_background=self._has_background), *others
