"""Compressed frames become stored numbers, by imagecodecs: RLE, JPEG-LS, JPEG 2000, lossless JPEG.

Why imagecodecs: the server has it already, its licence is free, it takes and gives memory, and it raises where gdcm
ends the process. What a codestream's own header declares is compared with the DICOM header before a decoder sees it,
so that none takes memory for more than was promised.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DicomReason, DicomRefused
from ..inflate import refuse_damage
from .stored_pixels import Pixels

_BASE = "1.2.840.10008.1.2."
RLE = f"{_BASE}5"
JPEG_LOSSLESS = frozenset({f"{_BASE}4.57", f"{_BASE}4.70"})
JPEG_LS = frozenset({f"{_BASE}4.80", f"{_BASE}4.81"})
JPEG_2000 = frozenset({f"{_BASE}4.90", f"{_BASE}4.91"})

_END, _PADDING = b"\xff\xd9", 16
"""What every codestream but RLE's ends with, and zeros that may follow it: frames have an even number of bytes. libjpeg
takes one without it, and makes up the rest."""

_LOSSLESS, _LS = 0xC3, 0xF7
_SEGMENTS = frozenset({0xC4, 0xCC, 0xDB, 0xDD, 0xF8, 0xFE, *range(0xE0, 0xF0)})
"""Markers before the frame header that have a length and are stepped over: tables, restart interval, comments and
applications' own. Anything else there, a marker without a length above all, decoders step over in ways of their own."""

_MOST_TILES = 1024
"""Of a JPEG 2000 frame; the decoder takes some kilobytes for each."""

_DAMAGED = "the compressed pixels of an image are damaged, or of another kind than its header says"
_FOLLOWED = "is followed by other bytes"

Stored = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Declared:
    """What a codestream's own header says."""

    rows: int
    columns: int
    components: int
    bits: int
    signed: bool = False


def is_supported(pixels: Pixels) -> bool:
    """Whether frames of this transfer syntax are decoded here."""
    return pixels.encoding.transfer_syntax in {RLE} | JPEG_LOSSLESS | JPEG_LS | JPEG_2000


def decompress(frame: bytes, pixels: Pixels) -> Stored:
    """The stored numbers of one frame (rows, columns). Needs no lock: several threads may call it.

    Args:
        frame: its codestream.
        pixels: what the DICOM header says of it.

    Raises:
        Malformed: it is damaged.
        DicomRefused: it is of a kind that is not decoded, or not what the header says.
    """
    syntax = pixels.encoding.transfer_syntax
    if syntax == RLE:
        return _of_rle(frame, pixels)
    _check_end(frame)
    declared = _of_jpeg_2000(frame) if syntax in JPEG_2000 else _of_jpeg(frame, _LS if syntax in JPEG_LS else _LOSSLESS)
    if (declared.rows, declared.columns) != (pixels.rows, pixels.columns) or declared.components != 1:
        msg = f"a frame has {declared.rows} × {declared.columns} pixels of {declared.components} components by itself, "
        msg += f"and {pixels.rows} × {pixels.columns} of one by its DICOM header"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    if not 2 <= declared.bits <= min(pixels.bits_allocated, 16):
        msg = f"a compressed frame has {declared.bits} bits a pixel; 2 to 16 were expected, and no more than allocated"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    found = np.empty(
        (pixels.rows, pixels.columns), f"{'i' if declared.signed else 'u'}{1 if declared.bits <= 8 else 2}"
    )
    with refuse_damage((Exception,), _DAMAGED):
        _decoder(syntax)(frame, out=found)  # which refuses to fill anything else than what it finds
    return _with_sign(found, declared, pixels)


def _decoder(syntax: str) -> Callable[..., Any]:
    import imagecodecs

    decoder: Callable[..., Any] = imagecodecs.jpeg8_decode
    if syntax in JPEG_2000:
        decoder = imagecodecs.jpeg2k_decode
    elif syntax in JPEG_LS:
        decoder = imagecodecs.jpegls_decode
    return decoder


