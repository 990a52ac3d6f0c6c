"""NRRD with attached voxels, versions 1 to 5, from memory to memory.

Voxels and geometry are what SimpleITK, and so nnU-Net, reads from the same file; see :mod:`.text_header` for how. As
ITK does, units and the measurement frame are not looked at, and directions in a space other than RAS, LAS or LPS are
taken as LPS. Stricter than ITK: a file must say its spacing (ITK would take 1 mm), and only its own bytes are read.
An axis of channels (kind ``list`` or ``vector``, or no space direction) may come first or last. In a space of four
dimensions, in which ITK writes a series that it joined, the last axis is that of the channels, as nnU-Net takes it.

Answers are written here and not by ITK's writer, which works in memory but takes several times as long for the same
size (``benchmarks/results/codecs.json``). The header is ITK's own.

Format: https://teem.sourceforge.net/nrrd/format.html
"""

from __future__ import annotations

import math
import re

import numpy as np

from ..errors import BadSpacing, Malformed, UnknownFormat, WrongChannels
from ..limits import Limits
from ..options import OutputFormat
from ..volume import Geometry, LabelArray
from .geometry import LARGEST_MM, SMALLEST_MM, check_size, make_geometry, mixes_channels
from .inflate import ByteSource, Compression, gzipped
from .text_header import (
    StoredVoxels,
    TextHeaderSource,
    add_field,
    floats,
    integers,
    itk_geometry,
    numbers_text,
    read_header,
    required,
    stored_advice,
    unpacked,
)

_MAGIC = re.compile(rb"NRRD000[1-5]")
_FIELDS = (
    "content", "number", "type", "block size", "dimension", "space", "space dimension", "sizes", "spacings",
    "thicknesses", "axis mins", "axis maxs", "space directions", "centers", "kinds", "labels", "units", "min", "max",
    "old min", "old max", "endian", "encoding", "line skip", "byte skip", "sample units", "space units",
    "space origin", "measurement frame", "data file",
)  # fmt: skip
_FIELD_OF = {
    **{name: name for name in _FIELDS},
    **{name.replace(" ", ""): name for name in _FIELDS},
    "centerings": "centers",
}
"""Both spellings of each field, in lower case (case does not count), to its name."""

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}  # fmt: skip
_TYPE_OF = {name: code for code, names in _TYPES.items() for name in names}

_COMPRESSION_OF = {
    "raw": Compression.NONE,
    "gz": Compression.GZIP,
    "gzip": Compression.GZIP,
    "bz2": Compression.BZIP2,
    "bzip2": Compression.BZIP2,
}

_SPACE_OF = {
    **dict.fromkeys(
        ("right-anterior-superior", "right anterior superior", "rightanteriorsuperior", "ras"),
        "right-anterior-superior",
    ),
    **dict.fromkeys(
        ("left-anterior-superior", "left anterior superior", "leftanteriorsuperior", "las"), "left-anterior-superior"
    ),
    **dict.fromkeys(
        ("left-posterior-superior", "left posterior superior", "leftposteriorsuperior", "lps"),
        "left-posterior-superior",
    ),
    "scanner-xyz": "scanner-xyz",
    **dict.fromkeys(("3d-right-handed", "3d right handed", "3drighthanded"), "3D-right-handed"),
    **dict.fromkeys(("3d-left-handed", "3d left handed", "3dlefthanded"), "3D-left-handed"),
}

_SPACES_WITH_TIME = {
    **dict.fromkeys(
        ("left-posterior-superior-time", "left posterior superior time", "leftposteriorsuperiortime", "lpst"),
        "left-posterior-superior",
    ),
    "scanner-xyz-time": "scanner-xyz",
    **dict.fromkeys(("3d-right-handed-time", "3d right handed time", "3drighthandedtime"), "3D-right-handed"),
    **dict.fromkeys(("3d-left-handed-time", "3d left handed time", "3dlefthandedtime"), "3D-left-handed"),
}
"""Spaces of four dimensions, and what their first three are. ITK takes RAS and LAS with a time axis as LPS, against the
format's definition: they are left out."""

_UNKNOWN_KINDS = frozenset({"???", "none"})
_GRID_KINDS = frozenset({"domain", "space", "time"})
_KINDS_OF_SIZE = {
    "scalar": 1, "stub": 1, "2-vector": 2, "3-vector": 3, "4-vector": 4, "3-color": 3, "rgb-color": 3, "4-color": 4,
    "rgba-color": 4,
}  # fmt: skip
_CHANNEL_KINDS = frozenset({"list", "vector", "covariant-vector", "contravariant-vector", *_KINDS_OF_SIZE})
_CENTERS = frozenset({"cell", "node", "???", "none"})

