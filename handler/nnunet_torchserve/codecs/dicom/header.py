"""What the header of one DICOM image says, as far as a volume depends on it.

Of the patient only a digest is kept, to tell one from another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DicomReason, DicomRefused, Malformed, RequestError, TooLarge
from ...limits import Limits
from .copied import COPIED, LONGEST_BYTES
from .elements import LONGEST_UID, PIXEL_DATA, UNDEFINED, Encoding, Selection, Walk
from .library import data_set, quietly
from .planes import Plane
from .rescale import UNSCALED, Linear, Rescale, Table

_ELEMENTS = {
    "ImageType": (0x00080008, "CS"),
    "SOPInstanceUID": (0x00080018, "UI"),
    "PatientName": (0x00100010, "PN"),
    "PatientID": (0x00100020, "LO"),
    "PatientBirthDate": (0x00100030, "DA"),
    "StudyInstanceUID": (0x0020000D, "UI"),
    "SeriesInstanceUID": (0x0020000E, "UI"),
    "ImagePositionPatient": (0x00200032, "DS"),
    "ImageOrientationPatient": (0x00200037, "DS"),
    "FrameOfReferenceUID": (0x00200052, "UI"),
    "SamplesPerPixel": (0x00280002, "US"),
    "PhotometricInterpretation": (0x00280004, "CS"),
    "NumberOfFrames": (0x00280008, "IS"),
    "Rows": (0x00280010, "US"),
    "Columns": (0x00280011, "US"),
    "PixelSpacing": (0x00280030, "DS"),
    "BitsAllocated": (0x00280100, "US"),
    "BitsStored": (0x00280101, "US"),
    "HighBit": (0x00280102, "US"),
    "PixelRepresentation": (0x00280103, "US"),
    "LossyImageCompression": (0x00282110, "CS"),
    "ConcatenationUID": (0x00209161, "UI"),
    "InConcatenationTotalNumber": (0x00209163, "US"),
    "ConcatenationFrameOffsetNumber": (0x00209228, "UL"),
    "NumberOfSlices": (0x00540081, "US"),
    "RescaleIntercept": (0x00281052, "DS"),
    "RescaleSlope": (0x00281053, "DS"),
}
"""Tag and value representation (PS3.6), which files of implicit encoding do not say."""

_SEQUENCES = {0x00283000, 0x52009229, 0x52009230}
"""At the top: the Modality LUT, the functional groups that all frames share, those of each frame."""

_GROUPS = {0x00209113, 0x00209116, 0x00289110, 0x00289145}
"""Within those: plane position, plane orientation, pixel measures, pixel value transformation."""

_CHARACTER_SET = 0x00080005
_TAGS = {_CHARACTER_SET, 0x00080016} | {tag for tag, _ in _ELEMENTS.values()} | _SEQUENCES

_TEXT = frozenset({"CS", "UI", "PN", "LO", "DA", "DS", "IS"})

_UNSIGNED = {"US": "u2", "UL": "u4"}

UID = re.compile(r"[0-9.]{1,64}")
_MONOCHROME = frozenset({"MONOCHROME1", "MONOCHROME2"})
_MOST_BITS = 32


class Modality(StrEnum):
    """What made the image, by the class of the object."""

    CT = "CT"
    MR = "MR"
    PET = "PT"


_CLASS = "1.2.840.10008.5.1.4.1.1."
IMAGE_CLASSES = {
    f"{_CLASS}2": Modality.CT,
    f"{_CLASS}2.1": Modality.CT,
    f"{_CLASS}2.2": Modality.CT,
    f"{_CLASS}4": Modality.MR,
    f"{_CLASS}4.1": Modality.MR,
    f"{_CLASS}4.3": Modality.MR,
    f"{_CLASS}4.4": Modality.MR,
    f"{_CLASS}128": Modality.PET,
    f"{_CLASS}130": Modality.PET,
    f"{_CLASS}128.1": Modality.PET,
}
"""Classes of images (PS3.4, annex B.5): single-frame, enhanced, enhanced colour, converted from single frames."""

SELECTION = Selection(
    frozenset(_TAGS), frozenset(_SEQUENCES | _GROUPS), frozenset(IMAGE_CLASSES), frozenset(COPIED), LONGEST_BYTES
)
"""What a header is read from."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """How an object's pixels are stored.

    Attributes:
        encoding: of the file.
        rows, columns, frames: their extent.
        bits_allocated, bits_stored: of one number.
        signed: whether it has a sign.
        at: first byte of the pixels' value, in the data set.
        length: of the value in bytes; ``None`` where frames are compressed, each a piece of its own.
        in_words: numbers of 8 bits are stored two in a word of 16 (PS3.5, annex A.3: OW), the higher byte first: each
            pair is swapped.
    """

    encoding: Encoding
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    at: int
    length: int | None
    in_words: bool = False

    @property
    def frame_bytes(self) -> int:
        """Of one frame, uncompressed."""
        return self.rows * self.columns * self.bits_allocated // 8

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers, in the file's byte order."""
        order = "<" if self.encoding.little else ">"
        return np.dtype(f"{order}{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


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
class Problem:
    """Why an object is of no use: what an exception says, without the frames, and so the bytes, that one holds on to.

    Attributes:
        code: the exception's.
        message: for the client.
    """

    code: str
    message: str

    @classmethod
    def of(cls, error: DicomRefused | Malformed | TooLarge) -> Problem:
        """What it says."""
        return cls(error.code, str(error))

    def error(self) -> RequestError:
        """To be raised."""
        for damaged in (Malformed, TooLarge):
            if self.code == damaged.code:
                return damaged(self.message)
        return DicomRefused(DicomReason(self.code), self.message)


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
        words = [_text(found, name).strip("^ ") for name in ("PatientID", "PatientName", "PatientBirthDate")]
        image_type = _values(found, "ImageType")
        header: dict[str, Any] = {
            "file": file,
            "sop_class": walk.sop_class or "",
            "sop_instance": _uid(found, "SOPInstanceUID"),
            "study": _uid(found, "StudyInstanceUID"),
            "series": _uid(found, "SeriesInstanceUID"),
            "frame_of_reference": _uid(found, "FrameOfReferenceUID") or None,
            "modality": IMAGE_CLASSES[walk.sop_class or ""],
            "patient": hashlib.sha256("\0".join(words).casefold().encode()).hexdigest(),
            "localizer": "LOCALIZER" in image_type[2:3],
            "lossy": _text(found, "LossyImageCompression") == "01",
            "has_long_texts": walk.has_long_texts,
        }
    if wanted is not None and header["series"] != wanted:
        return ImageHeader(**header)
    try:
        pixels = _pixels(found, size, walk, encoding, limits)
        frames = range(pixels.frames)
        shared, own = _functional_groups(found, pixels.frames)
        planes = [_plane(found, shared, own[frame], pixels) for frame in frames]
        table = _table_of(found, pixels)
        rescales = [_rescale(found, shared, own[frame], table, header["modality"]) for frame in frames]
        piece, slices = _piece(found), _integer(found, "NumberOfSlices", 0)
    except (DicomRefused, Malformed, TooLarge) as error:
        return ImageHeader(**header, problem=Problem.of(error))
    return ImageHeader(**header, pixels=pixels, planes=planes, rescales=rescales, piece=piece, slices=slices)


def _piece(found: Any) -> Piece | None:
    total = _integer(found, "InConcatenationTotalNumber", 0)
    offset = _integer(found, "ConcatenationFrameOffsetNumber", 0)
    concatenation = _uid(found, "ConcatenationUID")
    return Piece(concatenation, total, offset) if concatenation or total > 1 or offset else None


def _pixels(found: Any, size: int | None, walk: Walk, encoding: Encoding, limits: Limits) -> Pixels:
    if walk.pixels is None:
        msg = "an image has no pixels; send the files as the scanner or PACS wrote them"
        raise DicomRefused(DicomReason.TRUNCATED_PIXELS, msg)
    samples, photometric = _integer(found, "SamplesPerPixel", 1), _text(found, "PhotometricInterpretation")
    if samples != 1 or photometric not in _MONOCHROME:
        msg = "the images are in colour; send the grey images that the scanner made"
        raise DicomRefused(DicomReason.COLOUR, msg)
    if walk.pixels != PIXEL_DATA:
        msg = "the pixels are floating point numbers; CT, MR and PET images have integers"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    allocated, stored = _integer(found, "BitsAllocated"), _integer(found, "BitsStored")
    high, signed = _integer(found, "HighBit", stored - 1), _integer(found, "PixelRepresentation")
    if (
        allocated not in {8, 16, _MOST_BITS}
        or not 1 <= stored <= allocated
        or high != stored - 1
        or signed not in {0, 1}
    ):
        msg = f"pixels of {stored} bits in {allocated}, the highest being bit {high}; 8, 16 or 32 were expected, the "
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, f"{msg}lowest of them in use")
    rows, columns = _integer(found, "Rows"), _integer(found, "Columns")
    frames = _integer(found, "NumberOfFrames", 1)
    if min(rows, columns, frames) < 1:
        msg = f"a DICOM file declares {frames} frames of {rows} × {columns} pixels; each must be at least 1"
        raise Malformed(msg)
    if frames > limits.dicom_frames or rows * columns * frames > limits.voxels:
        msg = f"a DICOM file declares {frames} frames of {rows} × {columns} pixels; this server takes at most "
        msg += f"{limits.dicom_frames} frames, and {limits.voxels} voxels"
        raise TooLarge(msg)
    undefined = walk.pixels_length == UNDEFINED
    length = None if undefined else walk.pixels_length
    pixels = Pixels(
        encoding=encoding,
        rows=rows,
        columns=columns,
        frames=frames,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=bool(signed),
        at=walk.pixels_at,
        length=length,
        in_words=_is_in_words(allocated, walk, encoding),
    )
    ends, expected = walk.pixels_at + (length or 0), pixels.frame_bytes * frames
    expected += expected % 2  # a value has an even number of bytes
    if length is not None and length > expected:
        msg = f"an image holds {length} bytes of pixels, and declares {frames} frames of {rows} × {columns} pixels of "
        msg += f"{allocated} bits, {expected} bytes: one of them is wrong"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    needed = expected if pixels.in_words else pixels.frame_bytes * frames
    if (length is not None and length < needed) or (size is not None and ends > size):
        msg = f"the pixels of an image are cut off: {frames} × {rows} × {columns} were declared"
        raise DicomRefused(DicomReason.TRUNCATED_PIXELS, msg)
    return pixels


