"""NumPy arrays, .npy and .npz, in and out.

They are what a Python client has at hand. An array says nothing of where it lies: that comes from the arrays
``spacing``, ``origin`` and ``direction`` of an npz, or from the request's options. NumPy reads the header and nothing
else: no pickle is ever opened, and no name inside a zip is ever a path.
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadOption, BadSpacing, Malformed, TooLarge, UnknownFormat, WrongChannels
from ..limits import Limits
from ..options import OutputFormat
from ..volume import LabelMap, Placement
from .channels import array_advice
from .geometry import check_size, place
from .inflate import SLACK_BYTES, ByteSource
from .zips import ENCRYPTED, open_zip, refuse_damaged_zip

_NPY_MAGIC = b"\x93NUMPY"
_ENDING = ".npy"

_LENGTH_FIELD = {1: "<H", 2: "<I", 3: "<I"}
"""How an npy file of each major version stores the length of its header."""

_LONGEST_HEADER = 10_000
"""NumPy's own bound: what it evaluates as a Python literal shall not be long."""

_HEADER_ERRORS = (
    ValueError, TypeError, LookupError, SyntaxError, OverflowError, RecursionError, MemoryError, tokenize.TokenError,
)  # fmt: skip
"""What ``ast.literal_eval`` and NumPy raise for a header that is none."""

_GEOMETRY_KEYS = ("spacing", "origin", "direction")
_MOST_NUMBERS = 9
"""Of a geometry array: a 3×3 direction."""

_CHUNK_BYTES = 1024**2


