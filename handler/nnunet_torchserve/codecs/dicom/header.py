"""What the header of one DICOM image says, as far as a volume depends on it.

Of the patient only a digest is kept, to tell one from another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DicomReason, DicomRefused, Malformed, TooLarge
from ...limits import Limits
from .copied import COPIED, LONGEST_BYTES
from .element_values import ELEMENTS, integer_of, text_of, uid_of, values_of
from .elements import Encoding, Selection, Walk
from .functional_groups import functional_groups, group_of
from .image_classes import IMAGE_CLASSES, Modality
from .library import data_set, quietly
from .planes import Plane
from .problem import Problem
from .rescale import Rescale, Table
from .stored_pixels import Pixels, read_pixels
from .value_transformation import read_rescale, read_table

_SEQUENCES = {0x00283000, 0x52009229, 0x52009230}
"""At the top: the Modality LUT, the functional groups that all frames share, those of each frame."""

_GROUPS = {0x00209113, 0x00209116, 0x00289110, 0x00289145}
"""Within those: plane position, plane orientation, pixel measures, pixel value transformation."""

_CHARACTER_SET = 0x00080005
_TAGS = {_CHARACTER_SET, 0x00080016} | {tag for tag, _ in ELEMENTS.values()} | _SEQUENCES

UID = re.compile(r"[0-9.]{1,64}")


SELECTION = Selection(
    frozenset(_TAGS), frozenset(_SEQUENCES | _GROUPS), frozenset(IMAGE_CLASSES), frozenset(COPIED), LONGEST_BYTES
)
"""What a header is read from."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One object of several into which the frames of one were split (a concatenation, PS3.3, C.7.6.16.2.2).

    Attributes:
        concatenation: UID that all pieces share; empty if it is not said.
        total: pieces; 0 if it is not said.
        offset: frames in the pieces before.
    """

    concatenation: str
    total: int
    offset: int


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """One object of a series.

    Attributes:
        file: its number in the container, from 0.
        sop_class, sop_instance, study, series: UIDs; empty where the file has none.
        frame_of_reference: UID; ``None`` if there is none.
        modality: by its class.
        patient: digest of name, number and birth date.
        localizer: it was made to plan others.
        lossy: its values are not quite those that were measured.
        has_long_texts: a text of those that an answer repeats is longer than such a text may be.
        pixels: how they are stored.
        planes: where each frame lies.
        rescales: of each frame.
        piece: which one it is, if the object is one of several pieces.
        slices: how many its volume has, if the object says it: those of PET must.
        problem: why the object is none that could be used. Whether that matters is not known yet.

    Of an object of a series that is not asked for, no more is known than whose it is.
    """

    file: int
    sop_class: str
    sop_instance: str
    study: str
    series: str
    frame_of_reference: str | None
    modality: Modality
    patient: str
    localizer: bool
    lossy: bool = False
    has_long_texts: bool = False
    pixels: Pixels | None = None
    planes: Sequence[Plane] = ()
    rescales: Sequence[Rescale] = ()
    piece: Piece | None = None
    slices: int = 0
    problem: Problem | None = None

    @property
    def table_bytes(self) -> int:
        """Of its Modality LUT."""
        first = self.rescales[0] if self.rescales else None
        return first.values.nbytes if isinstance(first, Table) else 0

    @property
    def has_uids(self) -> bool:
        """Whether every UID is there that tells objects and series apart."""
        return all(UID.fullmatch(uid) for uid in (self.sop_instance, self.study, self.series))


def read_header(
    file: int, size: int | None, walk: Walk, encoding: Encoding, limits: Limits, wanted: str | None = None
) -> ImageHeader:
    """The header of an object whose class is one of :data:`IMAGE_CLASSES`.

    Args:
        file: its number.
        size: bytes of its data set; ``None`` if they are deflated, so that nobody knows.
        walk: over its elements, to their end.
        encoding: how they are stored.
        limits: what is allowed.
        wanted: UID of the only series of which more is to be known than whose its objects are.

    Raises:
        Malformed: elements that cannot be read.
    """
    found = data_set(walk.wanted, encoding)
    with quietly():
        words = [text_of(found, name).strip("^ ") for name in ("PatientID", "PatientName", "PatientBirthDate")]
        image_type = values_of(found, "ImageType")
        header: dict[str, Any] = {
            "file": file,
            "sop_class": walk.sop_class or "",
            "sop_instance": uid_of(found, "SOPInstanceUID"),
            "study": uid_of(found, "StudyInstanceUID"),
            "series": uid_of(found, "SeriesInstanceUID"),
            "frame_of_reference": uid_of(found, "FrameOfReferenceUID") or None,
            "modality": IMAGE_CLASSES[walk.sop_class or ""],
            "patient": hashlib.sha256("\0".join(words).casefold().encode()).hexdigest(),
            "localizer": "LOCALIZER" in image_type[2:3],
            "lossy": text_of(found, "LossyImageCompression") == "01",
            "has_long_texts": walk.has_long_texts,
        }
    if wanted is not None and header["series"] != wanted:
        return ImageHeader(**header)
    try:
        pixels = read_pixels(found, size, walk, encoding, limits)
        frames = range(pixels.frames)
        shared, own = functional_groups(found, pixels.frames)
        planes = [_plane(found, shared, own[frame], pixels) for frame in frames]
        table = read_table(found, pixels)
        rescales = [read_rescale(found, shared, own[frame], table, header["modality"]) for frame in frames]
        piece, slices = _piece(found), integer_of(found, "NumberOfSlices", 0)
    except (DicomRefused, Malformed, TooLarge) as error:
        return ImageHeader(**header, problem=Problem.of(error))
    return ImageHeader(**header, pixels=pixels, planes=planes, rescales=rescales, piece=piece, slices=slices)


def _piece(found: Any) -> Piece | None:
    total = integer_of(found, "InConcatenationTotalNumber", 0)
    offset = integer_of(found, "ConcatenationFrameOffsetNumber", 0)
    concatenation = uid_of(found, "ConcatenationUID")
    return Piece(concatenation, total, offset) if concatenation or total > 1 or offset else None


def _plane(found: Any, shared: Any, own: Any, pixels: Pixels) -> Plane:
    is_classic = shared is None and own is None
    if is_classic and pixels.frames > 1:
        msg = "an object of several frames does not say where each of them lies"
        raise DicomRefused(DicomReason.NO_POSITION, msg)
    parts = {
        "ImagePositionPatient": ("PlanePositionSequence", 3),
        "ImageOrientationPatient": ("PlaneOrientationSequence", 6),
        "PixelSpacing": ("PixelMeasuresSequence", 2),
    }
    numbers: list[npt.NDArray[np.float64]] = []
    with quietly():
        for name, (group, count) in parts.items():
            place = found if is_classic else group_of(group, shared, own)
            values = [] if place is None else values_of(place, name)
            if len(values) != count:
                msg = (
                    f"an image has no {name}; without it nobody knows where it lies in the patient, or how large it is"
                )
                raise DicomRefused(DicomReason.NO_POSITION, msg)
            numbers.append(np.array([float(value) for value in values], np.float64))
    position, orientation, (between_rows, between_columns) = numbers
    return Plane(
        rows=pixels.rows,
        columns=pixels.columns,
        position=position,
        along_row=orientation[:3],
        along_column=orientation[3:],
        spacing=(float(between_columns), float(between_rows)),
    )
