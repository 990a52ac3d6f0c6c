"""DICOM series in: a zip, a tar, or files of CT, MR or PET images become one volume, or are refused.

pydicom reads the elements; what makes a volume of images is checked here, because readers that do not check answer on
the wrong side of the body, or with a hole in it (docs/dicom.md has what is refused and why).

========================  ============================================================================================
``container``             files of a zip, a tar or fields, walked through from memory, bounded
``elements``              a file's elements, counted and bounded before pydicom sees any
``library``               pydicom, loaded late and kept quiet
``image_classes``         which objects are images, by their class
``header``                what an image's header says, as far as a volume depends on it
``element_values``        what single elements of a header say
``functional_groups``     of an object of many frames: which each frame has
``stored_pixels``         how the pixels are stored, as the header says
``value_transformation``  how stored numbers become values, as the header says
``problem``               why an object is of no use, until it is known whether that matters
``series``                which images belong together
``planes``                whether they are a volume, in mm, and the geometry of that volume
``pixels``                stored numbers
``fragments``             compressed frames in their pieces
``compressed``            compressed frames to stored numbers
``crew``                  threads that do that
``rescale``               stored numbers to values
``volume``                all of it, as an image source
``body``                  whether several series, the channels of a case, show one body
========================  ============================================================================================

DICOM out: a label map becomes a segmentation of the series that it was made from.

================  ==================================================================================================
``slices``        which object and frame each slice is of
``copied``        which elements of a series an answer repeats
``origin``        what an answer repeats of its series, and the series' digest
``segment``       which structures become segments
``segmentation``  the object, but for its frames
``frames``        their places, references and pixels
``written``       elements as bytes
``texts``         our own texts in a patient's character set
``uids``          UIDs and times that are the same for the same request
``places``        the last check: whether what was written lies where its source lies
================  ==================================================================================================
"""

from __future__ import annotations

from .body import check_one_body
from .container import TAR_HEAD_BYTES, is_tar
from .elements import HEAD_BYTES, is_dicom
from .segment import check_segments, segments_of
from .segmentation import SegmentationRequest, encode_segmentation, memory_bytes
from .volume import DicomSource, open_series

__all__ = [
    "HEAD_BYTES", "TAR_HEAD_BYTES", "DicomSource", "SegmentationRequest", "check_one_body", "check_segments",
    "encode_segmentation", "is_dicom", "is_tar", "memory_bytes", "open_series", "segments_of",
]  # fmt: skip
