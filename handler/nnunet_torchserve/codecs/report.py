"""A segmentation as numbers: how large each structure is and where it lies in the patient, as JSON.

Why: whoever wants a volume, or the place to look at, should need neither an imaging library nor a guess about which
axis is which. Everything in mm is in the patient's coordinates, so the report needs no image beside it.

cc3d counts the voxels and finds boxes and centroids in voxels, in one pass without a copy. SimpleITK's
``LabelShapeStatisticsImageFilter`` is quicker on a smooth label map, but it keeps every run of equal voxels, which is
gigabytes for a noisy one, and its volume is wrong for axes that are not at right angles. What is left to us is the
box along the patient's axes of an oblique image: it needs the structure's hull, which neither library gives.

No state, no threads of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt

from ..painting import Painting
from ..provenance import Provenance
from ..volume import Geometry, LabelArray

CONVENTIONS = (
    "Coordinates in mm are the patient's, LPS: x grows to the left, y to the back, z to the head. "
    "Voxels are counted from 0; x is the axis that runs fastest in memory, then y, then z. "
    "The centre of a voxel lies at origin + direction @ (spacing * voxel). "
    "bounding_box_voxels has the first and the last voxel along each axis, both inclusive. "
    "bounding_box_mm is the smallest box along the patient's axes that holds the structure's whole voxels, "
    "not only their centres. "
    "centroid_mm is the mean of the centres of the structure's voxels; it may lie outside the structure."
)
"""Stands in every report."""

_MM_DECIMALS = 9
"""A thousandth of the smallest voxel that a header may declare."""

_SIGNIFICANT_DIGITS = 12
"""Of volumes and areas, which span too many orders of magnitude for decimals."""

_TILE_VOXELS = 2**17
"""Voxels looked at in one go when the hull is searched: it bounds the memory, and larger is not quicker."""

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


def encode_report(
    labels: LabelArray, geometry: Geometry, painting: Painting, provenance: Provenance | None = None
) -> bytes:
    """What is in a segmentation, how large, and where.

    The document has ``coordinates`` ("LPS mm"), ``conventions`` (the rules below in words), ``dimensions`` (2 or 3),
    ``spacing_assumed`` (true for a picture whose size nobody gave: then mm are pixels),
    ``shape``, ``spacing`` and ``origin`` (x, y, z), ``direction`` (row by row; column k is the unit vector of voxel
    axis k), ``voxel_volume_ml``, ``remarks`` (sentences on what the label map does not say; empty for most models),
    ``provenance`` (see :mod:`..provenance`; null if it is not known),
    and ``structures``, a list in the order given. Each has ``name``, ``labels``,
    ``voxels``, ``volume_ml``, ``bounding_box_voxels`` and ``bounding_box_mm`` (``[[x0, x1], [y0, y1], [z0, z1]]``)
    and ``centroid_mm`` (x, y, z). The boxes and the centroid of a structure without voxels are null. Of a structure
    that cannot be told from others everything but its name is null: that is not 0.

    - Coordinates in mm are the patient's: LPS, as in ITK and DICOM. Voxels are counted from 0, x is the fastest axis,
      and a voxel's centre lies at ``origin + direction @ (spacing * voxel)``.
    - ``bounding_box_voxels``: the first and the last voxel, both inclusive.
    - ``bounding_box_mm``: the smallest box along the patient's axes that holds the *whole voxels* of the structure;
      exact for oblique images too, where it may be far smaller than the box around ``bounding_box_voxels``.
    - Volume: voxels x ``|det(direction x spacing)|`` / 1000, right for axes that are not at right angles.
    - A 2-D image has no volume: ``pixel_area_mm2`` and ``area_mm2`` stand instead. What follows the voxels' axes
      (``shape``, ``spacing``, the columns of ``direction``, ``bounding_box_voxels``) then has two entries. What lies
      in the patient (``origin``, ``bounding_box_mm``, ``centroid_mm``) keeps three: a slice may be oblique.
    - The geometry's numbers are written in full, other mm with nine decimals, volumes and areas with twelve digits.

    Args:
        labels: (Z, Y, X), uint8 or uint16. Not copied; the working memory is some MiB.
        geometry: the label map's.
        painting: of each structure the label values that make it up: one, or those of a region, whose union it is.
            Values may be in several structures, and need not occur. ``None`` if the structure cannot be measured.
        provenance: where the labels come from.

    Returns:
        ASCII JSON.
    """
    ndim, structures = geometry.ndim, painting.structures
    edges = _edges(geometry)
    wanted = {value for members in structures.values() for value in members or ()}
    found = {each.value: each for each in _measure(labels, wanted, edges)}
    flat = ndim == 2
    voxel_size = float(np.linalg.norm(np.cross(edges[:, 0], edges[:, 1])) if flat else abs(np.linalg.det(edges)))
    of_voxel, of_structure, unit = ("voxel_volume_ml", "volume_ml", 1e-3)
    if flat:
        of_voxel, of_structure, unit = ("pixel_area_mm2", "area_mm2", 1.0)

    def entry(name: str, members: tuple[int, ...] | None) -> dict[str, Any]:
        if members is None:
            return {"name": name, "labels": None, "voxels": None, of_structure: None, **_NOWHERE}
        parts = [found[value] for value in sorted(set(members)) if value in found]
        voxels = sum(part.voxels for part in parts)
        return {
            "name": name,
            "labels": list(members),
            "voxels": voxels,
            of_structure: _significant(voxels * voxel_size * unit),
            **(_place(parts, edges, geometry) if parts else _NOWHERE),
        }

    document = {
        "coordinates": "LPS mm",
        "conventions": CONVENTIONS,
        "dimensions": ndim,
        "spacing_assumed": geometry.assumed,
        "shape": list(geometry.shape[::-1][:ndim]),
        "spacing": list(geometry.spacing[:ndim]),
        "origin": list(geometry.origin),
        "direction": geometry.direction[:, :ndim].tolist(),
        of_voxel: _significant(voxel_size * unit),
        "remarks": list(painting.remarks),
        "provenance": provenance and provenance.as_json(),
        "structures": [entry(name, members) for name, members in structures.items()],
    }
    return json.dumps(document, indent=2, allow_nan=False).encode("ascii")


@dataclass(frozen=True, slots=True)
class _Measured:
    """Where the voxels of one label value are; x, y, z everywhere.

    Attributes:
        value: the label.
        voxels: how many.
        mean: of their indices.
        first, last: of their indices, both inclusive.
        lowest, highest: of their centres along each patient axis, in mm from the centre of voxel (0, 0, 0).
    """

    value: int
    voxels: int
    mean: _Floats
    first: _Integers
    last: _Integers
    lowest: _Floats
    highest: _Floats


_NOWHERE = {"bounding_box_voxels": None, "bounding_box_mm": None, "centroid_mm": None}


def _place(parts: Sequence[_Measured], edges: _Floats, geometry: Geometry) -> dict[str, Any]:
    """The boxes and the centroid of the union of disjoint ``parts``."""
    first = np.min([part.first for part in parts], axis=0)
    last = np.max([part.last for part in parts], axis=0)
    half_voxel = np.abs(edges).sum(axis=1) / 2
    low = np.min([part.lowest for part in parts], axis=0) - half_voxel
    high = np.max([part.highest for part in parts], axis=0) + half_voxel
    mean = np.average([part.mean for part in parts], axis=0, weights=[part.voxels for part in parts])
    return {
        "bounding_box_voxels": np.stack([first, last], axis=1)[: geometry.ndim].tolist(),
        "bounding_box_mm": _mm(np.stack([low, high], axis=1) + np.reshape(geometry.origin, (3, 1))),
        "centroid_mm": _mm(edges @ mean + geometry.origin),
    }


def _edges(geometry: Geometry) -> _Floats:
    """Column k: the edge of a voxel along voxel axis k, in LPS mm; a pixel has no thickness."""
    edges = geometry.direction * geometry.spacing
    edges[:, geometry.ndim :] = 0
    return edges


def _measure(labels: LabelArray, wanted: set[int], edges: _Floats) -> list[_Measured]:
    """The values of ``wanted`` that occur."""
    values, numbered = np.arange(np.iinfo(labels.dtype).max + 1), labels
    if labels.size < values.size:  # cc3d refuses a label that is no smaller than the number of voxels
        values, numbers = np.unique(labels, return_inverse=True)
        numbered = numbers.reshape(labels.shape).astype(np.uint16)
    statistics = cc3d.statistics(numbered, no_slice_conversion=True)
    measured = []
    for value, voxels, mean_zyx, box in zip(
        values, statistics["voxel_counts"], statistics["centroids"], statistics["bounding_boxes"], strict=False
    ):
        if voxels == 0 or value not in wanted:
            continue
        first, last = box.astype(np.int64).reshape(3, 2)[::-1].T
        lowest, highest = _reach_of_label(labels, int(value), first, last, edges)
        measured.append(_Measured(int(value), int(voxels), mean_zyx[::-1], first, last, lowest, highest))
    return measured


def _reach_of_label(
    labels: LabelArray, value: int, first: _Integers, last: _Integers, edges: _Floats
) -> tuple[_Floats, _Floats]:
    """How far the centres of a label's voxels reach along each patient axis, in mm from voxel (0, 0, 0).

    Along a row of voxels only the first and the last can be outermost. Tiles of rows whose corners lie within what
    was already found are skipped, so a label that fills its box costs little.

    Args:
        labels: (Z, Y, X).
        value: occurs in ``labels``.
        first: of its box in voxels, x, y, z.
        last: inclusive.
        edges: column k is a voxel's edge along axis k.
    """
    box_low, box_high = _reach_of_box(first, last, edges)
    if np.count_nonzero(edges, axis=1).max() <= 1:  # not oblique: each side of the box is reached by some voxel
        return box_low, box_high
    width, height, depth = (int(n) for n in last - first + 1)
    rows = min(max(_TILE_VOXELS // width, 1), height)
    slices = min(max(_TILE_VOXELS // (width * rows), 1), depth)
    corner_y, corner_z = (
        axis.ravel() for axis in np.meshgrid(np.arange(0, height, rows), np.arange(0, depth, slices), indexing="ij")
    )
    starts = first + np.stack([np.zeros_like(corner_y), corner_y, corner_z], axis=1)
    ends = np.minimum(starts + np.array([width, rows, slices]) - 1, last)
    lows, highs = _reach_of_box(starts, ends, edges)
    outermost_first = np.argsort(np.minimum(lows - box_low, box_high - highs).min(axis=1))
    lowest, highest = np.full(3, np.inf), np.full(3, -np.inf)
    for tile in outermost_first:
        if (lows[tile] >= lowest).all() and (highs[tile] <= highest).all():
            continue
        (x0, y0, z0), (x1, y1, z1) = starts[tile], ends[tile] + 1
        mask = labels[z0:z1, y0:y1, x0:x1] == value
        z, y = np.nonzero(mask.any(axis=2))
        if not z.size:
            continue
        left, right = mask.argmax(axis=2)[z, y], width - 1 - mask[:, :, ::-1].argmax(axis=2)[z, y]
        ends_of_rows = np.stack([np.concatenate([left, right]), np.tile(y, 2), np.tile(z, 2)], axis=1)
        centres = (ends_of_rows + starts[tile]) @ edges.T
        lowest, highest = np.minimum(lowest, centres.min(axis=0)), np.maximum(highest, centres.max(axis=0))
    return lowest, highest


def _reach_of_box(first: _Integers, last: _Integers, edges: _Floats) -> tuple[_Floats, _Floats]:
    """How far the voxels (..., 3) at the corners of boxes reach along the patient's axes: two of (..., 3), in mm."""
    one, other = edges * first[..., None, :], edges * last[..., None, :]
    return np.minimum(one, other).sum(axis=-1), np.maximum(one, other).sum(axis=-1)


def _mm(numbers: _Floats) -> list[Any]:
    rounded: list[Any] = (np.round(numbers, _MM_DECIMALS) + 0.0).tolist()  # + 0.0: no "-0.0"
    return rounded


def _significant(number: float) -> float:
    return float(f"{number:.{_SIGNIFICANT_DIGITS}g}")
