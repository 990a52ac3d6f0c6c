"""Bounded decompression: never more bytes than were asked for, whatever the stream would expand to; and gzip."""

from __future__ import annotations

import bz2
import io
import zlib
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import igzip, isal_zlib

from ..errors import Malformed, TooLarge

Payload = bytes | bytearray | memoryview
Body = tuple[Payload, ...]
"""One image: one file, or the files of a DICOM series."""

GZIP_MAGIC = b"\x1f\x8b"
SLACK_BYTES = 1024**2
"""Bytes that may follow the declared voxels; some writers pad."""

_CHUNK_BYTES = 64 * 1024
_STREAM_ERRORS: tuple[Any, ...] = (EOFError, OverflowError, zlib.error, isal_zlib.error, OSError)
"""What the decompressors raise for damaged streams."""

_DAMAGED = "the compressed stream is damaged or cut off"


_GZIP_LEVEL = 2
"""igzip's levels are 0 to 3; above 2 label maps shrink little and cost twice."""


class Compression(Enum):
    """How bytes are packed."""

    NONE = "none"
    GZIP = "gzip"
    ZLIB = "zlib"
    DEFLATE = "deflate"
    BZIP2 = "bzip2"


_WINDOW_BITS = {Compression.ZLIB: 15, Compression.DEFLATE: -15}
"""zlib's; below 0 for a stream without zlib's header."""


def gzipped(content: Any) -> bytes:
    """Bytes, or an array's memory, as gzip: the same for the same content."""
    packed: bytes = igzip.compress(content, _GZIP_LEVEL, mtime=0)
    return packed


