"""How an object's pixels are stored, as its header says and as its length bears out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DicomReason, DicomRefused, Malformed, TooLarge
from ...limits import Limits
from .element_values import integer_of, text_of
from .elements import PIXEL_DATA, UNDEFINED, Encoding, Walk

_MONOCHROME = frozenset({"MONOCHROME1", "MONOCHROME2"})
_MOST_BITS = 32


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


def read_pixels(found: Any, size: int | None, walk: Walk, encoding: Encoding, limits: Limits) -> Pixels:
    """How the pixels of an object are stored.

    Args:
        found: its data set.
        size: bytes of that; ``None`` if they are deflated, so that nobody knows.
        walk: over its elements, to their end.
        encoding: how they are stored.
        limits: what is allowed.

    Raises:
        DicomRefused: pixels that are missing, cut off, in colour, or stored in a way that is not read.
        Malformed: an extent that is none.
        TooLarge: more frames or voxels than are allowed.
    """
    if walk.pixels is None:
        msg = "an image has no pixels; send the files as the scanner or PACS wrote them"
        raise DicomRefused(DicomReason.TRUNCATED_PIXELS, msg)
    samples, photometric = integer_of(found, "SamplesPerPixel", 1), text_of(found, "PhotometricInterpretation")
    if samples != 1 or photometric not in _MONOCHROME:
        msg = "the images are in colour; send the grey images that the scanner made"
        raise DicomRefused(DicomReason.COLOUR, msg)
    if walk.pixels != PIXEL_DATA:
        msg = "the pixels are floating point numbers; CT, MR and PET images have integers"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    allocated, stored = integer_of(found, "BitsAllocated"), integer_of(found, "BitsStored")
    high, signed = integer_of(found, "HighBit", stored - 1), integer_of(found, "PixelRepresentation")
    if (
        allocated not in {8, 16, _MOST_BITS}
        or not 1 <= stored <= allocated
        or high != stored - 1
        or signed not in {0, 1}
    ):
        msg = f"pixels of {stored} bits in {allocated}, the highest being bit {high}; 8, 16 or 32 were expected, the "
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, f"{msg}lowest of them in use")
    rows, columns = integer_of(found, "Rows"), integer_of(found, "Columns")
    frames = integer_of(found, "NumberOfFrames", 1)
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
