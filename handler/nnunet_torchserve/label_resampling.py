"""A label map onto the network's grid, as nnU-Net's default function does it, looking at boundaries only.

``resample_data_or_seg_to_shape(is_seg=True, order=1)`` interpolates the indicator of one label after the other over the
whole volume, and gives each voxel the label with the largest value: time for each label, memory for several float64
volumes. But where all corners of a voxel's cell have one label, that is the voxel's. Elsewhere only the corners' labels
have a value at all, and it is the sum of their weights: summed here in scipy's order, in float64, because ties are
decided by equality of such sums. Where labels are tied, it is the nearest voxel's label if it is one of them, else the
lowest.

Any other function or order is left to the plan's function as it is.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from batchgenerators.augmentations.utils import resize_segmentation
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

from .resampling import ResamplingFunction, SplineArguments, default_arguments
from .taps import linear_taps, nearest_inputs, nearest_slices

Labels = npt.NDArray[np.float32]

_TIEBREAK = inspect.signature(resize_segmentation).parameters.get("seg_tiebreak")
_IS_KNOWN = _TIEBREAK is not None and _TIEBREAK.default == "nearest"
"""Whether batchgenerators gives a voxel the label with the largest value; older versions had another rule."""


def resample_labels(
    labels: Labels,
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    function: ResamplingFunction,
) -> Labels:
    """What ``function`` gives for these arguments; it runs itself where it isn't stock's default for labels.

    Args:
        labels: float32 (1, z, y, x) of whole numbers, in the plan's axis order.
        new_shape: voxels (z, y, x).
        current_spacing: mm (z, y, x).
        new_spacing: mm (z, y, x).
        function: the plan's ``resampling_fn_seg``.

    Returns:
        float32 (1, *new_shape); ``labels`` itself if it has that shape.
    """
    arguments = _known_arguments(function)
    if arguments is None:
        resampled: Labels = function(labels, new_shape, current_spacing, new_spacing)
        return resampled
    shape = tuple(int(n) for n in new_shape)
    if labels.shape[1:] == shape:
        return labels
    separate, axis = determine_do_sep_z_and_axis(
        arguments.force_separate_z, current_spacing, new_spacing, arguments.separate_z_anisotropy_threshold
    )
    out = np.empty((1, *shape), np.float32)
    if separate:
        source, target = np.moveaxis(labels[0], axis, 0), np.moveaxis(out[0], axis, 0)
        nearest = nearest_slices(len(source), len(target)).tolist()
        planes = [[(number, 1.0)] for number in nearest]
    else:
        source, target = labels[0], out[0]
        across = linear_taps(len(source), len(target)).sides
        nearest = nearest_inputs(len(source), len(target)).tolist()
        planes = [[(int(end[k]), float(weight[k])) for end, weight in across] for k in range(len(target))]
    _, height, width = source.shape
    in_plane = _InPlane(height, width, *target.shape[1:])
    for plane, sides, closest in zip(target, planes, nearest, strict=True):
        plane[...] = in_plane.resample([(source[number], weight) for number, weight in sides], source[closest])
    return out


def resamples_boundaries(function: ResamplingFunction) -> bool:
    """Whether this module computes what a plan's ``resampling_fn_seg`` does."""
    return _known_arguments(function) is not None


def _known_arguments(function: ResamplingFunction) -> SplineArguments | None:
    """The arguments of nnU-Net's default function, where they are those that this module computes."""
    arguments = default_arguments(function)
    if not _IS_KNOWN or arguments is None:
        return None
    computed = replace(arguments, is_seg=True, order=1, order_z=0)
    return arguments if arguments == computed else None


class _InPlane:
    """Planes of one size, resampled to another."""

    def __init__(self, height: int, width: int, new_height: int, new_width: int) -> None:
        self._y, self._x = linear_taps(height, new_height), linear_taps(width, new_width)
        self._nearest = np.ix_(nearest_inputs(height, new_height), nearest_inputs(width, new_width))

    def resample(self, sides: Sequence[tuple[npt.NDArray[Any], float]], closest: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One plane.

        Args:
            sides: the planes (y, x) that it lies between, with their weights, the lower one first.
            closest: the nearest of them.
        """
        corners = [
            (np.take(np.take(plane, rows, axis=0), columns, axis=1), weight, row_weights, column_weights)
            for (plane, weight), (rows, row_weights), (columns, column_weights) in itertools.product(
                sides, self._y.sides, self._x.sides
            )
        ]
        first: npt.NDArray[Any] = corners[0][0]
        mixed = np.zeros(first.shape, bool)
        for corner, *_ in corners[1:]:
            mixed |= corner != first
        where = np.nonzero(mixed)
        if len(where[0]):
            rows, columns = where
            labels = np.stack([corner[where] for corner, *_ in corners])
            weights = [weight * down[rows] * along[columns] for _, weight, down, along in corners]
            first[where] = _winners(labels, weights, closest[self._nearest][where])
        return first


def _winners(
    labels: npt.NDArray[Any], weights: Sequence[npt.NDArray[np.float64]], nearest: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """The label with the largest weight; of tied ones the nearest voxel's, else the lowest.

    Args:
        labels: (corners, n).
        weights: of each corner (n), in scipy's order of summation.
        nearest: (n) labels of the nearest voxels.
    """
    scores = np.zeros(labels.shape)
    for number, label in enumerate(labels):
        for other, weight in zip(labels, weights, strict=True):
            scores[number] += np.where(other == label, weight, 0.0)
    np.minimum(scores, 1.0, out=scores)  # skimage clips what rounding adds
    leads = scores == scores.max(axis=0)
    lowest = np.where(leads, labels, np.inf).min(axis=0)
    return np.where((leads & (labels == nearest)).any(axis=0), nearest, lowest)
