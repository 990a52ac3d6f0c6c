"""Where the images of a series lie, and whether together they are a volume (PS3.3, C.7.6.2).

Everything is checked in mm in the patient, not by angles or by numbers of images: a tolerance of 2 degrees is nothing
for a slice and 10 mm at the end of a stack. ``SliceThickness``, ``SpacingBetweenSlices`` and ``InstanceNumber`` are
not looked at: scanners fill them with what they like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import DicomReason, DicomRefused
from ...volume import Geometry
from ..geometry import make_geometry

Vector = npt.NDArray[np.float64]

TOLERANCE_MM = 0.05
"""How far from its place in a regular grid any pixel may lie: less than scanners round, and than anybody sees."""

_SAME_PLACE_MM = 0.01
_FINEST_MM = 0.01
_SHARE_OF_A_STEP = 0.05
"""Of the distance of two slices: the tolerance of thin ones, down to :data:`_FINEST_MM`."""

_UNIT = 1e-4
"""How far from 1 the length of a direction may be, and from 0 the cosine of two: what six decimals leave."""

_LARGEST_MM = 1e6
_MOST_NAMED = 8
_NORMAL = "along the slices' normal"


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """One image or frame in the patient.

    Attributes:
        rows, columns: pixels.
        position: LPS mm of the centre of the first pixel (``ImagePositionPatient``).
        along_row, along_column: directions in which the column and the row number grow (``ImageOrientationPatient``).
        spacing: mm from column to column and from row to row (``PixelSpacing`` the other way round).
    """

    rows: int
    columns: int
    position: Vector
    along_row: Vector
    along_column: Vector
    spacing: tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Images that are a volume.

    Attributes:
        order: of the planes, from the first slice to the last: along the cross product of rows and columns, so that
            the axes are right-handed, and as SimpleITK and ITK sort them.
        geometry: the grid: x along a row, y along a column, as the pixels are stored.
    """

    order: Sequence[int]
    geometry: Geometry


def stacked(planes: Sequence[Plane]) -> Stack:
    """Put images in their order.

    Raises:
        DicomRefused: they are no volume; with what is wrong, where, and what would be right.
        BadSpacing, Malformed: sizes or places that no scanner has.
    """
    if len(planes) == 1:
        msg = "the series is a single image; a volume of at least two slices was expected"
        raise DicomRefused(DicomReason.SINGLE_IMAGE, msg)
    numbers = np.array([[*each.position, *each.along_row, *each.along_column, *each.spacing] for each in planes])
    if not (np.abs(numbers) <= _LARGEST_MM).all():
        msg = f"an image's position, orientation or pixel spacing is no number up to {_LARGEST_MM:g}"
        raise DicomRefused(DicomReason.NO_POSITION, msg)
    row, column = _directions(planes)
    normal = np.cross(row, column)
    positions = numbers[:, :3]
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    positions, along = positions[order], along[order]
    _check_places(along)
    tolerance = _tolerance(along)
    _check_line(positions, along, normal, tolerance)
    _check_steps(along, tolerance)
    step = float(along[-1] - along[0]) / (len(planes) - 1)
    lowest = planes[order[0]]  # whatever came first: a grid does not depend on the order of files
    geometry = make_geometry(
        (len(planes), lowest.rows, lowest.columns),
        (*lowest.spacing, step),
        positions[0].tolist(),
        np.stack([row, column, normal], axis=1).ravel().tolist(),
    )
    return Stack(order.tolist(), geometry)


def _directions(planes: Sequence[Plane]) -> tuple[Vector, Vector]:
    """The directions of rows and columns that all images share, at right angles; writers round each image's."""
    first = planes[0]
    if any((each.rows, each.columns) != (first.rows, first.columns) for each in planes):
        sizes = sorted({(each.rows, each.columns) for each in planes})[:_MOST_NAMED]
        msg = f"the images have several sizes, {sizes} (rows, columns); send those of one size"
        raise DicomRefused(DicomReason.UNEQUAL_IMAGES, msg)
    extent = np.array([first.columns, first.rows])
    spacings = np.array([each.spacing for each in planes])
    if (np.ptp(spacings, axis=0) * extent > TOLERANCE_MM).any():
        low, high = (tuple(round(float(mm), 4) for mm in edge) for edge in (spacings.min(0), spacings.max(0)))
        msg = f"the images' pixels have several sizes, from {low} to {high} mm (x, y); send those of one size"
        raise DicomRefused(DicomReason.UNEQUAL_IMAGES, msg)
    rows, columns = (np.array([getattr(each, name) for each in planes]) for name in ("along_row", "along_column"))
    lengths = np.linalg.norm([rows, columns], axis=2)
    if (np.abs(lengths - 1) > _UNIT).any() or (np.abs((rows * columns).sum(1)) > _UNIT).any():
        msg = "an image's orientation is no pair of unit vectors at right angles, so nobody knows how it lies"
        raise DicomRefused(DicomReason.NO_POSITION, msg)
    row, column = np.median(rows, axis=0), np.median(columns, axis=0)
    far = np.linalg.norm(rows - row, axis=1) * extent[0] * first.spacing[0]
    far += np.linalg.norm(columns - column, axis=1) * extent[1] * first.spacing[1]
    if (far > TOLERANCE_MM).any():
        off = int((far > TOLERANCE_MM).sum())
        msg = f"{off} of {len(planes)} images lie in another orientation, up to {far.max():.2f} mm off at their edges; "
        raise DicomRefused(DicomReason.UNEQUAL_IMAGES, f"{msg}send those of one orientation")
    row /= np.linalg.norm(row)
    column = column - (column @ row) * row
    return row, column / np.linalg.norm(column)


