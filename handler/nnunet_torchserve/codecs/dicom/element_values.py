"""What single elements of a header say: their values as text and numbers, from the bytes that pydicom holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import Malformed
from .elements import LONGEST_UID
from .library import quietly

ELEMENTS = {
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

_TEXT = frozenset({"CS", "UI", "PN", "LO", "DA", "DS", "IS"})

_UNSIGNED = {"US": "u2", "UL": "u4"}


def values_of(found: Any, name: str) -> Sequence[Any]:
    """An element's values; none if it is empty or not there.

    pydicom has them as bytes until somebody asks; what texts and numbers of two bytes say needs none of its classes.
    """
    tag, usual = ELEMENTS[name]
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


def integer_of(found: Any, name: str, default: int | None = None) -> int:
    """An element's first value as a number.

    Raises:
        Malformed: it is not there, and there is no default.
    """
    with quietly():
        values = values_of(found, name)
        if not values and default is None:
            msg = f"an image has no {name}"
            raise Malformed(msg)
        return int(values[0]) if values else int(default or 0)


def text_of(found: Any, name: str) -> str:
    """An element's first value as a text; empty if it is not there."""
    with quietly():
        return str(next(iter(values_of(found, name)), ""))


def uid_of(found: Any, name: str) -> str:
    """A UID as it stands there; of what is too long for one, so that it is none, a word that is as different."""
    text = text_of(found, name)
    return text if len(text) <= LONGEST_UID else f"no UID: {hashlib.sha256(text.encode()).hexdigest()}"


def words_of(item: Any, tag: int, dtype: str) -> npt.NDArray[Any]:
    """An element's numbers of two bytes, ``dtype``, whether pydicom holds them as bytes or has read them."""
    raw = item.get_item(tag)
    if raw is None:
        return np.empty(0, dtype)
    value = raw.value
    if isinstance(value, bytes):
        return np.frombuffer(value[: len(value) // 2 * 2], dtype)
    numbers = [value] if isinstance(value, int) else list(value)
    return np.array(numbers, np.int64).astype(dtype)
