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
_DUMPED_FOLDER, _VOLUME_LABEL = b"D", b"V"
_NO_FILE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, _DUMPED_FOLDER, _VOLUME_LABEL)
"""Entries with bytes that are no file's."""
_CHUNK_BYTES = 64 * 1024
_LARGEST_EXTENSION = 64 * 1024
_CUT_OFF = "the tar is damaged or cut off"
_ODD_FILE = "the tar holds a file that is packed as sparse, or goes on from another tar; pack the whole series plainly"


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


class Meter:
    """Bytes that a walk may still unpack; whoever unpacks some, or is about to, counts them here first."""

    def __init__(self, limits: Limits) -> None:
        self._limit = self._left = limits.expanded_bytes

    def take(self, size: int) -> None:
        """Count bytes; raises :class:`TooLarge` when there are too many."""
        self._left -= size
        if self._left < 0:
            msg = f"the files would expand to more than {self._limit} bytes, the limit; send one series"
            raise TooLarge(msg)


class Container(Protocol):
    """Files, in the order in which they are stored."""

    def files(self, meter: Meter) -> Iterator[File]:
        """A walk from the first to the last, each counted before it is unpacked, and what lies between them too."""


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


def walk(container: Container, limits: Limits, meter: Meter) -> Iterator[File]:
    """Every file, while their number and their bytes together stay within the limits.

    Args:
        container: the files.
        limits: what is allowed.
        meter: a new one for each walk.

    Raises:
        TooLarge: beyond them; nothing of that file has been unpacked.
    """
    for number, file in enumerate(container.files(meter), start=1):
        if number > limits.dicom_files:
            msg = f"more than {limits.dicom_files} files, the limit; send one series"
            raise TooLarge(msg)
        yield file


class Several:
    """Containers one after the other: the fields of a request."""

    def __init__(self, parts: Sequence[Container]) -> None:
        self._parts = parts

    def files(self, meter: Meter) -> Iterator[File]:
        """Those of each, one after the other."""
        for part in self._parts:
            yield from part.files(meter)


class Loose:
    """One file, as it is."""

    def __init__(self, body: memoryview) -> None:
        self._body, self.size = body, len(body)

    def files(self, meter: Meter) -> Iterator[File]:
        """Itself."""
        meter.take(self.size)
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

    def files(self, meter: Meter) -> Iterator[File]:
        """As the directory lists them.

        Raises:
            Malformed: one is encrypted, or packed by something else than deflate.
        """
        for info in self._members:
            if info.flag_bits & ENCRYPTED or info.compress_type not in _PACKED:
                msg = "a file in the zip is encrypted, or packed by something else than deflate"
                raise Malformed(msg)
            meter.take(info.file_size)
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

    def files(self, meter: Meter) -> Iterator[File]:
        """As they are stored; directories and devices are none. What a link leads to is not here: an empty file.

        Raises:
            Malformed: it is damaged, ends early, or has anything but zeros behind its end: another tar, whose slices
                would be lost; or holds a file in a form that is not read: sparse, or the rest of one of another tar.
            TooLarge: more headers than files may be, or a file of a kind that only huge ones have.
        """
        source = ByteSource(self._body)
        for _ in range(3 * self._limits.dicom_files):  # each file may have two headers more
            block = source.read(TAR_HEAD_BYTES)
            if len(block) < TAR_HEAD_BYTES:
                raise Malformed(_CUT_OFF)
            meter.take(TAR_HEAD_BYTES)
            if not any(block):
                _check_end(source, meter)
                return
            entry = _tar_header(block)
            padded = -(-entry.size // TAR_HEAD_BYTES) * TAR_HEAD_BYTES
            if entry.issym():
                yield _TarredFile(_Part(source, 0), 0)
            if entry.isdev() or entry.isdir() or entry.islnk() or entry.issym():
                continue  # whatever size it has, there are no bytes; a hard link's file came before
            meter.take(padded)
            part = _Part(source, padded)
            if entry.type in tarfile.REGULAR_TYPES and entry.type != tarfile.GNUTYPE_SPARSE:
                yield _TarredFile(part, entry.size)
            elif entry.type in _EXTENDED:
                _check_extension(part, entry.size)
            elif entry.type not in _NO_FILE:
                raise Malformed(_ODD_FILE)
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

    def __init__(self, stream: Stream, meter: Meter | None = None) -> None:
        """``meter``: counts what is read, if that has not been counted."""
        self._packed, self._meter = stream, meter

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As every raw file's: up to ``len(buffer)`` bytes, 0 at the end."""
        chunk = self._packed.read(len(buffer))
        if self._meter is not None:
            self._meter.take(len(chunk))
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


def _check_end(source: ByteSource, meter: Meter) -> None:
    """After a tar's first block of zeros there are only zeros; a packer's own end is two blocks and some more."""
    while chunk := source.read(_CHUNK_BYTES):
        meter.take(len(chunk))
        if any(chunk):
            msg = "the tar goes on after its own end, as several do that were put one after the other; send one archive"
            raise Malformed(msg)
    source.finish()


def _tar_header(block: bytes) -> tarfile.TarInfo:
    try:
        entry = tarfile.TarInfo.frombuf(block, "latin-1", "replace")
    except tarfile.HeaderError:
        raise Malformed(_CUT_OFF) from None
    if entry.size < 0:
        raise Malformed(_CUT_OFF)
    return entry


def _check_extension(part: _Part, size: int) -> None:
    """A header in pax's form: names, times; a size, if it does not fit where sizes stand; that a file is sparse."""
    if size > _LARGEST_EXTENSION or b" size=" in (said := part.peek(size)):
        msg = "the tar holds a file of more than 8 GiB, or far too long a name"
        raise TooLarge(msg)
    if b" GNU.sparse." in said:
        raise Malformed(_ODD_FILE)
