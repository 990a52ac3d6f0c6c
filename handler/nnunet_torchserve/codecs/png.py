"""PNG, in and out: the voxels that nnU-Net's ``NaturalImage2DIO`` reads, by way of scikit-image, imageio and Pillow.

Pillow decodes them, but never sees a client's file: this module walks the chunks itself and hands over only those that
the voxels need. So texts, profiles and thumbnails are never parsed, the size is checked before anything is unpacked,
and rows that are missing are noticed, for which Pillow would give zeros.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from PIL import Image, PngImagePlugin

from ..errors import Malformed, TooLarge, WrongChannels
from ..limits import Limits
from ..volume import LabelArray, Placement
from .geometry import check_size
from .inflate import SLACK_BYTES
from .pictures import MOST_RATIO, PILLOW_ERRORS, PictureSource, as_channels

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

_IHDR = struct.Struct(">II5B")
_IHDR_COLOUR = 9
"""Where the header has the colour type."""

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_DEPTHS = {
    _GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGB_ALPHA: (8, 16),
}  # fmt: skip
"""Bits of a sample for each colour type, PNG specification 11.2.1."""

_SAMPLES = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGB_ALPHA: 4}
_UNPACKED_BYTES = 64 * 1024
_INFLATE_ERROR: Any = isal_zlib.error
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""Where each pass of an interlaced picture begins and steps, y before x, PNG specification 8.2."""

_CHUNK_OVERHEAD = 12
_MEAN_CHUNK_BYTES = 256
"""libpng writes 8 KiB of voxels a chunk; a file of far smaller ones only costs time."""

_LONGEST_PALETTE = 3 * 256
_VOXEL_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_ANIMATION = {b"acTL", b"fcTL", b"fdAT"}