_VECTOR = re.compile(r"\s*(?:(none)(?=\s|$)|\(([^()]*)\))")
_MOST_AXES = 4
_SPACES = {2, 3, _MOST_AXES}
"""Dimensions of a space."""

_Vector = list[float]


def is_nrrd(head: bytes) -> bool:
    """Whether a file begins like NRRD."""
    return _MAGIC.match(head) is not None


class NrrdSource(TextHeaderSource):
    """One NRRD image, as an :class:`~.source.ImageSource`."""

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        """Read the header; the voxels stay packed.

        Args:
            source: at the file's first byte.
            limits: voxels and expanded bytes are checked here.

        Raises:
            Malformed, TooLarge, UnknownFormat, BadSpacing, WrongChannels: see :mod:`..errors`.
        """
        lines = read_header(source, limits, is_last=lambda line: not line)
        fields = _parse(lines)
        axes = _Axes(fields)
        dtype = _dtype(fields)
        compression = _compression(fields)
        self.channels = 1 if axes.channel is None else axes.sizes[axes.channel]
        shape = [axes.sizes[axis] for axis in axes.grid][::-1]
        check_size(shape, self.channels, dtype.itemsize, limits, stored_advice(self.channels, axes.channel))
        spacing, origin, direction = itk_geometry("NrrdImageIO", axes.header())
        self.geometry = make_geometry(shape, spacing, origin, direction)
        self.native_format = OutputFormat.NRRD
        self._voxels = StoredVoxels(unpacked(source, compression), dtype, tuple(axes.sizes), axes.channel)


def encode_nrrd(array: LabelArray, geometry: Geometry) -> bytes:
    """A label map (Z, Y, X), uint8 or uint16, as an NRRD file with gzip encoding, in LPS.

    Where ``geometry.ndim`` is 2 it is a 2-D file, as nnU-Net writes it.
    """
    ndim = geometry.ndim
    columns = geometry.affine[:ndim, :ndim].T
    vectors = [f"({numbers_text(column, ',')})" for column in columns]
    lines = [
        "NRRD0004",
        f"type: {'unsigned char' if array.dtype.itemsize == 1 else 'unsigned short'}",
        f"dimension: {ndim}",
        "space: left-posterior-superior" if ndim == 3 else f"space dimension: {ndim}",
        f"sizes: {' '.join(str(size) for size in geometry.shape[: -ndim - 1 : -1])}",
        f"space directions: {' '.join(vectors)}",
        f"kinds: {' '.join(['domain'] * ndim)}",
        *(["endian: little"] if array.dtype.itemsize > 1 else []),
        "encoding: gzip",
        f"space origin: ({numbers_text(geometry.origin[:ndim], ',')})",
    ]
    voxels = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return "\n".join([*lines, "", ""]).encode("ascii") + gzipped(voxels.data)


