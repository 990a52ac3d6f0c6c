"""The last look at an object before it is sent: does what was written lie where its source lies?

It goes by the bytes that were written and not by what they were made of, and compares places in mm in the patient.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import numpy as np

from ...volume import Geometry
from .frames import Frames
from .library import silenced
from .planes import TOLERANCE_MM

_POSITION = b"\x20\x00\x32\x00DS"
"""``ImagePositionPatient`` as :mod:`.frames` writes it."""


def check_places(head: bytes, frames: Frames, labels: Geometry, source: Geometry) -> None:
    """Raise unless each frame lies on its slice of the source, and the label map on the source's voxels.

    Args:
        head: the file up to its functional groups.
        frames: as they are written.
        labels: where the label map lies.
        source: where the images lie.

    Raises:
        RuntimeError: they do not.
    """
    if labels.shape != source.shape or not np.array_equal(labels.affine, source.affine):
        msg = "a segmentation lies on another grid than its source"
        raise RuntimeError(msg)
    said = _read(head)
    shared = said.SharedFunctionalGroupsSequence[0]
    row, column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    positions, slices = np.array(_positions(frames.groups)), np.array(frames.slices)
    _, rows, columns = source.shape
    if not len(positions) == len(slices) == int(said.NumberOfFrames) or (said.Rows, said.Columns) != (rows, columns):
        msg = f"a segmentation declares {said.NumberOfFrames} frames of {said.Rows} × {said.Columns}, and has others"
        raise RuntimeError(msg)
    for x, y in ((0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)):
        ours = positions + x * between_columns * row + y * between_rows * column
        theirs = np.stack([np.full(len(slices), x), np.full(len(slices), y), slices, np.ones(len(slices))])
        apart = np.linalg.norm(ours - (source.affine @ theirs)[:3].T, axis=1).max()
        if not apart <= 2 * TOLERANCE_MM:
            msg = f"a segmentation lies elsewhere than its source, by {apart:.3f} mm"
            raise RuntimeError(msg)


def _read(head: bytes) -> Any:
    from pydicom import dcmread

    with silenced():
        return dcmread(io.BytesIO(head))


def _positions(groups: bytes) -> list[list[float]]:
    """Of each frame, in their order."""
    starts = [0]
    while (found := groups.find(_POSITION, starts[-1])) >= 0:
        starts.append(found + len(_POSITION))
    known: dict[bytes, list[float]] = {}
    positions = []
    for _, start in pairwise(starts):
        length = int.from_bytes(groups[start : start + 2], "little")
        text = groups[start + 2 : start + 2 + length]
        if text not in known:
            known[text] = [float(number) for number in text.split(b"\\")]
        positions.append(known[text])
    return positions