def _check_places(along: Vector) -> None:
    """Refuse two images in one place: a slice that came twice, or volumes that follow each other in time."""
    starts = np.flatnonzero(np.diff(along, prepend=-np.inf) > _SAME_PLACE_MM)
    counts = np.diff(np.append(starts, len(along)))
    if (counts == 1).all():
        return
    if len(set(counts.tolist())) == 1 and len(counts) > 1:
        msg = f"every slice is there {counts[0]} times: points in time, echoes, phases or b values. Send one volume"
        raise DicomRefused(DicomReason.TIME_SERIES, msg)
    places = _listed([float(along[start]) for start, count in zip(starts, counts, strict=True) if count > 1])
    msg = f"several images lie in one place, at {places} mm {_NORMAL}; send each slice once"
    raise DicomRefused(DicomReason.DOUBLED_SLICES, msg)


def _tolerance(along: Vector) -> float:
    """In mm: :data:`TOLERANCE_MM`, less for thin slices."""
    share = _SHARE_OF_A_STEP * float(np.median(np.diff(along)))
    return min(TOLERANCE_MM, max(_FINEST_MM, share))


def _check_line(positions: Vector, along: Vector, normal: Vector, tolerance: float) -> None:
    """Refuse slices whose first pixels do not lie on one line along the normal."""
    aside = positions - positions[0] - np.outer(along - along[0], normal)
    if np.linalg.norm(aside, axis=1).max() <= tolerance:
        return
    lean = aside[-1] / (along[-1] - along[0])
    rest = np.linalg.norm(aside - np.outer(along - along[0], lean), axis=1).max()
    if rest <= tolerance:
        degrees = np.degrees(np.arctan(np.linalg.norm(lean)))
        msg = f"the slices are tilted by {degrees:.2f} degrees against the direction in which they are stacked (gantry "
        msg += "tilt): no grid with right angles holds them. Resample the series, or send one without tilt"
        raise DicomRefused(DicomReason.GANTRY_TILT, msg)
    worst = int(np.linalg.norm(aside, axis=1).argmax())
    msg = f"slices are shifted sideways against each other, the one at {along[worst]:.2f} mm {_NORMAL} by "
    msg += f"{np.linalg.norm(aside[worst]):.2f} mm; send slices that were made in one go"
    raise DicomRefused(DicomReason.UNEVEN_SLICES, msg)


def _check_steps(along: Vector, tolerance: float) -> None:
    """Refuse slices that are not all as far from each other."""
    if np.abs(along - np.linspace(along[0], along[-1], len(along))).max() <= tolerance:
        return
    steps = np.diff(along)
    smallest = float(np.median(steps[steps < 1.5 * steps.min()]))
    times = np.maximum(np.rint(steps / smallest), 1)
    if np.abs(steps - times * smallest).max() <= 2 * tolerance and (times > 1).any():
        gaps = [f"{along[i]:.2f} and {along[i + 1]:.2f}" for i in np.flatnonzero(times > 1)]
        named = ", ".join(gaps[:_MOST_NAMED]) + (", …" if len(gaps) > _MOST_NAMED else "")
        msg = f"{int((times - 1).sum())} slices are missing between {named} mm {_NORMAL}, where the others are "
        raise DicomRefused(DicomReason.MISSING_SLICES, f"{msg}{smallest:.3f} mm apart; send the whole series")
    narrow, wide = int(steps.argmin()), int(steps.argmax())
    msg = f"the slices are not evenly spaced: {steps[narrow]:.3f} mm at {along[narrow]:.2f} mm {_NORMAL}, "
    msg += f"{steps[wide]:.3f} mm at {along[wide]:.2f} mm; send one volume with even steps"
    raise DicomRefused(DicomReason.UNEVEN_SLICES, msg)


def _listed(places: Sequence[float]) -> str:
    return ", ".join(f"{mm:.2f}" for mm in places[:_MOST_NAMED]) + (", …" if len(places) > _MOST_NAMED else "")
