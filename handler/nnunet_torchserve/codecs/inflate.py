"""Bounded decompression: never more bytes than were asked for, whatever the stream would expand to."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib

from ..errors import Malformed, TooLarge

GZIP_MAGIC = b"\x1f\x8b"
SLACK_BYTES = 1024**2
"""Bytes that may follow the declared voxels; some writers pad."""

_CHUNK_BYTES = 64 * 1024


class ByteSource:
    """A request body read front to back, through gzip where it is gzip.

    Raises :class:`Malformed` from every method when the gzip stream is damaged or ends early.
    """

    def __init__(self, body: bytes | bytearray | memoryview) -> None:
        self.compressed = bytes(body[:2]) == GZIP_MAGIC
        raw = io.BytesIO(body)
        self._stream: Any = igzip.IGzipFile(fileobj=raw, mode="rb") if self.compressed else raw

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        with _gzip_errors():
            return bytes(self._stream.read(size))

    def skip(self, size: int) -> None:
        """Read ``size`` bytes and keep none."""
        while size > 0 and (chunk := self.read(min(size, _CHUNK_BYTES))):
            size -= len(chunk)

    def read_exactly(self, size: int, lead: bytes) -> npt.NDArray[np.uint8]:
        """``size`` bytes in a writable array, uint8 (size,); the first are ``lead``, which were read before."""
        buffer = np.empty(size, np.uint8)
        view, filled = buffer.data, len(lead)
        view[:filled] = lead
        with _gzip_errors():
            while filled < size:
                count = self._stream.readinto(view[filled:])
                if not count:
                    msg = f"the image ends after {filled} of {size} bytes of voxels; it seems cut off"
                    raise Malformed(msg)
                filled += count
        return buffer

    def finish(self) -> None:
        """Read to the end, so that a gzip checksum is verified.

        Raises:
            TooLarge: far more bytes follow than the image's header declares.
        """
        rest = 0
        while chunk := self.read(_CHUNK_BYTES):
            rest += len(chunk)
            if rest > SLACK_BYTES:
                msg = "far more data follows the voxels than the image's header declares"
                raise TooLarge(msg)


class _gzip_errors:  # noqa: N801 (reads as a statement)
    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, EOFError | zlib.error | isal_zlib.error | OSError):
            msg = "the gzip stream is damaged or cut off"
            raise Malformed(msg) from None
