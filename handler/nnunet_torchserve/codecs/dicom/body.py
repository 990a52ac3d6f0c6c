"""Whether the channels of a case show one body: the same patient, in one frame of reference, voxel upon voxel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ChannelsDisagree, DicomReason, DicomRefused, WrongChannels
from ...volume import Geometry
from .image_classes import Modality
from .planes import TOLERANCE_MM
from .volume import DicomSource

_MODALITIES = {"ct": Modality.CT, "mr": Modality.MR, "pt": Modality.PET, "pet": Modality.PET}
"""Names of channels that are a modality's; of any other name nobody knows. nnU-Net reads them without case too."""


def check_one_body(series: Sequence[DicomSource], names: Sequence[str], grids: Sequence[Geometry]) -> None:
    """Refuse a case whose channels do not belong together.

    Args:
        series: those of its channels that are DICOM.
        names: of the model's channels for which they came.
        grids: where each channel lies, DICOM or not, as the model sees it; of one shape.

    Raises:
        DicomRefused: several patients, or positions that have nothing to do with each other.
        ChannelsDisagree: the voxels of two channels lie in different places, or one series came twice.
        WrongChannels: a series of another modality than its channel is named after.
    """
    for each, name in zip(series, names, strict=True):
        modality, wanted = each.series.images[0].modality, _MODALITIES.get(name.casefold())
        if wanted is not None and wanted is not modality:
            msg = f"a channel of the model is {wanted}, and the series that came for it is {modality}; "
            msg += "send the channels in the model's order"
            raise WrongChannels(msg)
    if len({each.series.uid for each in series}) < len(series):
        msg = "one series came for two channels; send a series for each, in the model's order"
        raise ChannelsDisagree(msg)
    if len({each.series.patient for each in series}) > 1:
        msg = "the channels are series of different patients; send those of one"
        raise DicomRefused(DicomReason.SEVERAL_PATIENTS, msg)
    if len({each.series.frame_of_reference for each in series}) > 1:
        msg = "the channels are series in different frames of reference; register them, and send them as NIfTI"
        raise DicomRefused(DicomReason.SEVERAL_FRAMES_OF_REFERENCE, msg)
    if series[0].series.frame_of_reference is None and len({each.series.study for each in series}) > 1:
        msg = "the channels are series of several studies without a frame of reference, so nobody knows whether their "
        msg += "positions belong together; register them, and send them as NIfTI"
        raise DicomRefused(DicomReason.SEVERAL_FRAMES_OF_REFERENCE, msg)
    first = grids[0]
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in first.shape[::-1]], [1])).reshape(4, -1)
    for number, other in enumerate(grids[1:], start=1):
        apart = float(np.linalg.norm((other.affine - first.affine) @ corners, axis=0).max())
        if not apart <= TOLERANCE_MM:
            msg = f"channel {number} lies elsewhere than channel 0, by up to {apart:.2f} mm; resample them to one grid"
            raise ChannelsDisagree(msg)
