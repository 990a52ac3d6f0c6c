"""What PNG, TIFF and BMP have in common: files that say nothing of where they lie."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import BadSpacing
from ..options import OutputFormat
from ..volume import LabelArray, Placement
from .channels import picture_advice
from .geometry import place

PLANE = 2
"""Numbers of a placement in the plane, and axes of a picture."""

MOST_RATIO = 1032
"""What deflate makes of a byte at most."""

MOST_OF_8_BITS = 254
"""nnU-Net writes label maps with larger values in 16 bits."""


PILLOW_ERRORS = (SyntaxError, OSError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow raises for damaged pictures."""


class PictureSource:
    """One picture, or one stack of them, as an :class:`~.source.ImageSource`."""

    nifti_header = None

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: int,
        placement: Placement | None,
        decode: Callable[[], npt.NDArray[np.float32]],
        pages: int = 1,
    ) -> None:
        """A picture whose header is checked; ``decode`` gives float32 (C, Z, Y, X); a TIFF may have several pages.

        Raises:
            BadSpacing: nobody says how large a voxel is.
        """
        if placement is None:
            msg = (
                "a picture has no voxel spacing and this model was trained on images with one; "
                "give option spacing, mm along x, y for a slice, or x, y, z"
            )
            raise BadSpacing(msg)
        self.geometry = place(shape, placement)
        self.channels = channels
        self.native_format = OutputFormat.PNG if shape[0] == 1 else OutputFormat.NIFTI_GZ
        self._decode, self._pages = decode, pages

    def channels_advice(self, wanted: int) -> str:
        """What would be right for a model of so many channels."""
        return picture_advice(self.channels, wanted, self._pages)

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the picture: float32 (C, Z, Y, X).

        Raises:
            Malformed: the packed voxels are damaged or end early.
        """
        return self._decode()


def as_channels(picture: Image.Image) -> npt.NDArray[np.float32]:
    """The voxels that imageio, through which scikit-image reads, has from Pillow: float32 (C, 1, Y, X)."""
    pixels = np.asarray(picture.convert("RGB") if picture.mode == "P" else picture)
    if pixels.ndim == PLANE:
        return pixels.astype(np.float32)[None, None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[:, None], np.float32)


def in_stocks_type(labels: LabelArray) -> LabelArray:
    """A label map in the type in which nnU-Net's readers write it, by the values that are there."""
    if labels.max() <= MOST_OF_8_BITS:
        return labels.astype(np.uint8, copy=False)
    return labels.astype(np.uint16, copy=False)
