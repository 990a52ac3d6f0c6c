"""Value types for images and label maps, free of any file format.

Axis order is nnU-Net's: arrays are (C, Z, Y, X), spacings are (z, y, x) in mm. Geometry for the patient is ITK's:
LPS coordinates, ``spacing``, ``origin`` and the columns of ``direction`` in (x, y, z) order, so that
``SimpleITK.GetImageFromArray(labels)`` takes them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""NIfTI's and nibabel's coordinates to ITK's and DICOM's; its own inverse."""

_PLANE = 2
"""Dimensions of a slice."""

MOST_COLOURS = 4
"""The last axis of an array that is no longer than this may be channels."""

LabelArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a voxel array lies in the patient.

    Attributes:
        shape: voxels per axis (Z, Y, X); a 2-D image has Z = 1.
        spacing_zyx: what nnU-Net's preprocessing gets, in mm. For a 2-D image the first entry is nnU-Net's
            placeholder, 999 times the larger in-plane spacing.
        spacing: mm per voxel along x, y, z.
        origin: LPS mm of voxel (0, 0, 0).
        direction: 3×3, column k is the unit vector of array axis x, y, z in LPS.
        ndim: 2 or 3, the dimensions of the file it came from.
        assumed: nobody said the spacing: it is what nnU-Net makes up for its pictures.
        placed: the file has no header for it: the request or nobody said where it lies.
    """

    shape: tuple[int, int, int]
    spacing_zyx: tuple[float, float, float]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: npt.NDArray[np.float64]
    ndim: int
    assumed: bool = False
    placed: bool = False

    @property
    def is_flat(self) -> bool:
        """Whether it is a 2-D image."""
        return self.ndim == _PLANE

    @property
    def voxels(self) -> int:
        """Number of voxels of one channel."""
        depth, height, width = self.shape
        return depth * height * width

    def in_space(self) -> Geometry:
        """The same; but a slice that does not lie in the patient's x-y plane at z = 0 as a volume, which can say so."""
        flat = np.eye(3)
        flat[:2, :2] = self.direction[:2, :2]
        if self.ndim == _PLANE and (self.origin[2] != 0 or np.any(self.direction != flat)):
            return replace(self, ndim=3)
        return self

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """4x4, voxel (x, y, z) to LPS mm."""
        affine = np.eye(4)
        affine[:3, :3] = self.direction * self.spacing
        affine[:3, 3] = self.origin
        return affine


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an array lies that has no header: as SimpleITK's ``GetSpacing``, ``GetOrigin`` and ``GetDirection`` say it.

    Attributes:
        spacing: mm along x, y(, z).
        origin: LPS mm of the first voxel, x, y(, z); ``None`` is 0.
        direction: 4 or 9 numbers, row by row; ``None`` is the patient's axes.
        assumed: made up, as nnU-Net does for its pictures.
    """

    spacing: tuple[float, ...]
    origin: tuple[float, ...] | None = None
    direction: tuple[float, ...] | None = None
    assumed: bool = False


@dataclass(frozen=True, slots=True)
class Volume:
    """An image: ``array`` is float32 (C, Z, Y, X)."""

    array: npt.NDArray[np.float32]
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class LabelMap:
    """A segmentation on its input's grid.

    Attributes:
        array: (Z, Y, X), uint8, or uint16 where a label is above 254 (nnU-Net's rule).
        geometry: the input's.
        probabilities: float32 or float16 (C, Z, Y, X) in nnU-Net's channel order, or of the channels chosen, where
            they were asked for.
        channels: the number of each of them.
    """

    array: LabelArray
    geometry: Geometry
    probabilities: npt.NDArray[np.float32] | npt.NDArray[np.float16] | None = None
    channels: tuple[int, ...] = ()
