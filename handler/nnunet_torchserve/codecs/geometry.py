"""From the numbers of a header, or of a request's options, to a :class:`Geometry`: the one place that checks them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import BadSpacing, Malformed, TooLarge
from ..limits import Limits
from ..volume import Geometry, Placement

SMALLEST_MM, LARGEST_MM = 1e-6, 1e6
_LARGEST_OFFSET_MM = 1e6
_SMALLEST_DETERMINANT = 1e-6

_LARGEST_LEAN = 1e-6
"""Of an axis, relative to its length: what rounding leaves of a 0, and no acquisition means."""

_PLANE = 2
"""Numbers of a spacing in the plane."""

_MOST_COLOURS = 4
"""The last axis of an array that is no longer may be colours."""

_2D_SPACING_FACTOR = 999
"""SimpleITKIO's spacing between the slices of a 2-D image, in multiples of the in-plane spacing."""


def make_geometry(
    shape: Sequence[int],
    spacing: Sequence[float],
    origin: Sequence[float],
    direction: Sequence[float],
    nnunet_spacing: Sequence[float] | None = None,
) -> Geometry:
    """A checked geometry from ITK's numbers, for an image of two or three dimensions.

    Args:
        shape: voxels along z, y, x, or y, x.
        spacing: mm along x, y(, z).
        origin: LPS mm of the first voxel, x, y(, z).
        direction: as ``SimpleITK.Image.GetDirection()`` gives it, row by row, 4 or 9 numbers.
        nnunet_spacing: mm along x, y(, z) for the preprocessing, where the plan's reader takes others.

    Raises:
        BadSpacing: a spacing that no scanner has.
        Malformed: an origin or a direction that is no place in space.
    """
    ndim = len(shape)
    check_spacing(spacing, ndim)
    check_spacing(nnunet_spacing or spacing, ndim)
    for name, numbers, count in (("origin", origin, ndim), ("direction", direction, ndim * ndim)):
        if len(numbers) != count or not all(abs(number) <= _LARGEST_OFFSET_MM for number in numbers):
            msg = f"the image's {name} is not {count} numbers of at most {_LARGEST_OFFSET_MM:g}"
            raise Malformed(msg)
    axes = np.eye(3)
    axes[:ndim, :ndim] = np.reshape(direction, (ndim, ndim))
    with np.errstate(all="ignore"):
        lengths, determinant = np.linalg.norm(axes, axis=0), abs(np.linalg.det(axes))
    if not np.allclose(lengths, 1, atol=1e-3) or not determinant >= _SMALLEST_DETERMINANT:
        msg = "the image's direction has no three independent columns of length 1"
        raise Malformed(msg)
    for_nnunet = [float(size) for size in (nnunet_spacing or spacing)]
    between = for_nnunet[2] if ndim == 3 else max(for_nnunet) * _2D_SPACING_FACTOR
    depth, height, width = (1, *shape) if ndim == 2 else shape
    x, y, z = (*(float(v) for v in origin), 0.0)[:3]
    return Geometry(
        shape=(int(depth), int(height), int(width)),
        spacing_zyx=(between, for_nnunet[1], for_nnunet[0]),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2]) if ndim == 3 else 1.0),
        origin=(x, y, z),
        direction=axes,
        ndim=ndim,
    )


def place(shape: tuple[int, int, int], placement: Placement) -> Geometry:
    """The geometry of voxels that have no header of their own.

    Args:
        shape: voxels along z, y, x.
        placement: with 2 numbers for the spacing it is a 2-D image, which has one slice; with 3 a volume.

    Raises:
        BadSpacing: not as many numbers as the image has dimensions, or none that a scanner has.
        Malformed: an origin or a direction that is no place in space.
    """
    given = len(placement.spacing)
    ndim = given if given == _PLANE and shape[0] == 1 else 3
    if given != ndim:
        msg = f"spacing has {given} numbers, and an image of {shape} voxels (z, y, x) needs 3, or 2 if it is one slice"
        if shape[2] <= _MOST_COLOURS < shape[0]:
            msg += "; if its last axis holds channels, send (channel, 1, y, x): numpy.moveaxis(array, -1, 0)[:, None]"
        raise BadSpacing(msg)
    origin = (0.0,) * ndim if placement.origin is None else placement.origin
    direction = np.eye(ndim).ravel().tolist() if placement.direction is None else placement.direction
    geometry = make_geometry(shape[-ndim:], placement.spacing, origin, direction)
    return replace(geometry, assumed=placement.assumed, placed=True)


def check_spacing(spacing: Sequence[float], ndim: int) -> None:
    """Raise :class:`BadSpacing` unless there is one positive, finite number of mm for each axis."""
    if len(spacing) != ndim or not all(SMALLEST_MM <= size <= LARGEST_MM for size in spacing):
        msg = f"voxel spacing {list(spacing)} mm; {ndim} positive numbers of at most {LARGEST_MM:g} were expected"
        raise BadSpacing(msg)


def mixes_channels(axes: npt.ArrayLike) -> bool:
    """Whether the fourth axis of a grid, that of the channels, leans into space or another one leans towards it.

    Args:
        axes: 4 × 4, the direction of each axis as a row; in mm or of length 1, as readers of all formats scale them.
    """
    rows = np.asarray(axes, np.float64)
    with np.errstate(over="ignore"):
        lean = _LARGEST_LEAN * np.linalg.norm(rows, axis=1)
    return bool((abs(rows[:3, 3]) > lean[:3]).any() or (abs(rows[3, :3]) > lean[3]).any())


def check_size(shape: Sequence[int], channels: int, voxel_bytes: int, limits: Limits, advice: str = "") -> int:
    """The bytes that an image's voxels take once they are unpacked.

    Args:
        shape: voxels along each axis in space.
        channels: images in the file.
        voxel_bytes: of one voxel of one channel.
        limits: what is allowed.
        advice: where the channels were found, for whoever did not know that he sent so many.

    Raises:
        Malformed: an axis without voxels.
        TooLarge: above a limit.
    """
    voxels = math.prod(shape)
    if min(shape) < 1 or channels < 1:
        msg = f"the header declares {tuple(shape)} voxels; every axis must have at least 1"
        raise Malformed(msg)
    if voxels > limits.voxels:
        msg = f"the header declares {voxels} voxels, this server takes at most {limits.voxels}"
        raise TooLarge(msg)
    if channels > limits.channels:
        msg = f"the header declares {channels} channels, this server takes at most {limits.channels}"
        msg += f"; {advice}" if advice else ""
        raise TooLarge(msg)
    size = voxels * channels * voxel_bytes
    if size > limits.expanded_bytes:
        msg = f"the image would expand to {size} bytes; the limit is {limits.expanded_bytes}"
        raise TooLarge(msg)
    return size
