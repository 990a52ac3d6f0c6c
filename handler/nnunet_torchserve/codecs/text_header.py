"""What NRRD and MetaImage share: a text header that is not trusted, and raw voxels behind it.

nnU-Net reads both formats with SimpleITK, so ITK says what a header's geometry means. But ITK never sees a client's
header: a header can name other files as its voxels, and ITK would open them. The codecs parse the header strictly,
write the few fields of the grid anew, and ITK reads those from memory. A field that is not written anew cannot act.

Thread safety: NrrdIO, inside ITK, collects its error messages in a global without a lock, so :func:`itk_geometry`
lets one thread in at a time. It takes a fraction of a millisecond.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

from ..errors import Malformed, TooLarge, UnknownFormat
from ..limits import Limits
from .channels import series_advice, vector_advice
from .inflate import ByteSource, Compression
from .voxels import read_voxels

_ITK_LOCK = threading.Lock()

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,5})?")
_LONGEST_NUMBER = 64
"""Characters: 17 digits are exact; fixed notation of a double that is a length in mm stays below."""


def read_header(source: ByteSource, limits: Limits, is_last: Callable[[str], bool]) -> list[str]:
    """Take the header from ``source``, which then stands at the voxels.

    Args:
        source: at the header's first byte.
        limits: ``header_bytes`` and ``header_fields`` are checked here.
        is_last: whether a line is the header's last one.

    Returns:
        The lines without their ends. Latin-1: free text in any encoding passes, and fields are ASCII or wrong.

    Raises:
        Malformed: a header without an end, with a zero byte, or with a carriage return inside a line.
        TooLarge: above a limit.
    """
    window = source.peek(limits.header_bytes + 1)
    lines: list[str] = []
    start = 0
    while (end := window.find(b"\n", start, limits.header_bytes)) >= 0:
        line = window[start:end].removesuffix(b"\r").decode("latin-1")
        if "\0" in line or "\r" in line:
            msg = "the text header holds control characters; it must be lines of text"
            raise Malformed(msg)
        start = end + 1
        lines.append(line)
        if is_last(line):
            source.skip(start)
            return lines
        if len(lines) > limits.header_fields:
            msg = f"the text header has more than {limits.header_fields} lines"
            raise TooLarge(msg)
    if len(window) > limits.header_bytes:
        msg = f"the text header is longer than {limits.header_bytes} bytes"
        raise TooLarge(msg)
    msg = "the text header has no end (in NRRD an empty line): the file is cut off, or its voxels lie in another"
    raise Malformed(msg)


def add_field(fields: dict[str, str], name: str, value: str) -> None:
    """Keep a field.

    Raises:
        Malformed: it was there before.
    """
    if name in fields:
        msg = f"the header gives the field {name} more than once"
        raise Malformed(msg)
    fields[name] = value


def required(fields: dict[str, str], name: str) -> str:
    """A field's value.

    Raises:
        Malformed: the header does not have it.
    """
    if name not in fields:
        msg = f"the header has no field {name}"
        raise Malformed(msg)
    return fields[name]


def integers(name: str, text: str | Sequence[str], count: int = 1) -> list[int]:
    """The ``count`` integers of a field, as text or in words.

    Raises:
        Malformed: another number of them, or something else.
    """
    words = _words(text)
    if len(words) != count or not all(_INTEGER.fullmatch(word) for word in words):
        msg = f"the header's field {name} must be {count} integer{'s' * (count != 1)} of at most 18 digits"
        raise Malformed(msg)
    return [int(word) for word in words]


def floats(name: str, text: str | Sequence[str], count: int, *, nan: bool = False) -> list[float]:
    """The ``count`` finite numbers of a field, as text or in words.

    Args:
        name: the field's.
        text: its value.
        count: how many there must be.
        nan: ``nan`` is a number too; it means unknown.

    Raises:
        Malformed: another number of them, or something else.
    """
    words = _words(text)
    values = [_float(word, nan=nan) for word in words[: count + 1]]
    if len(values) != count or None in values:
        msg = f"the header's field {name} must be {count} finite number{'s' * (count != 1)}"
        raise Malformed(msg)
    return [value for value in values if value is not None]


def numbers_text(values: Iterable[float], separator: str = " ") -> str:
    """Numbers for a header, with the 17 digits that make a double exact."""
    return separator.join(f"{value + 0.0:.17g}" for value in values)  # + 0.0: no -0


def itk_geometry(image_io: str, header: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """What ITK makes of a header that this server wrote: spacing, origin and direction, in x, y(, z).

    Args:
        image_io: ITK's class, ``NrrdImageIO`` or ``MetaImageIO``.
        header: ASCII, with checked fields only.

    Raises:
        Malformed: ITK refuses it.
    """
    with open(os.memfd_create("header"), "wb", buffering=0) as file:  # noqa: PTH123 (a descriptor, not a path)
        file.write(header.encode("ascii"))
        reader = sitk.ImageFileReader()
        reader.SetImageIO(image_io)
        reader.SetFileName(str(Path("/proc/self/fd") / str(file.fileno())))
        try:
            with _ITK_LOCK:
                reader.ReadImageInformation()
        except RuntimeError:
            msg = (
                "ITK cannot interpret the header's geometry; give one position and one direction for every axis, "
                "in a space of as many dimensions"
            )
            raise Malformed(msg) from None
        return reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()


def unpacked(source: ByteSource, compression: Compression) -> ByteSource:
    """The voxels' bytes of a source whose header was taken.

    Raises:
        UnknownFormat: packed voxels in a packed file.
    """
    if compression is Compression.NONE:
        return source
    if source.compressed:
        msg = "the file is compressed twice; send it as it was written"
        raise UnknownFormat(msg)
    return source.rest(compression)


@dataclass(frozen=True, slots=True)
class StoredVoxels:
    """Raw voxels that wait to be read.

    Attributes:
        source: their bytes.
        dtype: type and byte order.
        sizes: along the file's axes, the fastest first.
        channel_axis: index in ``sizes`` of the channels, the first or the last; ``None`` if there is one.
    """

    source: ByteSource
    dtype: np.dtype[np.generic]
    sizes: tuple[int, ...]
    channel_axis: int | None

    def read(self) -> npt.NDArray[np.float32]:
        """Float32 (C, Z, Y, X); may be called once.

        Raises:
            Malformed: the bytes end early or their compression is damaged.
            TooLarge: far more bytes than declared.
        """
        grid = [size for axis, size in enumerate(self.sizes) if axis != self.channel_axis]
        width, height, depth = (*grid, 1)[:3]
        channels = 1 if self.channel_axis is None else self.sizes[self.channel_axis]
        shape = (channels, depth, height, width)
        return read_voxels(self.source, self.dtype, shape, channels_fastest=self.channel_axis == 0)


def stored_advice(channels: int, channel_axis: int | None, wanted: int | None = None) -> str:
    """As :mod:`.channels` has it: channels along the first axis are numbers of a voxel, along the last a series."""
    return (vector_advice if channel_axis == 0 else series_advice)(channels, wanted)


class TextHeaderSource:
    """What images with such a header have in common, as an :class:`~.source.ImageSource`."""

    nifti_header: Any | None = None
    channels: int
    _voxels: StoredVoxels

    def channels_advice(self, wanted: int) -> str:
        """What would be right for a model of so many channels."""
        return stored_advice(self.channels, self._voxels.channel_axis, wanted)

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the voxels: float32 (C, Z, Y, X); may be called once.

        Raises:
            Malformed: the bytes end early or the compressed stream is damaged.
            TooLarge: far more bytes than declared.
        """
        return self._voxels.read()


def _words(text: str | Sequence[str]) -> Sequence[str]:
    """Between ASCII white space; Latin-1 has other spaces, which ITK does not know."""
    return re.findall(r"\S+", text, re.ASCII) if isinstance(text, str) else text


def _float(word: str, *, nan: bool) -> float | None:
    if nan and word.lower() == "nan":
        return float("nan")
    if len(word) > _LONGEST_NUMBER or not _FLOAT.fullmatch(word):
        return None
    value = float(word)
    return value if np.isfinite(value) else None
