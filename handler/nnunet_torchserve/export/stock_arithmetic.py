"""Resampled logits exactly as stock has them: float64, in scipy's order of operations, rounded once.

``scipy.ndimage.zoom`` gives a voxel the sum over the corners of its cell, the last axis fastest, of
``((value * weight_z) * weight_y) * weight_x``. Where a value lies between two of the dtype it is rounded to, which
symmetric grids bring about in every volume, the last bit of that sum decides; so it is repeated here to the letter.
An axis that is not interpolated has the weights 1 and 0, which change no bit, and is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..taps import Taps
from .grid import Array

_ELEMENTS = 2**20
"""Values computed at a time; 8 MiB in float64."""


def at_points(corners: Array, indices: npt.NDArray[np.integer], weights: Sequence[Sequence[Array]]) -> Array:
    """Logits of some voxels.

    Args:
        corners: (C, u) logits of the network's voxels around them.
        indices: (n, corners): column of ``corners`` for each corner of a voxel's cell, the last axis fastest.
        weights: for each interpolated axis, float64 (n) of its lower and its upper corner.

    Returns:
        (C, n) in the dtype of ``corners``.
    """
    classes, points = len(corners), len(indices)
    values = np.empty((classes, points), corners.dtype)
    step = max(1, _ELEMENTS // classes)
    for start in range(0, points, step):
        part = slice(start, start + step)
        total = np.zeros((classes, len(indices[part])))
        for corner, sides in enumerate(itertools.product((0, 1), repeat=len(weights))):
            term = corners[:, indices[part, corner]].astype(np.float64)
            for axis, side in enumerate(sides):
                term *= weights[axis][side][part]
            total += term
        values[:, part] = total
    return values


def rows(logits: torch.Tensor, taps: Sequence[Taps], first: int, last: int) -> Array:
    """Logits of whole rows of the image.

    Args:
        logits: (C, z, y, x) on the network's grid, on the CPU.
        taps: of each axis.
        first: row, counted through all planes: row ``k * Y + j`` is that of plane k and row j.
        last: row, not included.

    Returns:
        (C, last - first, X) in the dtype of ``logits``.
    """
    height, width = len(taps[1]), len(taps[2])
    values = np.empty((len(logits), last - first, width), logits.numpy().dtype)
    row = first
    while row < last:
        plane, start = divmod(row, height)
        end = min(height, start + last - row)
        part = values[:, row - first : row - first + end - start]
        height_used = int(taps[1].upper[start:end].max()) + 1 - int(taps[1].lower[start:end].min())
        widest = max(height_used, end - start) * max(logits.shape[3], width)
        step = max(1, _ELEMENTS // widest)
        for begin in range(0, len(logits), step):
            group = slice(begin, begin + step)
            part[group] = _plane(logits[group].numpy(), taps, plane, slice(start, end))
        row += end - start
    return values


def _plane(logits: Array, taps: Sequence[Taps], plane: int, rows: slice) -> Array:
    """Some rows of one plane, float64 (C, rows, X)."""
    in_plane = taps[1][rows]
    lowest = int(in_plane.lower.min())
    used = slice(lowest, int(in_plane.upper.max()) + 1)
    terms = 0
    total: Array = np.empty(0)
    across = taps[0][plane : plane + 1]
    for z_index, z_weight in across.sides:
        slab = logits[:, z_index[0], used].astype(np.float64)
        if across.interpolates:
            slab *= z_weight[0]
        for y_index, y_weight in in_plane.shifted(lowest).sides:
            lines = slab[:, y_index]
            if in_plane.interpolates:
                lines *= y_weight[:, None]
            for x_index, x_weight in taps[2].sides:
                term = np.take(lines, x_index, axis=2)
                if taps[2].interpolates:
                    term *= x_weight
                total = np.add(total, term, out=total) if terms else term
                terms += 1
        del slab
    return total