class _Axes:
    """The fields that say what the axes are, checked, with the axis of channels told from the grid.

    Attributes:
        sizes: of all axes, the fastest first.
        grid: indices of the two or three axes in space.
        channel: index of the axis of channels, or ``None``.
    """

    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields
        (self.dimension,) = integers("dimension", required(fields, "dimension"))
        if not 2 <= self.dimension <= _MOST_AXES:
            msg = f"an array of {self.dimension} dimensions; send 2-D or 3-D images, or those with one axis of channels"
            raise WrongChannels(msg)
        self.sizes = integers("sizes", required(fields, "sizes"), self.dimension)
        self._kinds = self._words("kinds", _UNKNOWN_KINDS | _GRID_KINDS, "kinds of axes")
        self._space, self._space_dimension = self._read_space()
        self._directions = self._vectors("space directions", self.dimension)
        if self._space_dimension == _MOST_AXES:
            self._directions = self._first_three(self._directions)
        self.channel = self._find_channel()
        self.grid = [axis for axis in range(self.dimension) if axis != self.channel]
        if not 2 <= len(self.grid) <= 3:
            msg = f"{len(self.grid)} axes in space; 2 or 3 and one axis of channels were expected"
            raise WrongChannels(msg)

    def header(self) -> str:
        """A header of the grid alone, for ITK: its fields in the order that NrrdIO needs."""
        lines = [
            "NRRD0005", "type: unsigned char", "encoding: raw",
            f"dimension: {len(self.grid)}",
            f"sizes: {' '.join(str(self.sizes[axis]) for axis in self.grid)}",
        ]  # fmt: skip
        lines += [self._space] if self._space else []
        spacings = self._per_axis("spacings")
        if self._directions:
            vectors = [self._directions[axis] or [] for axis in self.grid]
            lengths = [math.hypot(*vector) for vector in vectors]
            if not all(SMALLEST_MM <= length <= LARGEST_MM for length in lengths):
                # ITK would take 1 mm for a length whose square overflows.
                msg = f"space directions of length {lengths}; positive ones of at most {LARGEST_MM:g} were expected"
                raise BadSpacing(msg)
            lines.append("space directions: " + " ".join(f"({numbers_text(each, ',')})" for each in vectors))
        elif spacings is None or any(math.isnan(spacing) for spacing in spacings):
            msg = "the header gives no voxel spacing; write space directions, or spacings in mm for every axis"
            raise BadSpacing(msg)
        if spacings is not None:
            lines.append(f"spacings: {numbers_text(spacings)}")
        mins = self._per_axis("axis mins")
        if mins is not None and any(math.isnan(low) for low in mins) != all(math.isnan(low) for low in mins):
            msg = "the header's axis mins are known for some axes only"
            raise Malformed(msg)
        if mins is not None:
            lines.append(f"axis mins: {numbers_text(mins)}")
        if centers := self._words("centers", _CENTERS, "cell or node"):
            lines.append("centers: " + " ".join(centers[axis] for axis in self.grid))
        if (origin := self._vectors("space origin", 1)) and origin[0]:
            in_space = min(self._space_dimension, _MOST_AXES - 1)
            lines.append(f"space origin: ({numbers_text(origin[0][:in_space], ',')})")
        return "\n".join([*lines, "", ""])

    def _find_channel(self) -> int | None:
        """The axis that is not in space: by its kind, by its missing direction, or the last of four."""
        found = {axis for axis, kind in enumerate(self._kinds) if kind in _CHANNEL_KINDS}
        found |= {axis for axis, vector in enumerate(self._directions) if vector is None}
        if self._space_dimension == _MOST_AXES or (not found and self.dimension == _MOST_AXES and not self._space):
            found.add(_MOST_AXES - 1)
        if len(found) > 1:
            msg = f"{len(found)} axes are not in space; at most one axis of channels was expected"
            raise WrongChannels(msg)
        if not found:
            return None
        (channel,) = found
        if channel not in {0, self.dimension - 1}:
            msg = "the axis of channels lies between those in space; it must be the first or the last"
            raise WrongChannels(msg)
        kind = self._kinds[channel] if self._kinds else ""
        if kind in _KINDS_OF_SIZE and self.sizes[channel] != _KINDS_OF_SIZE[kind]:
            msg = f"an axis of kind {kind} must have size {_KINDS_OF_SIZE[kind]}"
            raise Malformed(msg)
        return channel

    def _first_three(self, directions: list[_Vector | None]) -> list[_Vector | None]:
        """Directions of a space of four dimensions whose fourth is that of the channels, in the space of the others."""
        if directions and mixes_channels([vector or [0.0] * _MOST_AXES for vector in directions]):
            msg = "the header's space directions mix the axis of channels with those in space"
            raise Malformed(msg)
        return [vector and vector[:-1] for vector in directions[:-1]] + directions[-1:]

    def _read_space(self) -> tuple[str, int]:
        """The line for ITK and the number of dimensions, 0 without a space."""
        line, dimensions = self._space_and_dimensions()
        if dimensions == _MOST_AXES != self.dimension:
            msg = f"an array of {self.dimension} dimensions in a space of {dimensions}, which has as many axes"
            raise UnknownFormat(msg)
        return line, dimensions

    def _space_and_dimensions(self) -> tuple[str, int]:
        if "space" in self._fields and "space dimension" in self._fields:
            msg = "the header gives a space and a space dimension; one of them was expected"
            raise Malformed(msg)
        if "space dimension" in self._fields:
            (dimensions,) = integers("space dimension", self._fields["space dimension"])
            if dimensions not in _SPACES:
                msg = f"a space of {dimensions} dimensions; 2 or 3 were expected, or 4 with the channels last"
                raise UnknownFormat(msg)
            return f"space dimension: {min(dimensions, 3)}", dimensions
        if "space" in self._fields:
            name = self._fields["space"].lower()
            if name in _SPACES_WITH_TIME:
                return f"space: {_SPACES_WITH_TIME[name]}", _MOST_AXES
            if name not in _SPACE_OF:
                msg = (
                    "the header's space is none that is known, or one whose time axis readers disagree about; "
                    "write left-posterior-superior"
                )
                raise UnknownFormat(msg)
            return f"space: {_SPACE_OF[name]}", 3
        return "", 0

    def _words(self, name: str, known: frozenset[str], expected: str) -> list[str]:
        """One word of ``known`` for each axis, in lower case; none if the header does not have the field."""
        if name not in self._fields:
            return []
        words = self._fields[name].lower().split()
        if len(words) != self.dimension:
            msg = f"the header's field {name} must have {self.dimension} entries"
            raise Malformed(msg)
        if name == "kinds" and not known.union(_CHANNEL_KINDS).issuperset(words):
            msg = "an axis holds matrices, complex numbers or the like; send channels, as a list, of one number each"
            raise WrongChannels(msg)
        if name != "kinds" and not known.issuperset(words):
            msg = f"the header's field {name} must be {expected} for each axis"
            raise Malformed(msg)
        return words

    def _per_axis(self, name: str) -> list[float] | None:
        """A number for each axis of the grid; ``nan`` where it is unknown."""
        if name not in self._fields:
            return None
        values = floats(name, self._fields[name], self.dimension, nan=True)
        return [values[axis] for axis in self.grid]

    def _vectors(self, name: str, count: int) -> list[_Vector | None]:
        """``count`` vectors in space, ``None`` for those that are ``none``; empty without the field.

        NaN in place of every number is an older spelling of ``none``.
        """
        if name not in self._fields:
            return []
        if not self._space:
            msg = f"the header has {name} but no space; write space: left-posterior-superior, or the one meant"
            raise Malformed(msg)
        text, position = self._fields[name], 0
        vectors: list[_Vector | None] = []
        while len(vectors) <= count and (found := _VECTOR.match(text, position)):
            position = found.end()
            if found[1]:
                vectors.append(None)
                continue
            vector = floats(name, [word.strip() for word in found[2].split(",")], self._space_dimension, nan=True)
            unknown = [math.isnan(value) for value in vector]
            if any(unknown) != all(unknown):
                msg = f"the header's {name} must be finite"
                raise Malformed(msg)
            vectors.append(None if all(unknown) else vector)
        if len(vectors) != count or text[position:].strip():
            msg = f"the header's field {name} must be {count} vectors such as (1,0,0), or none"
            raise Malformed(msg)
        return vectors


