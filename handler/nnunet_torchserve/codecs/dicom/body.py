"""Whether the channels of a case show one body: the same patient, in one frame of reference, voxel upon voxel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ChannelsDisagree, DicomReason, DicomRefused
from ...volume import Geometry
from .planes import TOLERANCE_MM
from .volume import DicomSource


def check_one_body(series: Sequence[DicomSource], grids: Sequence[Geometry]) -> None:
    """Refuse a case whose channels do not belong together.

    Args:
        series: those of its channels that are DICOM.
        grids: where each channel lies, DICOM or not, as the model sees it; of one shape.

    Raises:
        DicomRefused: several patients, or positions that have nothing to do with each other.
        ChannelsDisagree: the voxels of two channels lie in different places.
    """
    if len({each.series.patient for each in series}) > 1:
        msg = "the channels are series of different patients; send those of one"
        raise DicomRefused(DicomReason.SEVERAL_PATIENTS, msg)
    if len({each.series.frame_of_reference for each in series}) > 1:
        msg = "the channels are series in different frames of reference; register them, and send them as NIfTI"
        raise DicomRefused(DicomReason.SEVERAL_FRAMES_OF_REFERENCE, msg)
    first = grids[0]
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in first.shape[::-1]], [1])).reshape(4, -1)
    for number, other in enumerate(grids[1:], start=1):
        apart = float(np.linalg.norm((other.affine - first.affine) @ corners, axis=0).max())
        if not apart <= TOLERANCE_MM:
            msg = f"channel {number} lies elsewhere than channel 0, by up to {apart:.2f} mm; resample them to one grid"
            raise ChannelsDisagree(msg)