def _is_in_words(allocated: int, walk: Walk, encoding: Encoding) -> bool:
    """Whether bytes are swapped in pairs; big-endian files only, where the representation decides."""
    if encoding.little or allocated == 16:
        return False
    if allocated == 8 and walk.pixels_vr in {b"OB", b"OW"}:
        return walk.pixels_vr == b"OW"
    msg = f"pixels of {allocated} bits in big-endian order, which writers store in several ways; write the series anew"
    raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, f"{msg} in little-endian order")


def _functional_groups(found: Any, frames: int) -> tuple[Any, Sequence[Any]]:
    """The groups that all frames share, and those of each frame (PS3.3, C.7.6.16); empty for a single-frame object."""
    with quietly():
        shared = found.get("SharedFunctionalGroupsSequence")
        own = found.get("PerFrameFunctionalGroupsSequence")
        if own and len(own) != frames:
            msg = f"a DICOM file declares {frames} frames, and describes {len(own)}"
            raise Malformed(msg)
        return (shared[0] if shared else None), (list(own) if own else [None] * frames)


def _group(name: str, shared: Any, own: Any) -> Any:
    """The first item of a functional group, the frame's own before the shared one."""
    for groups in (own, shared):
        if groups is not None and (sequence := groups.get(name)):
            return sequence[0]
    return None


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
            place = found if is_classic else _group(group, shared, own)
            values = [] if place is None else _values(place, name)
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


