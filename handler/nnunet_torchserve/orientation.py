"""Bringing an image into the orientation that a model was trained in, and the answer back.

nnU-Net's ``…WithReorient`` readers do it, and an archive may ask for it (``archive --input-orientation``). Axes are
swapped and reversed, never interpolated: every voxel keeps its value and its place in the patient.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

from .volume import RAS_TO_LPS, Geometry, LabelMap

_LETTERS = re.compile(r"(?=.*[LR])(?=.*[AP])(?=.*[SI])[LRAPSI]{3}")

_Number = TypeVar("_Number", bound=np.generic)


def is_orientation(letters: str) -> bool:
    """Whether these are nibabel's letters of an orientation, each saying what an axis runs towards, as in ``RAS``."""
    return _LETTERS.fullmatch(letters) is not None


@dataclass(frozen=True, slots=True)
class Turn:
    """A way there and back.

    Attributes:
        before: the image's own geometry.
        after: the geometry that the model sees.
        there: nibabel's orientation transform, (3, 2), from one to the other; ``None`` leaves everything as it is.
        back: the inverse.
    """

    before: Geometry
    after: Geometry
    there: npt.NDArray[np.float64] | None = None
    back: npt.NDArray[np.float64] | None = None

    def turn(self, array: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
        """An image (C, Z, Y, X) as the model sees it, contiguous."""
        return _applied(array, self.there)

    def turn_back(self, answer: LabelMap) -> LabelMap:
        """The answer on the image's own grid."""
        if self.back is None:
            return replace(answer, geometry=self.before)
        labels: Any = _applied(answer.array[None], self.back)[0]
        probabilities: Any = answer.probabilities
        if probabilities is not None:
            probabilities = _applied(probabilities, self.back)
        return replace(answer, array=labels, geometry=self.before, probabilities=probabilities)


def turn_towards(geometry: Geometry, target: str | None, *, as_itk: bool = False) -> Turn:
    """How an image comes into an orientation.

    A 2-D image has no orientation in the patient and is left as it is.

    Args:
        geometry: the image's.
        target: three letters, see :func:`is_orientation`; ``None`` changes nothing.
        as_itk: name the image's own orientation as ITK's ``DICOMOrient`` does, which may differ from nibabel's for
            axes that are far from every axis of the patient.
    """
    if target is None or geometry.ndim == 2:
        return Turn(geometry, geometry)
    affine = RAS_TO_LPS @ geometry.affine
    own = _itk_orientation(geometry) if as_itk else None
    start = io_orientation(affine) if own is None else axcodes2ornt(own)
    end = axcodes2ornt(target)
    there, back = ornt_transform(start, end), ornt_transform(end, start)
    if np.array_equal(there, [[0, 1], [1, 1], [2, 1]]):
        return Turn(geometry, geometry)
    turned = RAS_TO_LPS @ affine @ inv_ornt_aff(there, geometry.shape[::-1])
    source = np.argsort(there[:, 0])  # the image's axis (x, y, z) that each of the new axes was
    x, y, z = (int(axis) for axis in source)
    shape, nnunet, spacing = geometry.shape[::-1], geometry.spacing_zyx[::-1], geometry.spacing
    after = Geometry(
        shape=(shape[z], shape[y], shape[x]),
        spacing_zyx=(nnunet[z], nnunet[y], nnunet[x]),
        spacing=(spacing[x], spacing[y], spacing[z]),
        origin=(float(turned[0, 3]), float(turned[1, 3]), float(turned[2, 3])),
        direction=turned[:3, :3] / [spacing[x], spacing[y], spacing[z]],
        ndim=3,
        assumed=geometry.assumed,
        placed=geometry.placed,
    )
    return Turn(geometry, after, there, back)


def _itk_orientation(geometry: Geometry) -> str | None:
    letters: str = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(geometry.direction.ravel().tolist())
    return letters if is_orientation(letters) else None


def _applied(array: npt.NDArray[_Number], transform: npt.NDArray[np.float64] | None) -> npt.NDArray[_Number]:
    """Axes (Z, Y, X) swapped and reversed; nibabel counts them x, y, z."""
    if transform is None:
        return array
    turned: npt.NDArray[_Number] = np.ascontiguousarray(apply_orientation(array.T, transform).T)
    return turned