def is_png(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a PNG."""
    return head.startswith(_PNG_MAGIC)


def open_png(body: memoryview, limits: Limits, placement: Placement | None) -> PictureSource:
    """A PNG, with the channels that ``skimage.io.imread`` gives it: 1 for grey, 3 for palettes, 3 or 4 for colour.

    Args:
        body: the file.
        limits: what is allowed.
        placement: where the picture lies, by the request or by the model's reader; ``None`` where neither says it.

    Raises:
        Malformed, TooLarge, BadSpacing, WrongChannels: the header says so.
    """
    header, pieces, contents = _voxel_chunks(body, limits)
    width, height, depth, colour, method, filters, interlace = _IHDR.unpack(header)
    if depth not in _DEPTHS.get(colour, ()) or method or filters or interlace > 1:
        msg = "the PNG's header (IHDR) names a kind of picture that the standard does not have"
        raise Malformed(msg)
    if colour == _GREY_ALPHA and depth == 8:
        msg = "a grey picture with an alpha channel, which nnU-Net's reader refuses; send grey, RGB or RGBA"
        raise WrongChannels(msg)
    channels = {_PALETTE: 3, _GREY_ALPHA: 4}.get(colour, _SAMPLES[colour])  # grey and alpha of 16 bits: RGBA of 8
    size = check_size((1, height, width), channels, 2 if depth == 16 and colour == _GREY else 1, limits)
    stored_bytes = _stored_bytes(width, height, depth * _SAMPLES[colour], interlaced=bool(interlace))
    packed_bytes = sum(len(content) for content in contents)
    if packed_bytes > stored_bytes + stored_bytes // 100 + SLACK_BYTES:
        msg = "far more data follows the PNG's voxels than its header declares"
        raise TooLarge(msg)
    if stored_bytes > MOST_RATIO * packed_bytes:
        msg = f"the PNG declares voxels of {size} bytes, which its {packed_bytes} bytes cannot hold; it seems cut off"
        raise Malformed(msg)

    def decode() -> npt.NDArray[np.float32]:
        _check_rows(contents, stored_bytes)
        return _voxels(b"".join((_PNG_MAGIC, *pieces)))

    return PictureSource((1, height, width), channels, placement, decode)


def encode_png(labels: LabelArray) -> bytes:
    """A label map as a grey PNG of 8 or 16 bits: the same bytes for the same labels.

    Args:
        labels: (1, Y, X), uint8 or uint16.
    """
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(labels[0])).save(file, "PNG")
    return file.getvalue()


def _stored_bytes(width: int, height: int, bits: int, *, interlaced: bool) -> int:
    """What the rows take when they are unpacked, each with a byte for its filter."""
    total = 0
    for y, x, step_y, step_x in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = math.ceil((height - y) / step_y), math.ceil((width - x) / step_x)
        total += rows * (1 + math.ceil(columns * bits / 8)) if rows > 0 and columns > 0 else 0
    return total


def _check_rows(contents: list[memoryview], stored_bytes: int) -> None:
    """Refuse voxels that end early: Pillow would give zeros for the rows that are missing."""
    inflate = isal_zlib.decompressobj()
    unpacked = 0
    for content in contents:
        for start in range(0, len(content), _UNPACKED_BYTES):
            packed: Any = content[start : start + _UNPACKED_BYTES]
            try:
                while unpacked < stored_bytes and (chunk := inflate.decompress(packed, _UNPACKED_BYTES)):
                    unpacked += len(chunk)
                    packed = inflate.unconsumed_tail
            except _INFLATE_ERROR:
                msg = "the PNG's voxels are damaged"
                raise Malformed(msg) from None
    if unpacked < stored_bytes:
        msg = f"the PNG's voxels end after {unpacked} of {stored_bytes} bytes; it seems cut off"
        raise Malformed(msg)


def _voxels(png: bytes) -> npt.NDArray[np.float32]:
    try:
        # Not Image.open: its limit of pixels is the process's, and ours has been checked.
        with PngImagePlugin.PngImageFile(io.BytesIO(png)) as picture:
            return as_channels(picture)
    except PILLOW_ERRORS:
        msg = "the PNG's voxels are damaged or cut off"
        raise Malformed(msg) from None


def _voxel_chunks(body: memoryview, limits: Limits) -> tuple[memoryview, list[memoryview], list[memoryview]]:
    """The contents of IHDR, the chunks that make the voxels, and the contents of those that hold them.

    Transparency (tRNS) is left out: the reader does not apply it.
    """
    pieces: list[memoryview] = []
    before: list[bytes] = []
    contents: list[memoryview] = []
    others = 0
    header = memoryview(b"")
    for kind, chunk, content in _chunks(body):
        _check_order(kind, len(content), before)
        if kind in _VOXEL_CHUNKS:
            pieces.append(chunk)
            if kind == b"IDAT":
                contents.append(content)
            header = content if kind == b"IHDR" else header
        else:
            others += 1
        if others > limits.header_fields or len(pieces) > limits.header_fields + len(body) // _MEAN_CHUNK_BYTES:
            msg = "the PNG comes in too many chunks; save it without metadata"
            raise TooLarge(msg)
        if before[-1:] != [kind]:
            before.append(kind)
    if b"IEND" not in before or b"IDAT" not in before or (header[_IHDR_COLOUR] == _PALETTE and b"PLTE" not in before):
        msg = "the PNG has no voxels, no palette or no end; it seems cut off"
        raise Malformed(msg)
    return header, pieces, contents


def _check_order(kind: bytes, length: int, before: list[bytes]) -> None:
    """Refuse a chunk that cannot follow those ``before``, runs of one kind as one."""
    if kind in _ANIMATION:
        msg = "an animated PNG; send one picture"
        raise WrongChannels(msg)
    fits = {
        b"IHDR": not before and length == _IHDR.size,
        b"PLTE": not {b"PLTE", b"IDAT"} & set(before) and length % 3 == 0 and 0 < length <= _LONGEST_PALETTE,
        b"IDAT": b"IDAT" not in before or before[-1] == b"IDAT",
        b"IEND": True,
    }.get(kind, kind[:1].islower())  # what others may ignore begins with a small letter
    if not fits or not (before or kind == b"IHDR"):
        msg = "the PNG's chunks are unknown, out of order or of a wrong length"
        raise Malformed(msg)


def _chunks(body: memoryview) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Kind, whole chunk and content of each chunk up to IEND; checksums are verified."""
    position, kind = len(_PNG_MAGIC), b""
    while kind != b"IEND" and position + _CHUNK_OVERHEAD <= len(body):
        length, kind = struct.unpack_from(">I4s", body, position)
        chunk = body[position : position + length + _CHUNK_OVERHEAD]
        if len(chunk) < length + _CHUNK_OVERHEAD or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            msg = "the PNG is damaged or cut off: a chunk's checksum is wrong"
            raise Malformed(msg)
        yield kind, chunk, chunk[8:-4]
        position += len(chunk)