def _of_rle(frame: bytes, pixels: Pixels) -> Stored:
    """Byte planes, each packed by itself (PS3.5, annex G); the decoder fills what it is given, and no more."""
    import imagecodecs

    segments = int.from_bytes(frame[:4], "little")
    if segments != pixels.bits_allocated // 8:
        msg = f"a frame in RLE has {segments} planes, and {pixels.bits_allocated // 8} bytes a pixel"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    planes = bytearray(pixels.frame_bytes)
    with refuse_damage((Exception,), _DAMAGED):
        found = imagecodecs.dicomrle_decode(frame, pixels.dtype, out=planes)
        stored = np.frombuffer(found, pixels.dtype)
        return stored.reshape(pixels.rows, pixels.columns)


def _with_sign(found: Stored, declared: _Declared, pixels: Pixels) -> Stored:
    """Numbers as the DICOM header means them: most codecs know no sign, JPEG 2000 has one of its own.

    A sign that the codestream has is kept. Where it has none and the header says that there is one, it is the highest
    bit of the codestream's own precision, as pydicom and DCMTK read it. What then has more bits than ``BitsStored`` is
    refused by whoever checks the range: those bits were not written as the header says.
    """
    kind = f"{'i' if pixels.signed else 'u'}{pixels.bits_allocated // 8}"
    numbers = found.astype(np.int32)
    if declared.signed and not pixels.signed and numbers.min() < 0:
        msg = "a compressed frame holds negative numbers, and its DICOM header says that there are none"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    if pixels.signed and not declared.signed:
        sign = 1 << declared.bits - 1
        numbers = (numbers ^ sign) - sign
    return numbers.astype(kind)


def _check_end(frame: bytes) -> None:
    """A codestream ends with its marker; what follows beyond padding would be lost."""
    tail = frame[-_PADDING:]
    if _END not in tail:
        msg = "a compressed frame ends before its codestream does; send the files as the scanner wrote them"
        raise DicomRefused(DicomReason.TRUNCATED_PIXELS, msg)
    if not tail.rstrip(b"\0").endswith(_END):
        raise _no_codestream(_FOLLOWED)


def _of_jpeg(frame: bytes, wanted: int) -> _Declared:
    """The frame header of a JPEG or JPEG-LS codestream.

    Args:
        frame: the codestream; one, to the last of its bytes.
        wanted: the marker of the frame header that the transfer syntax means: lossless (SOF3) or JPEG-LS (SOF55).
    """
    position = 2
    if not frame.startswith(b"\xff\xd8"):
        raise _no_codestream()
    while position + 10 <= len(frame):
        marker, kind, length = struct.unpack_from(">BBH", frame, position)
        if (marker, kind) == (0xFF, 0xFF):  # fill
            position += 1
            continue
        if (marker, kind) == (0xFF, wanted):
            if frame[frame.find(_END, position) + 2 :].strip(b"\0"):
                raise _no_codestream(_FOLLOWED)
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, position + 4)
            return _Declared(rows, columns, components, bits)
        if marker == 0xFF and 0xC0 <= kind <= 0xCF and kind not in _SEGMENTS | {0xC8, _LOSSLESS}:
            msg = "a frame is JPEG of a lossy kind; send the series without loss"
            raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
        if marker != 0xFF or kind not in _SEGMENTS or length < 2:
            break
        position += 2 + length
    raise _no_codestream()


def _of_jpeg_2000(frame: bytes) -> _Declared:
    """The SIZ segment, which comes first in a codestream (ISO/IEC 15444-1, A.5.1)."""
    if not frame.startswith(b"\xff\x4f\xff\x51") or len(frame) < 45:
        raise _no_codestream()
    x, y, x0, y0, tile_x, tile_y, tile_x0, tile_y0, components, depth, dx, dy = struct.unpack_from(">8LH3B", frame, 8)
    tiles = -(-(x - tile_x0) // max(tile_x, 1)) * -(-(y - tile_y0) // max(tile_y, 1))
    if not 1 <= tiles <= _MOST_TILES or (dx, dy) != (1, 1):
        msg = f"a JPEG 2000 frame has {tiles} tiles, and takes each pixel {dx} × {dy} times; such are not decoded"
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
    return _Declared(y - y0, x - x0, components, (depth & 0x7F) + 1, bool(depth & 0x80))


def _no_codestream(what: str = "does not begin as its transfer syntax says") -> DicomRefused:
    msg = f"a compressed frame {what}; send the files as the scanner wrote them"
    return DicomRefused(DicomReason.UNSUPPORTED_PIXELS, msg)