def _table_of(found: Any, pixels: Pixels) -> Table | None:
    """The Modality LUT of all frames, if there is one."""
    with quietly():
        tables = found.get("ModalityLUTSequence")
        return _table(tables[0], pixels) if tables else None


def _rescale(found: Any, shared: Any, own: Any, table: Table | None, modality: Modality) -> Rescale:
    """Of one frame, from its functional group or, as single-frame objects and some writers have it, from the top.

    MR images may go without; those of CT and PET may not (type 1 in PS3.3, C.8.2.1 and C.8.9.4), and would be read as
    other values than they are.
    """
    with quietly():
        group = _group("PixelValueTransformationSequence", shared, own)
        given = {pair for place in (group, found) if place is not None and (pair := _pair(place)) is not None}
    if len(given) + (table is not None) > 1:
        msg = "an image says in two ways how its stored numbers become values, and they differ"
        raise Malformed(msg)
    if table is not None:
        return table
    if not given:
        if modality is Modality.MR:
            return UNSCALED
        msg = (
            f"a {modality} image has no RescaleSlope and RescaleIntercept, so nobody knows its values; send the files "
        )
        raise DicomRefused(DicomReason.INCOMPLETE, f"{msg}as the scanner wrote them")
    ((slope, intercept),) = given
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        msg = f"an image is rescaled by slope {slope:g} and intercept {intercept:g}, which makes no values"
        raise Malformed(msg)
    return Linear(slope, intercept)


