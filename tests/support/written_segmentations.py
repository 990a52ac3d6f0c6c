"""DICOM segmentations of series, written by the server's own code, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs import DicomSource
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat, SegType
from nnunet_torchserve.painting import Painting, read_painting
from nnunet_torchserve.provenance import Provenance
from nnunet_torchserve.segments import Codes
from nnunet_torchserve.volume import LabelMap

PAINTING = read_painting({"background": 0, "liver": 1, "spleen": 2, "not there": 3}, None, has_regions=False)
PROVENANCE = Provenance("model", "1.0", "ab" * 32, ("cd" * 32,), None, {"folds": [0]})


def label_map(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Two structures with no symmetry, (z, y, x), one of them in a single slice; a third is not there."""
    labels = np.zeros(shape, np.uint8)
    labels[1:4, 2:4, 3:6] = 1
    labels[3, 1, 0:5] = 1
    labels[2, 0:2, 1:4] = 2
    return labels


def source_of(*bodies: bytes, **more: Any) -> DicomSource:
    """A series, as a request with these parts opens it; ``more`` are further arguments of ``open_image``."""
    source = codecs.open_image(bodies, Limits(), "SimpleITKIO", **more)
    assert isinstance(source, DicomSource)
    return source


def segmentation_of(
    source: DicomSource,
    labels: npt.NDArray[Any],
    kind: SegType = SegType.BINARY,
    *,
    painting: Painting = PAINTING,
    provenance: Provenance = PROVENANCE,
    codes: Codes | None = None,
    others: Sequence[DicomSource] = (),
    limit: int = 10**6,
) -> bytes:
    """The object that a label map (slice, row, column) of a series is written as."""
    options = Options(output_format=OutputFormat.DICOM_SEG, seg_type=kind)
    form = codecs.answer_form(options, source.native_format, source.geometry, 3, painting)
    about = codecs.About([source, *others], painting, codes or {}, provenance, limit)
    file = codecs.encode(LabelMap(labels, source.geometry), form, about)
    assert file.content_type == "application/dicom"
    return file.body
