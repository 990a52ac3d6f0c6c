"""Stored numbers of each frame, as they are read front to back; one frame at a time is held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DicomReason, DicomRefused
from .container import Stream
from .stored_pixels import Pixels

Bytes = npt.NDArray[np.uint8]
Stored = npt.NDArray[Any]
"""Integers (rows, columns)."""


def native_frames(stream: Stream, pixels: Pixels) -> Iterator[Stored]:
    """The frames of pixels that are not compressed.

    Args:
        stream: at the first byte of the first frame.
        pixels: how they are stored.

    Raises:
        Malformed: they end early.
        DicomRefused: a number is larger than it may be.
    """
    read = _Swapped(stream).read_exactly if pixels.in_words else stream.read_exactly
    for _ in range(pixels.frames):
        stored = read(pixels.frame_bytes).view(pixels.dtype).reshape(pixels.rows, pixels.columns)
        check_range(stored, pixels)
        yield stored


class _Swapped:
    """Bytes of a stream, those of each pair swapped; a frame may end within a pair."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self._over = stream, np.empty(0, np.uint8)

    def read_exactly(self, size: int) -> Bytes:
        wanted = size - len(self._over)
        swapped = self._stream.read_exactly(wanted + wanted % 2).view(">u2").astype("<u2").view(np.uint8)
        found, self._over = np.concatenate([self._over, swapped[:wanted]]), swapped[wanted:]
        return found


def check_range(stored: Stored, pixels: Pixels) -> None:
    """Refuse numbers that do not fit the bits that the header says they have.

    Old scanners kept drawings in the bits above. Readers disagree on such numbers: ITK clears those
    bits, others do not.
    """
    if pixels.bits_stored == pixels.bits_allocated:
        return
    low = -(1 << pixels.bits_stored - 1) if pixels.signed else 0
    high = low + (1 << pixels.bits_stored) - 1
    if stored.min() < low or stored.max() > high:
        msg = (
            f"pixels hold numbers beyond the {pixels.bits_stored} bits that BitsStored says, on which readers disagree"
        )
        raise DicomRefused(DicomReason.UNSUPPORTED_PIXELS, f"{msg}; write the series anew")