def _pair(place: Any) -> tuple[float, float] | None:
    """Slope and intercept; ``None`` if neither is there."""
    slope, intercept = (_values(place, name) for name in ("RescaleSlope", "RescaleIntercept"))
    if not slope and not intercept:
        return None
    if not slope or not intercept:
        msg = "an image has one of RescaleSlope and RescaleIntercept, and not the other, so nobody knows its values"
        raise DicomRefused(DicomReason.INCOMPLETE, msg)
    return float(slope[0]), float(intercept[0])


def _table(item: Any, pixels: Pixels) -> Table:
    """A Modality LUT (PS3.3, C.11.1.1): its descriptor and data are bytes where the file says no representation."""
    order = "<" if pixels.encoding.little else ">"
    descriptor = _words(item, 0x00283002, f"{order}u2")
    if len(descriptor) != 3:
        msg = "a Modality LUT has no descriptor of three numbers"
        raise Malformed(msg)
    entries, first, bits = (int(number) for number in descriptor)
    entries = entries or 2**16
    if pixels.signed and first >= 2**15:
        first -= 2**16
    values = _words(item, 0x00283006, f"{order}u2")
    if len(values) == (entries + 1) // 2 and bits <= 8:  # two in a word, the lower byte first
        values = values.astype("<u2").view(np.uint8)
    if len(values) < entries:
        msg = f"a Modality LUT of {entries} entries has {len(values)}"
        raise Malformed(msg)
    return Table(first, values[:entries].astype(np.float32))


def _words(item: Any, tag: int, dtype: str) -> npt.NDArray[Any]:
    raw = item.get_item(tag)
    if raw is None:
        return np.empty(0, dtype)
    value = raw.value
    if isinstance(value, bytes):
        return np.frombuffer(value[: len(value) // 2 * 2], dtype)
    numbers = [value] if isinstance(value, int) else list(value)
    return np.array(numbers, np.int64).astype(dtype)


def _integer(found: Any, name: str, default: int | None = None) -> int:
    with quietly():
        values = _values(found, name)
        if not values and default is None:
            msg = f"an image has no {name}"
            raise Malformed(msg)
        return int(values[0]) if values else int(default or 0)


def _text(found: Any, name: str) -> str:
    with quietly():
        return str(next(iter(_values(found, name)), ""))


def _uid(found: Any, name: str) -> str:
    """A UID as it stands there; of what is too long for one, so that it is none, a word that is as different."""
    text = _text(found, name)
    return text if len(text) <= LONGEST_UID else f"no UID: {hashlib.sha256(text.encode()).hexdigest()}"


def _values(found: Any, name: str) -> Sequence[Any]:
    """An element's values; none if it is empty or not there.

    pydicom has them as bytes until somebody asks; what texts and numbers of two bytes say needs none of its classes.
    """
    tag, usual = _ELEMENTS[name]
    item = found.get_item(tag)
    if item is None:
        return []
    if isinstance(item.value, bytes):
        vr = item.VR or usual
        if vr in _TEXT:
            text = item.value.decode("latin-1").strip("\0 ")
            return [part.strip("\0 ") for part in text.split("\\")] if text else []
        if vr in _UNSIGNED:
            order = "<" if item.is_little_endian else ">"
            words: list[int] = np.frombuffer(item.value, f"{order}{_UNSIGNED[vr]}").tolist()
            return words
    value = found[tag].value
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)
