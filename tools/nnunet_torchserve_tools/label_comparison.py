"""Two label maps of one image, compared structure by structure: voxels in common, and how far surfaces lie apart.

The 95 % surface distance is Huttenlocher's distance, made robust: of each voxel of one surface the distance to the
nearest voxel of the other, of these the 95th percentile, and of both directions the larger one, as MONAI's
``compute_hausdorff_distance(percentile=95)`` has it. A surface voxel is one with a neighbour (of 6; of 4 in a slice)
that is not of the structure, or none. Distances are along the voxel axes, which are taken to be at right angles.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from nnunet_torchserve.volume import LabelArray

Mask = npt.NDArray[np.bool_]

_PERCENT = 95
_VALUES = 2**16


def mask_of(labels: LabelArray, values: Collection[int]) -> Mask:
    """Where a label map has one of these values."""
    wanted = np.zeros(_VALUES, dtype=bool)
    wanted[list(values)] = True
    found: Mask = wanted[labels]
    return found


def counts(first: Mask, second: Mask) -> tuple[int, int, int]:
    """Voxels of each, and of both."""
    return int(first.sum()), int(second.sum()), int(np.count_nonzero(first & second))


def surface_distance_95(first: Mask, second: Mask, spacing: Sequence[float]) -> float | None:
    """The 95 % surface distance of two structures.

    Args:
        first: (Z, Y, X).
        second: of the same image.
        spacing: mm along z, y, x.

    Returns:
        mm; ``None`` if one of them is empty.
    """
    if not first.any() or not second.any():
        return None
    if np.array_equal(first, second):
        return 0.0
    axes = [axis for axis, size in enumerate(first.shape) if size > 1]
    [box] = ndimage.find_objects((first | second).astype(np.int8))
    inside, spacings = tuple(box[axis] for axis in axes), [float(spacing[axis]) for axis in axes]
    one, other = (_surface(mask.squeeze()[inside]) for mask in (first, second))
    return max(_directed(one, other, spacings), _directed(other, one, spacings))


def _surface(mask: Mask) -> Mask:
    found: Mask = mask & ~ndimage.binary_erosion(mask)
    return found


def _directed(start: Mask, end: Mask, spacing: Sequence[float]) -> float:
    distances: npt.NDArray[Any] = ndimage.distance_transform_edt(~end, sampling=spacing)[start]
    return float(np.percentile(distances, _PERCENT))
