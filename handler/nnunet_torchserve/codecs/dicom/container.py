"""Where the files of a series come from: a zip, a tar, fields of a request, or one file; walked through from memory.

Names inside are neither opened nor looked at: they may hold a patient's name, or a path out of the archive. Every file
is found by its place. Nothing is unpacked but what is read, and a walk can be made again: the headers are read first,
the pixels when they are wanted.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import Malformed, TooLarge
from ...limits import Limits
from ..inflate import ByteSource, Compression, Payload
from ..zips import ENCRYPTED, is_zip, open_zip

TAR_HEAD_BYTES = 512
"""A block of a tar, and the first bytes by which :func:`is_tar` knows it."""

_TAR_AT, _TAR = 257, b"ustar"
DIRECTORY_BYTES = 512
"""Of one entry of a zip's directory, its name included: more than packers write."""

_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER = b"PK\x03\x04"
_PACKED = {zipfile.ZIP_STORED: Compression.NONE, zipfile.ZIP_DEFLATED: Compression.DEFLATE}
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LARGEST_EXTENSION = 64 * 1024
_CUT_OFF = "the tar is damaged or cut off"


class Stream(Protocol):
    """Bytes read front to back; a :class:`~..inflate.ByteSource`, or a part of one."""

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes, which stay to be read; fewer only at the end."""

    def skip(self, size: int) -> None:
        """Read ``size`` bytes and keep none."""

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""

    def read_exactly(self, size: int) -> npt.NDArray[np.uint8]:
        """``size`` bytes, uint8 (size,)."""

    def finish(self) -> None:
        """Read to the end, so that a checksum is verified."""


class File(Protocol):
    """One file of a container; to be read before the next one is asked for."""

    size: int

    def open(self) -> Stream:
        """At its first byte; once in a walk."""


class Container(Protocol):
    """Files, in the order in which they are stored."""

    def files(self) -> Iterator[File]:
        """A walk from the first to the last."""


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a tar, as every packer of this century writes it."""
    return head[_TAR_AT:].startswith(_TAR)


def open_container(body: Payload, limits: Limits) -> Container:
    """What the bytes are: a zip, a tar, a tar in gzip; anything else is taken for one file.

    Raises:
        Malformed, TooLarge: a zip's directory is damaged, or larger than allowed.
    """
    whole = memoryview(body)
    if is_zip(bytes(whole[:4])):
        return Zipped(whole, limits)
    if is_tar(ByteSource(whole).peek(TAR_HEAD_BYTES)):
        return Tarred(whole, limits)
    return Loose(whole)


def walk(container: Container, limits: Limits) -> Iterator[File]:
    """Every file, while their number and their bytes together stay within the limits.

    Raises:
        TooLarge: beyond them; nothing of that file has been unpacked.
    """
    total = 0
    for number, file in enumerate(container.files(), start=1):
        total += file.size
        if number > limits.dicom_files:
            msg = f"more than {limits.dicom_files} files, the limit; send one series"
            raise TooLarge(msg)
        if total > limits.expanded_bytes:
            msg = f"the files would expand to more than {limits.expanded_bytes} bytes, the limit; send one series"
            raise TooLarge(msg)
        yield file


class Several:
    """Containers one after the other: the fields of a request."""

    def __init__(self, parts: Sequence[Container]) -> None:
        self._parts = parts

    def files(self) -> Iterator[File]:
        """Those of each, one after the other."""
        for part in self._parts:
            yield from part.files()


class Loose:
    """One file, as it is."""

    def __init__(self, body: memoryview) -> None:
        self._body, self.size = body, len(body)

    def files(self) -> Iterator[File]:
        """Itself."""
        yield self

    def open(self) -> Stream:
        """Its bytes."""
        return ByteSource(self._body, Compression.NONE)


class Zipped:
    """The files of a zip."""

    def __init__(self, body: memoryview, limits: Limits) -> None:
        """Read the directory."""
        self._body = body
        archive = open_zip(body, limits.dicom_files, limits.dicom_files * DIRECTORY_BYTES)
        self._members = [info for info in archive.infolist() if not info.filename.endswith("/")]

    def files(self) -> Iterator[File]:
        """As the directory lists them.

        Raises:
            Malformed: one is encrypted, or packed by something else than deflate.
        """
        for info in self._members:
            if info.flag_bits & ENCRYPTED or info.compress_type not in _PACKED:
                msg = "a file in the zip is encrypted, or packed by something else than deflate"
                raise Malformed(msg)
            yield _ZippedFile(self._body, info)


