"""BMP, in and out: the voxels that nnU-Net's ``NaturalImage2DIO`` reads, by way of scikit-image, imageio and Pillow.

Pillow reads the header and the palette from the file's first bytes, and the voxels once the size is checked and all of
them are there. Run lengths are refused: Pillow unpacks them in Python, byte by byte.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import BmpImagePlugin, Image

from ..errors import Malformed, UnknownFormat
from ..limits import Limits
from ..volume import LabelArray, Placement
from .geometry import check_size
from .pictures import PILLOW_ERRORS, PictureSource, as_channels, in_stocks_type

_HEADER_SIZES = {12, 16, 40, 52, 56, 64, 108, 124}
"""Of the header behind the first 14 bytes."""

_HEAD_BYTES = 4096
"""Header and palette: at most 14, 124 and 256 times 4 bytes."""

_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "RGBA": 4}
"""Pillow's mode -> channels; imageio gives a palette's colours."""

_PLAIN = {0, 3}
"""Compression: none, and none with masks of the colours."""


def is_bmp(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a BMP."""
    return head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _HEADER_SIZES


def open_bmp(body: memoryview, limits: Limits, placement: Placement | None) -> PictureSource:
    """A BMP, with the channels that ``skimage.io.imread`` gives it: 1 for grey, 3 for palettes, 3 or 4 for colour.

    Args:
        body: the file.
        limits: what is allowed.
        placement: where the picture lies, by the request or by the model's reader; ``None`` where neither says it.

    Raises:
        Malformed, TooLarge, BadSpacing, UnknownFormat: the header says so.
    """
    picture = _opened(body[:_HEAD_BYTES])
    if picture.info.get("compression") not in _PLAIN or picture.mode not in _CHANNELS:
        msg = "a BMP whose voxels are packed; save it without compression, or as PNG"
        raise UnknownFormat(msg)
    channels = _CHANNELS[picture.mode]
    width, height = picture.size
    check_size((1, height, width), channels, 1, limits)
    [tile] = picture.tile
    decoder: Any = tile.args
    stored = decoder[1] * height  # a row's bytes, filled up to four
    if tile.offset + stored > len(body):
        msg = f"the BMP's voxels end after {max(0, len(body) - tile.offset)} of {stored} bytes; it seems cut off"
        raise Malformed(msg)

    return PictureSource((1, height, width), channels, placement, lambda: _voxels(body))


def encode_bmp(labels: LabelArray) -> bytes:
    """A label map as a grey BMP of 8 bits, as ``NaturalImage2DIO`` writes it.

    Args:
        labels: (1, Y, X), values up to ``MOST_OF_8_BITS``.
    """
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(in_stocks_type(labels)[0])).save(file, "BMP")
    return file.getvalue()


def _opened(body: memoryview) -> BmpImagePlugin.BmpImageFile:
    """Pillow's picture, with header and palette read. Not ``Image.open``: its limit of pixels is the process's."""
    try:
        return BmpImagePlugin.BmpImageFile(io.BytesIO(body))
    except PILLOW_ERRORS:
        msg = "the BMP's header is damaged, cut off, or names a kind of picture that the format does not have"
        raise Malformed(msg) from None


def _voxels(body: memoryview) -> npt.NDArray[np.float32]:
    with _opened(body) as picture:
        try:
            return as_channels(picture)
        except PILLOW_ERRORS:
            msg = "the BMP's voxels are damaged or cut off"
            raise Malformed(msg) from None
