"""A zip's directory, bounded before anything reads it: names in it are compared, never opened."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

from ..errors import Malformed, TooLarge
from .inflate import MemoryFile, refuse_damage

ENCRYPTED = 1
"""Bit of a member's flags."""

_MAGIC = b"PK\x03\x04"

_END_RECORD = struct.Struct("<4s4H2LH")
"""ZIP's end of central directory: signature, four counts, the directory's size and offset, the comment's length."""

_END = b"PK\x05\x06"
_LONGEST_COMMENT = 2**16 - 1
_ZIP64_LOCATOR_BYTES = 20
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError,
)  # fmt: skip
"""What zipfile raises for archives that are damaged, encrypted or newer than it knows."""


def is_zip(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a zip, as every .npz is."""
    return head.startswith(_MAGIC)


def refuse_damaged_zip() -> refuse_damage:
    """What zipfile raises becomes :class:`Malformed`."""
    return refuse_damage(_ZIP_ERRORS, "the zip is damaged, cut off or encrypted")


def open_zip(body: memoryview, entries: int, directory_bytes: int) -> zipfile.ZipFile:
    """The directory of a zip.

    A comment may follow, as Orthanc writes one. zipfile gets the file without it, so that it takes the record that was
    looked at here, whatever the comment holds.

    Args:
        body: the file.
        entries: the most that are allowed.
        directory_bytes: the most that they may take.

    Raises:
        Malformed: it is damaged or cut off.
        TooLarge: more of them.
    """
    end = _end_record(body)
    *_, found, found_bytes, _offset, comment = _END_RECORD.unpack_from(body, end)
    if end + _END_RECORD.size + comment != len(body):
        msg = "the zip is cut off, or something follows its directory; send it as numpy.savez or a packer writes it"
        raise Malformed(msg)
    if bytes(body[max(0, end - _ZIP64_LOCATOR_BYTES) : end]).startswith(b"PK\x06\x07"):
        msg = "a zip64 archive; below 4 GiB and 65,535 files none is needed"
        raise TooLarge(msg)
    if found > entries or found_bytes > directory_bytes:
        msg = f"the zip's directory has {found} entries in {found_bytes} bytes; this server takes at most {entries} in "
        msg += f"{directory_bytes} bytes"
        raise TooLarge(msg)
    with refuse_damaged_zip():
        return zipfile.ZipFile(io.BufferedReader(MemoryFile(body[: end + _END_RECORD.size])))


def _end_record(body: memoryview) -> int:
    """Where the last end of a directory begins: at the very end, or before a comment."""
    end = len(body) - _END_RECORD.size
    if end >= 0 and bytes(body[end : end + 4]) == _END and bytes(body[-2:]) == b"\0\0":
        return end
    first = max(0, end - _LONGEST_COMMENT)
    found = bytes(body[first:]).rfind(_END)
    if found < 0 or first + found > end:
        msg = "the zip is cut off"
        raise Malformed(msg)
    return first + found