def _parse(lines: list[str]) -> dict[str, str]:
    """The fields by their names in the specification; comments and key/value pairs are dropped."""
    if not re.fullmatch(r"NRRD000[1-5]", lines[0]):
        msg = "no NRRD file of version 1 to 5"
        raise UnknownFormat(msg)
    fields: dict[str, str] = {}
    for line in lines[1:-1]:
        if line.startswith("#"):
            continue
        before, colon, value = line.partition(": ")
        if not colon and line.endswith(":"):
            before, colon = line[:-1], ":"
        name = _FIELD_OF.get(before.lower()) if colon else None
        if name is None and ":=" in before:
            continue
        if name is None:
            msg = "the header has a line that is no NRRD field, key/value pair or comment"
            raise Malformed(msg)
        add_field(fields, name, value.strip())
    _check_kind(fields)
    return fields


def _check_kind(fields: dict[str, str]) -> None:
    """Refuse what has not its voxels, one number each, right behind the header."""
    if "data file" in fields:
        msg = "the voxels lie in another file (a detached header); send one .nrrd file that holds both"
        raise UnknownFormat(msg)
    if "block size" in fields:
        msg = "voxels of type block are not supported; send integers or floats"
        raise UnknownFormat(msg)
    for name in ("line skip", "byte skip"):
        if integers(name, fields.get(name, "0")) != [0]:
            msg = f"a {name} other than 0 is not supported; the voxels must follow the header"
            raise UnknownFormat(msg)


def _dtype(fields: dict[str, str]) -> np.dtype[np.generic]:
    code = _TYPE_OF.get(required(fields, "type").lower())
    if code is None:
        msg = "voxels of an unknown type; send integers of 8 to 64 bits, float or double"
        raise UnknownFormat(msg)
    if np.dtype(code).itemsize > 1:
        required(fields, "endian")
    order = {"little": "<", "big": ">"}.get(fields.get("endian", "little").lower())
    if order is None:
        msg = "the header's field endian must be little or big"
        raise Malformed(msg)
    return np.dtype(order + code)


def _compression(fields: dict[str, str]) -> Compression:
    compression = _COMPRESSION_OF.get(required(fields, "encoding").lower())
    if compression is None:
        msg = "the voxels' encoding is not supported; write raw, gzip or bzip2"
        raise UnknownFormat(msg)
    return compression