class _ZippedFile:
    def __init__(self, body: memoryview, info: zipfile.ZipInfo) -> None:
        self.size = info.file_size
        self._body, self._info = body, info

    def open(self) -> Stream:
        info = self._info
        head = bytes(self._body[info.header_offset : info.header_offset + _LOCAL_HEADER_BYTES])
        start = info.header_offset + _LOCAL_HEADER_BYTES
        start += int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        packed = self._body[start : start + info.compress_size]
        if not head.startswith(_LOCAL_HEADER) or len(packed) != info.compress_size:
            msg = "the zip is damaged or cut off: a file is not where its directory says"
            raise Malformed(msg)
        return _Part(ByteSource(packed, _PACKED[info.compress_type], info.CRC), info.file_size)


class Tarred:
    """The files of a tar, plain or in gzip, which is unpacked as it is walked through."""

    def __init__(self, body: memoryview, limits: Limits) -> None:
        self._body, self._limits = body, limits

    def files(self) -> Iterator[File]:
        """As they are stored; directories, links and devices are none.

        Raises:
            Malformed: it is damaged, or ends early.
            TooLarge: more headers than files may be, or a file of a kind that only huge ones have.
        """
        source = ByteSource(self._body)
        for _ in range(3 * self._limits.dicom_files):  # each file may have two headers more
            block = source.read(TAR_HEAD_BYTES)
            if len(block) < TAR_HEAD_BYTES:
                raise Malformed(_CUT_OFF)
            if not any(block):
                source.finish()
                return
            entry = _tar_header(block)
            padded = -(-entry.size // TAR_HEAD_BYTES) * TAR_HEAD_BYTES
            part = _Part(source, padded)
            if entry.type in tarfile.REGULAR_TYPES and entry.type != tarfile.GNUTYPE_SPARSE:
                yield _TarredFile(part, entry.size)
            elif entry.type in _EXTENDED:
                _check_extension(part, entry.size)
            elif entry.isdev() or entry.isdir() or entry.islnk() or entry.issym():
                continue  # whatever size it has, there are no bytes
            part.finish()
        msg = f"the tar has far more than {self._limits.dicom_files} entries, the limit"
        raise TooLarge(msg)


class _TarredFile:
    def __init__(self, part: _Part, size: int) -> None:
        self.size = size
        self._part = part

    def open(self) -> Stream:
        return _Part(self._part, self.size)


class StreamFile(io.RawIOBase):
    """A stream as a file that libraries read."""

    def __init__(self, stream: Stream) -> None:
        self._packed = stream

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As every raw file's: up to ``len(buffer)`` bytes, 0 at the end."""
        chunk = self._packed.read(len(buffer))
        buffer[: len(chunk)] = chunk
        return len(chunk)


class _Part:
    """The next ``size`` bytes of a stream, as a stream."""

    def __init__(self, source: Stream, size: int) -> None:
        self._source, self._left = source, size

    def peek(self, size: int) -> bytes:
        return self._source.peek(min(size, self._left))

    def skip(self, size: int) -> None:
        self._source.skip(min(size, self._left))
        self._left -= min(size, self._left)

    def read(self, size: int) -> bytes:
        taken = self._source.read(min(size, self._left))
        self._left -= len(taken)
        return taken

    def read_exactly(self, size: int) -> npt.NDArray[np.uint8]:
        if size > self._left:
            msg = "a file ends before the last of its bytes; it seems cut off"
            raise Malformed(msg)
        self._left -= size
        return self._source.read_exactly(size)

    def finish(self) -> None:
        self.skip(self._left)
        if isinstance(self._source, ByteSource) and self._source.is_checked:
            self._source.finish()


def _tar_header(block: bytes) -> tarfile.TarInfo:
    try:
        entry = tarfile.TarInfo.frombuf(block, "latin-1", "replace")
    except tarfile.HeaderError:
        raise Malformed(_CUT_OFF) from None
    if entry.size < 0:
        raise Malformed(_CUT_OFF)
    return entry


def _check_extension(part: _Part, size: int) -> None:
    """A header in pax's form: names, times; and a size, if it does not fit where sizes stand."""
    if size > _LARGEST_EXTENSION or b" size=" in part.peek(size):
        msg = "the tar holds a file of more than 8 GiB, or far too long a name"
        raise TooLarge(msg)