def is_npy(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a .npy."""
    return head.startswith(_NPY_MAGIC)


def holds_arrays(archive: zipfile.ZipFile) -> bool:
    """Whether a zip is an .npz."""
    return any(name.endswith(_ENDING) for name in archive.namelist())


@dataclass(frozen=True, slots=True)
class _Header:
    """What stands before the numbers of a .npy.

    Attributes:
        size: its bytes, with the magic.
        shape: of the array, as stored.
        fortran_order: whether the first axis varies fastest.
        dtype: an integer, a float or bool, of at most 8 bytes, in either byte order.
    """

    size: int
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]

    @property
    def data_bytes(self) -> int:
        """Of the numbers that follow."""
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, raw: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """The numbers from their bytes, uint8 (data_bytes,), without a copy."""
        return raw.view(self.dtype).reshape(self.shape, order="F" if self.fortran_order else "C")


class ArraySource:
    """One array, as an :class:`~.source.ImageSource`."""

    nifti_header = None
    native_format = OutputFormat.NPZ

    def __init__(
        self, header: _Header, placement: Placement | None, limits: Limits, fetch: Callable[[], npt.NDArray[np.uint8]]
    ) -> None:
        """Check the header; ``fetch`` gives the bytes of the numbers, uint8 (data_bytes,)."""
        self._header, self._fetch = header, fetch
        self.channels, shape = _image_shape(header.shape)
        check_size(shape, self.channels, header.dtype.itemsize, limits, array_advice(header.shape, None))
        if placement is None:
            msg = "an array has no voxel spacing of its own; give option spacing, mm along x, y, z (one slice: x, y)"
            raise BadSpacing(msg)
        self.geometry = place(shape, placement)

    def channels_advice(self, wanted: int) -> str:
        """What would be right for a model of so many channels."""
        return array_advice(self._header.shape, wanted)

    def read(self) -> npt.NDArray[np.float32]:
        """The numbers as float32 (C, Z, Y, X); may be called once.

        Raises:
            Malformed: they end early, or their checksum is wrong.
            TooLarge: far more bytes than declared.
        """
        stored = self._header.array(self._fetch())
        with np.errstate(over="ignore", invalid="ignore"):
            voxels = np.asarray(stored, np.float32)
        return np.ascontiguousarray(voxels.reshape(self.channels, *self.geometry.shape))


@dataclass(frozen=True, slots=True)
class Placements:
    """Who may say where an array lies.

    Attributes:
        asked: the request.
        default: what holds where neither it nor the file does.
    """

    asked: Placement | None = None
    default: Placement | None = None


def open_npy(source: ByteSource, limits: Limits, where: Placements) -> ArraySource:
    """An array in .npy: (Y, X), (Z, Y, X), or (C, Z, Y, X) as nnU-Net has it.

    Args:
        source: at the start of the file; nothing has been read from it.
        limits: what is allowed.
        where: it lies.

    Raises:
        UnknownFormat: numbers of a type that is no image's.
        Malformed, TooLarge, BadSpacing, WrongChannels: the header says so.
    """
    header = _read_header(source.peek, limits)

    def fetch() -> npt.NDArray[np.uint8]:
        source.skip(header.size)
        raw = source.read_exactly(header.data_bytes)
        source.finish()
        return raw

    return ArraySource(header, where.asked or where.default, limits, fetch)


def open_npz(
    body: memoryview, limits: Limits, where: Placements, names: tuple[str, ...] = ("image", "data")
) -> ArraySource:
    """The image of an .npz: the array with one of the names, or the only one.

    ``spacing``, ``origin`` and ``direction`` beside it say where it lies, as SimpleITK gives them and as the answers
    of this server hold them.

    Args:
        body: the file.
        limits: what is allowed; ``header_bytes`` and ``header_fields`` bound the zip's directory.
        where: it lies; the request may say it only of an npz that does not.
        names: of the array.

    Raises:
        BadOption: the file and the request both say where the array lies.
        UnknownFormat: a zip without arrays, or numbers of a type that is no image's.
        Malformed, TooLarge, BadSpacing, WrongChannels: the directory or a header says so.
    """
    archive = _Archive(body, limits)
    name = _image_name(archive.names, names)
    inside = [key for key in _GEOMETRY_KEYS if key in archive.names]
    if inside and "spacing" not in inside:
        msg = f"the npz holds {', '.join(inside)} and no spacing; put spacing (mm along x, y, z) into it too"
        raise BadSpacing(msg)
    placement = where.asked or where.default
    if inside and where.asked is not None:
        msg = f"the npz holds {', '.join(inside)} and the options say where the array lies too; send one of them"
        raise BadOption(msg)
    if "spacing" in inside:
        numbers = {key: archive.numbers(key) for key in inside}
        placement = Placement(numbers["spacing"], numbers.get("origin"), numbers.get("direction"))
    header = archive.header(name)
    return ArraySource(header, placement, limits, lambda: archive.data(name, header))


def encode_npz(answer: LabelMap, *, with_labels: bool) -> bytes:
    """An answer as .npz: the same bytes for the same answer.

    Args:
        answer: its probabilities, where it has them, go in with the numbers of their channels; they are not worth
            compressing.
        with_labels: whether the label map goes in.
    """
    geometry = answer.geometry.in_space()
    ndim = geometry.ndim
    arrays = {
        "spacing": np.array(geometry.spacing[:ndim]),
        "origin": np.array(geometry.origin[:ndim]),
        "direction": geometry.direction[:ndim, :ndim],
    }
    if with_labels:
        arrays["labels"] = answer.array
    if answer.probabilities is not None:
        arrays["probabilities"] = answer.probabilities
        arrays["channels"] = np.array(answer.channels)
    file = io.BytesIO()
    save = np.savez_compressed if answer.probabilities is None else np.savez
    save(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _image_shape(shape: tuple[int, ...]) -> tuple[int, tuple[int, int, int]]:
    """Channels, and voxels along z, y, x."""
    match shape:
        case (height, width):
            return 1, (1, height, width)
        case (depth, height, width):
            return 1, (depth, height, width)
        case (channels, depth, height, width):
            return channels, (depth, height, width)
    msg = f"an array of {len(shape)} dimensions; send (y, x), (z, y, x) or (channel, z, y, x)"
    if len(shape) == 5 and shape[0] == 1:
        msg += ", without an axis of the batch: array[0]"
    if len(shape) < 2:
        raise Malformed(msg)
    raise WrongChannels(msg)


def _read_header(peek: Callable[[int], bytes], limits: Limits) -> _Header:
    """The header of a .npy, from its first bytes.

    Args:
        peek: gives the first bytes of the file; fewer only at its end.
        limits: ``header_bytes``.
    """
    start = peek(len(_NPY_MAGIC) + 6)
    field = _LENGTH_FIELD.get(start[6]) if len(start) >= len(_NPY_MAGIC) + 6 else None
    if not is_npy(start) or field is None:
        msg = "the array's npy header is damaged, cut off or of an unknown version"
        raise Malformed(msg)
    text_start = len(_NPY_MAGIC) + 2 + struct.calcsize(field)
    (text_bytes,) = struct.unpack_from(field, start, len(_NPY_MAGIC) + 2)
    longest = min(limits.header_bytes, _LONGEST_HEADER)
    if text_bytes > longest:
        msg = f"the array's npy header has {text_bytes} bytes; this server takes at most {longest}"
        raise TooLarge(msg)
    size = text_start + text_bytes
    file = io.BytesIO(peek(size))
    file.seek(len(_NPY_MAGIC) + 2)
    # Version 3.0 is 2.0 with names of fields in UTF-8, and arrays with fields are refused.
    read = np.lib.format.read_array_header_1_0 if field == "<H" else np.lib.format.read_array_header_2_0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files, of Python 2 and of types that NumPy spells otherwise now
            shape, fortran_order, dtype = read(file, max_header_size=longest)
    except _HEADER_ERRORS:
        msg = "the array's npy header is damaged or cut off"
        raise Malformed(msg) from None
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        msg = "an array of this type is no image; send integers, floats of at most 64 bits, or bool"
        raise UnknownFormat(msg)
    if any(n < 0 for n in shape):  # numbers of any length, which Python may refuse to print
        msg = "the array's npy header declares a negative axis"
        raise Malformed(msg)
    if any(n > limits.voxels for n in shape):
        msg = f"the array's npy header declares an axis of more than {limits.voxels} numbers, the limit"
        raise TooLarge(msg)
    return _Header(size, tuple(int(n) for n in shape), bool(fortran_order), dtype)


def _image_name(names: list[str], usual: tuple[str, ...]) -> str:
    """Which of the arrays is the image."""
    named = [name for name in names if name in usual]
    candidates = named or [name for name in names if name not in _GEOMETRY_KEYS]
    if len(candidates) != 1:
        beside = ", ".join(_GEOMETRY_KEYS)
        msg = f"{len(candidates)} arrays of the npz could be the image; name it {' or '.join(usual)}, beside {beside}"
        raise Malformed(msg)
    return candidates[0]


class _Archive:
    """The arrays of an npz by name; each is unpacked no further than its own header says."""

    def __init__(self, body: memoryview, limits: Limits) -> None:
        self._limits = limits
        self._zip = open_zip(body, limits.header_fields, limits.header_bytes)
        arrays = [info for info in self._zip.infolist() if info.filename.endswith(_ENDING)]
        self._members = {info.filename.removesuffix(_ENDING): info for info in arrays}
        if not arrays:
            msg = "a zip without any array (.npy); send the .npz that numpy.savez writes, or unpack it"
            raise UnknownFormat(msg)
        if len(self._members) != len(arrays):
            msg = "the npz holds two arrays of the same name"
            raise Malformed(msg)
        self.names = list(self._members)

    def header(self, name: str) -> _Header:
        """Of one array; its size and packing are checked against the zip's directory."""
        info = self._members[name]
        if info.flag_bits & ENCRYPTED or info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            msg = "an array in the npz is encrypted or packed in a way that numpy.savez does not use"
            raise Malformed(msg)

        def peek(size: int) -> bytes:
            with refuse_damaged_zip(), self._zip.open(info) as member:
                return member.read(size)

        header = _read_header(peek, self._limits)
        if info.file_size < header.size + header.data_bytes:
            msg = "an array in the npz ends early; it seems cut off"
            raise Malformed(msg)
        if info.file_size > header.size + header.data_bytes + SLACK_BYTES:
            msg = "far more data follows an array in the npz than its header declares"
            raise TooLarge(msg)
        return header

    def data(self, name: str, header: _Header) -> npt.NDArray[np.uint8]:
        """The bytes of one array's numbers, uint8 (data_bytes,); its checksum is verified."""
        raw = np.empty(header.data_bytes, np.uint8)
        filled = 0
        with refuse_damaged_zip(), self._zip.open(self._members[name]) as member:
            member.read(header.size)
            while chunk := member.read(_CHUNK_BYTES):  # to the end, where the checksum is compared
                kept = np.frombuffer(chunk, np.uint8)[: raw.size - filled]
                raw[filled : filled + kept.size] = kept
                filled += kept.size
        if filled != raw.size:
            msg = "an array in the npz ends early; it seems cut off"
            raise Malformed(msg)
        return raw

    def numbers(self, name: str) -> tuple[float, ...]:
        """A small array, row by row."""
        header = self.header(name)
        count = math.prod(header.shape)
        if count > _MOST_NUMBERS or not header.shape:
            msg = f"{name} in the npz has shape {header.shape}; 2 or 3 numbers were expected, for direction 4 or 9"
            raise Malformed(msg)
        return tuple(float(number) for number in header.array(self.data(name, header)).ravel())