class ByteSource:
    """Bytes read front to back, through a decompressor where they are packed; the body itself is never copied.

    Raises :class:`Malformed` from every method when the packed stream is damaged or ends early.
    """

    def __init__(self, body: Payload, compression: Compression | None = None, checksum: int | None = None) -> None:
        """Read from the start of ``body``.

        Args:
            body: the bytes.
            compression: how they are packed; ``None`` unpacks them if they begin like gzip.
            checksum: CRC-32 of what they are unpacked, compared by :meth:`finish`.
        """
        if compression is None:
            compression = Compression.GZIP if bytes(body[:2]) == GZIP_MAGIC else Compression.NONE
        self.body = memoryview(body)
        self.compressed = compression is not Compression.NONE
        self._ahead = b""
        self._position = 0
        self._stream: Any = _unpacked(io.BufferedReader(MemoryFile(self.body), _CHUNK_BYTES), compression)
        self._checked = None if checksum is None else _Checked(self._stream, checksum)
        if self._checked is not None:
            self._stream = self._checked

    @classmethod
    def over(cls, file: io.RawIOBase, compression: Compression) -> ByteSource:
        """What a file holds, unpacked as it is read; no more of it than that is ever in memory."""
        source = cls(b"", Compression.NONE)
        source.compressed = compression is not Compression.NONE
        source._stream = _unpacked(io.BufferedReader(file, _CHUNK_BYTES), compression)
        return source

    @property
    def is_checked(self) -> bool:
        """Whether :meth:`finish` compares a checksum that was given."""
        return self._checked is not None

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, which stay to be read; fewer only at the end."""
        if len(self._ahead) < size:
            self._ahead += self._take(size - len(self._ahead))
        return self._ahead[:size]

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        taken, self._ahead = self._ahead[:size], self._ahead[size:]
        if len(taken) < size:
            taken += self._take(size - len(taken))
        self._position += len(taken)
        return taken

    def skip(self, size: int) -> None:
        """Read ``size`` bytes and keep none."""
        size -= len(self.read(min(size, len(self._ahead))))  # at once: each read makes a copy of what is left
        while size > 0 and (chunk := self.read(min(size, _CHUNK_BYTES))):
            size -= len(chunk)

    def rest(self, compression: Compression) -> ByteSource:
        """What follows, packed on its own: only for a source that is not packed itself."""
        return ByteSource(self.body[self._position :], compression)

    def read_exactly(self, size: int) -> npt.NDArray[np.uint8]:
        """``size`` bytes in a writable array, uint8 (size,)."""
        buffer = np.empty(size, np.uint8)
        view = buffer.data
        first = self.read(min(size, len(self._ahead)))
        view[: len(first)] = first
        filled = len(first)
        with refuse_damage():
            while filled < size:
                count = self._stream.readinto(view[filled:])
                if not count:
                    msg = "the image ends before the last of its voxels; it seems cut off"
                    raise Malformed(msg)
                filled += count
        self._position += filled - len(first)
        return buffer

    def finish(self) -> None:
        """Read to the end, so that a checksum is verified.

        Raises:
            TooLarge: far more bytes follow than the image's header declares.
            Malformed: the checksum is another one.
        """
        rest = 0
        while chunk := self.read(_CHUNK_BYTES):
            rest += len(chunk)
            if rest > SLACK_BYTES:
                msg = "far more data follows the voxels than the image's header declares"
                raise TooLarge(msg)
        if self._checked is not None and not self._checked.is_right:
            raise Malformed(_DAMAGED)

    def _take(self, size: int) -> bytes:
        with refuse_damage():
            return bytes(self._stream.read(size))


class _Checked:
    """A stream whose CRC-32 is summed as it is read."""

    def __init__(self, stream: Any, expected: int) -> None:
        self._stream, self._expected, self._sum = stream, expected, 0

    @property
    def is_right(self) -> bool:
        return self._sum == self._expected

    def read(self, size: int) -> bytes:
        chunk: bytes = self._stream.read(size)
        self._sum = isal_zlib.crc32(chunk, self._sum)
        return chunk

    def readinto(self, buffer: memoryview) -> int:
        count: int = self._stream.readinto(buffer)
        self._sum = isal_zlib.crc32(buffer[:count], self._sum)
        return count


def _unpacked(plain: io.BufferedReader, compression: Compression) -> Any:
    if compression is Compression.GZIP:
        return igzip.IGzipFile(fileobj=plain, mode="rb")
    if compression is Compression.BZIP2:
        return bz2.BZ2File(plain)
    if compression in _WINDOW_BITS:
        return io.BufferedReader(_ZlibReader(plain, _WINDOW_BITS[compression]), _CHUNK_BYTES)
    return plain


class MemoryFile(io.RawIOBase):
    """Memory as a file that libraries can seek in; unlike ``BytesIO`` it copies nothing but what is read.

    Several pieces follow each other, so that a made header can stand before a client's bytes.
    """

    def __init__(self, *pieces: memoryview) -> None:
        self._pieces, self._position = pieces, 0
        self._size = sum(len(piece) for piece in pieces)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As every file's.

        Raises:
            ValueError: before the start.
        """
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            msg = "a position before the start of the file"
            raise ValueError(msg)
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """As every raw file's: up to ``len(buffer)`` bytes, 0 at the end."""
        target = memoryview(buffer).cast("B")
        start, filled = self._position, 0
        for piece in self._pieces:
            if start < len(piece):
                chunk = piece[start : start + len(target) - filled]
                target[filled : filled + len(chunk)] = chunk
                filled += len(chunk)
            start = max(0, start - len(piece))
        self._position += filled
        return filled


class _ZlibReader(io.RawIOBase):
    """A zlib or deflate stream, unpacked as far as it is read."""

    def __init__(self, packed: Any, window_bits: int) -> None:
        self._packed = packed
        self._inflate = isal_zlib.decompressobj(window_bits)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        packed = self._inflate.unconsumed_tail
        while not self._inflate.eof:
            # isal may have taken all of its input and still hold output, which an empty input asks for
            if chunk := self._inflate.decompress(packed, len(buffer)):
                buffer[: len(chunk)] = chunk
                return len(chunk)
            packed = self._inflate.unconsumed_tail or self._packed.read1(_CHUNK_BYTES)
            if not packed and not self._inflate.eof:
                msg = "the stream ends early"
                raise EOFError(msg)
        return 0


class refuse_damage:  # noqa: N801 (reads as a statement)
    """What a library raises for damaged bytes becomes :class:`Malformed`: they are the client's. Memory is ours."""

    def __init__(self, errors: tuple[Any, ...] = _STREAM_ERRORS, message: str = _DAMAGED) -> None:
        self._errors, self._message = errors, message

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, self._errors) and not isinstance(error, MemoryError):
            raise Malformed(self._message) from None
