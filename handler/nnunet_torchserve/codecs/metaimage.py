"""MetaImage (.mha) with its voxels in the same file, from memory to memory.

Voxels and geometry are what SimpleITK, and so nnU-Net, reads from the same file; see :mod:`.text_header` for how. As
ITK does, length units, the centre of rotation and the anatomical orientation are not looked at. Stricter than ITK:
a file must say its spacing (ITK would take 1 mm), two fields for one thing must agree, and only ``ElementDataFile =
LOCAL`` is taken. Fields that MetaIO does not know are the writer's own (DICOM tags, say) and are dropped.

Answers are written here because MetaIO's writer, unlike its reader, cannot write to memory: it replaces the end of the
file's name by ``mha`` or ``mhd`` and so never opens what ``/proc/self/fd`` names. The header is MetaIO's own.

Format: https://itk.org/Wiki/ITK/MetaIO/Documentation
"""

from __future__ import annotations

import re

import numpy as np
from isal import isal_zlib

from ..errors import BadSpacing, Malformed, UnknownFormat, WrongChannels
from ..limits import Limits
from ..options import OutputFormat
from ..volume import Geometry, LabelArray
from .geometry import check_size, make_geometry, mixes_channels
from .inflate import GZIP_MAGIC, SLACK_BYTES, ByteSource, Compression
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

_ZLIB_LEVEL = 2
"""ISA-L's levels are 0 to 3; above 2 label maps shrink little and cost twice."""

_OFFSETS = ("Offset", "Position", "Origin", "ImagePosition")
_MATRICES = ("TransformMatrix", "Rotation", "Orientation")
_OLD_NAMES = ("Position", "Origin", "Rotation", "Orientation")
"""Names that newer MetaIO reads in files of version 0 only."""

_TELLING_FIELDS = ("ObjectType", "ObjectSubType", "NDims", "FileFormatVersion", "BinaryData", "DimSize", "ElementType")
"""Fields that nothing but MetaIO writes."""

_FIELDS = frozenset({
    *_OFFSETS, *_MATRICES, *_TELLING_FIELDS, "Comment", "AcquisitionDate", "Name", "ID", "ParentID", "CompressedData",
    "CompressedDataSize", "ElementByteOrderMSB", "BinaryDataByteOrderMSB", "Color", "CenterOfRotation",
    "DistanceUnits", "AnatomicalOrientation", "ElementSpacing", "HeaderSize", "Modality", "SequenceID", "ElementMin",
    "ElementMax", "ElementNumberOfChannels", "ElementSize", "ElementNBits", "ElementToIntensityFunctionSlope",
    "ElementToIntensityFunctionOffset", "ElementDataFile",
})  # fmt: skip
_FIELD_OF = {name.lower(): name for name in _FIELDS}

_TYPE_OF = {
    "MET_CHAR": "i1", "MET_ASCII_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
"""A MET_LONG has 4 bytes on every machine."""

_BOOLEANS = {"t": True, "true": True, "1": True, "f": False, "false": False, "0": False}

_LINE = re.compile(r"([^=:]*)([=:])(.*)")
"""In linear time, whatever the line: the spaces around name and value are stripped afterwards."""
_FIRST_FIELD = re.compile(rb"\s*([A-Za-z]+)[ \t]*=")
_TELLING_LINE = re.compile(rb"^[ \t]*(?:%s)[ \t]*=" % "|".join(_TELLING_FIELDS).encode(), re.MULTILINE)


def is_metaimage(head: bytes) -> bool:
    """Whether a file begins like MetaImage, which has no magic number.

    Its first line is a field that MetaIO knows, and one of its lines is a field that nothing but MetaIO writes.
    """
    first = _FIRST_FIELD.match(head)
    return first is not None and first[1].decode() in _FIELDS and _TELLING_LINE.search(head) is not None


class MetaImageSource(TextHeaderSource):
    """One MetaImage, as an :class:`~.source.ImageSource`."""

    def __init__(self, source: ByteSource, limits: Limits) -> None:
        """Read the header; the voxels stay packed.

        Args:
            source: at the file's first byte.
            limits: voxels and expanded bytes are checked here.

        Raises:
            Malformed, TooLarge, UnknownFormat, BadSpacing, WrongChannels: see :mod:`..errors`.
        """
        fields = _parse(read_header(source, limits, is_last=_names_the_data))
        (ndims,) = integers("NDims", required(fields, "NDims"))
        if not 2 <= ndims <= 4:
            msg = f"an image of {ndims} dimensions; send 2-D or 3-D, or 4-D with the channels last"
            raise WrongChannels(msg)
        sizes = integers("DimSize", required(fields, "DimSize"), ndims)
        (components,) = integers("ElementNumberOfChannels", fields.get("ElementNumberOfChannels", "1"))
        in_space = min(ndims, 3)
        channel_axis: int | None = None
        if ndims > in_space and components != 1:
            msg = f"an image of {ndims} dimensions with {components} numbers a voxel; send the channels in one way"
            raise WrongChannels(msg)
        if ndims > in_space:
            self.channels, channel_axis, stored = sizes[3], 3, sizes
        elif components != 1:
            self.channels, channel_axis, stored = components, 0, [components, *sizes]
        else:
            self.channels, stored = 1, sizes
        dtype = _dtype(fields)
        shape = sizes[:in_space][::-1]
        check_size(shape, self.channels, dtype.itemsize, limits, stored_advice(self.channels, channel_axis))
        spacing, origin, direction = itk_geometry("MetaImageIO", _grid_header(fields, sizes))
        self.geometry = make_geometry(shape, spacing, origin, direction)
        self.native_format = OutputFormat.MHA
        self._voxels = StoredVoxels(_payload(source, fields), dtype, tuple(stored), channel_axis)


def encode_metaimage(array: LabelArray, geometry: Geometry) -> bytes:
    """A label map (Z, Y, X), uint8 or uint16, as a compressed .mha file.

    Where ``geometry.ndim`` is 2 it is a 2-D file, as nnU-Net writes it. ``AnatomicalOrientation`` is left out: it
    repeats the matrix, and no reader needs it.
    """
    ndim = geometry.ndim
    voxels = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    packed: bytes = isal_zlib.compress(voxels.data, _ZLIB_LEVEL)
    lines = [
        "ObjectType = Image",
        f"NDims = {ndim}",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {len(packed)}",
        f"TransformMatrix = {numbers_text(geometry.direction[:ndim, :ndim].T.ravel())}",
        f"Offset = {numbers_text(geometry.origin[:ndim])}",
        f"CenterOfRotation = {numbers_text([0.0] * ndim)}",
        f"ElementSpacing = {numbers_text(geometry.spacing[:ndim])}",
        f"DimSize = {' '.join(str(size) for size in geometry.shape[: -ndim - 1 : -1])}",
        f"ElementType = {'MET_UCHAR' if array.dtype.itemsize == 1 else 'MET_USHORT'}",
        "ElementDataFile = LOCAL",
    ]
    return "\n".join([*lines, ""]).encode("ascii") + packed


def _parse(lines: list[str]) -> dict[str, str]:
    """The fields that MetaIO knows, each at most once."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        if not found:
            msg = "the header has a line that is no MetaImage field; a name, = and a value were expected"
            raise Malformed(msg)
        name, value = found[1].strip(), found[3].strip()
        meant = _FIELD_OF.get(re.sub(r"[\s_-]", "", name).lower())
        if meant is None:
            continue
        if name != meant or found[2] != "=":
            msg = f"the header's field {meant} must be written so, and with ="
            raise Malformed(msg)
        add_field(fields, meant, value)
    _check_kind(fields)
    return fields


def _check_kind(fields: dict[str, str]) -> None:
    """Refuse what is no image with its voxels, as they are meant, right behind the header."""
    if required(fields, "ElementDataFile") != "LOCAL":
        msg = "the voxels lie in another file (ElementDataFile is not LOCAL); send one .mha file that holds both"
        raise UnknownFormat(msg)
    if fields.get("ObjectType", "Image") != "Image":
        msg = "this MetaIO file holds no image (ObjectType is not Image)"
        raise UnknownFormat(msg)
    if not _boolean(fields, "BinaryData", default=True):
        msg = "voxels written as text are not supported; write BinaryData = True"
        raise UnknownFormat(msg)
    if integers("HeaderSize", fields.get("HeaderSize", "0")) != [0]:
        msg = "a HeaderSize other than 0 is not supported; the voxels must follow the header"
        raise UnknownFormat(msg)
    for name, neutral in (("ElementToIntensityFunctionSlope", 1.0), ("ElementToIntensityFunctionOffset", 0.0)):
        if name in fields and floats(name, fields[name], 1) != [neutral]:
            msg = f"{name} is read differently by readers; write the voxels as they are meant, without it"
            raise Malformed(msg)


def _grid_header(fields: dict[str, str], sizes: list[int]) -> str:
    """A header of the grid alone, for ITK; of a fourth axis nothing is kept."""
    ndims, in_space = len(sizes), min(len(sizes), 3)
    offsets = {name: floats(name, fields[name], ndims) for name in _OFFSETS if name in fields}
    matrices = {name: floats(name, fields[name], ndims * ndims) for name in _MATRICES if name in fields}
    spacings = {n: floats(n, fields[n], ndims) for n in ("ElementSpacing", "ElementSize") if n in fields}
    if not spacings:
        msg = "the header gives no voxel spacing; write ElementSpacing, in mm along x, y, z"
        raise BadSpacing(msg)
    for group in (offsets, matrices):
        if len({tuple(values) for values in group.values()}) > 1:
            msg = f"the header's fields {' and '.join(group)} mean the same and differ; one of them was expected"
            raise Malformed(msg)
    (version,) = integers("FileFormatVersion", fields.get("FileFormatVersion", "0"))
    if version != 0 and any(name in fields for name in _OLD_NAMES):
        msg = "files of this FileFormatVersion place the image by Offset and TransformMatrix; other names are old"
        raise Malformed(msg)
    lines = ["ObjectType = Image", f"NDims = {in_space}", "BinaryData = True"]
    lines += [f"{name} = {numbers_text(values[:in_space])}" for name, values in offsets.items()]
    lines += [f"{name} = {numbers_text(_in_space(values, ndims))}" for name, values in matrices.items()]
    lines += [f"{name} = {numbers_text(values[:in_space])}" for name, values in spacings.items()]
    lines.append(f"DimSize = {' '.join(str(size) for size in sizes[:in_space])}")
    return "\n".join([*lines, "ElementType = MET_UCHAR", "ElementDataFile = LOCAL", ""])


def _in_space(matrix: list[float], ndims: int) -> list[float]:
    """The 2×2 or 3×3 part of a matrix whose fourth axis, if there is one, is that of the channels."""
    if ndims <= 3:
        return matrix
    square = np.reshape(matrix, (ndims, ndims))
    if mixes_channels(square):
        msg = "the header's matrix mixes the axis of channels with those in space"
        raise Malformed(msg)
    return [float(value) for value in square[:3, :3].ravel()]


def _dtype(fields: dict[str, str]) -> np.dtype[np.generic]:
    code = _TYPE_OF.get(required(fields, "ElementType"))
    if code is None:
        msg = "voxels of an unknown ElementType; send MET_UCHAR, MET_SHORT, MET_FLOAT or another number"
        raise UnknownFormat(msg)
    names = [name for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if name in fields]
    orders = {_boolean(fields, name, default=False) for name in names}
    if len(orders) > 1:
        msg = f"the header's fields {' and '.join(names)} mean the same and differ"
        raise Malformed(msg)
    return np.dtype(code).newbyteorder(">" if True in orders else "<")


def _payload(source: ByteSource, fields: dict[str, str]) -> ByteSource:
    """The voxels' bytes, unpacked; MetaIO takes both zlib's and gzip's streams."""
    (size,) = integers("CompressedDataSize", fields.get("CompressedDataSize", "0"))
    if not _boolean(fields, "CompressedData", default=False):
        return source
    rest = unpacked(source, Compression.ZLIB).body
    if size and not size <= len(rest) <= size + SLACK_BYTES:
        msg = f"CompressedDataSize is {size}, but {len(rest)} bytes follow the header; the file seems cut off"
        raise Malformed(msg)
    rest = rest[:size] if size else rest
    gzipped = bytes(rest[: len(GZIP_MAGIC)]) == GZIP_MAGIC
    return ByteSource(rest, Compression.GZIP if gzipped else Compression.ZLIB)


def _boolean(fields: dict[str, str], name: str, *, default: bool) -> bool:
    if name not in fields:
        return default
    value = _BOOLEANS.get(fields[name].lower())
    if value is None:
        msg = f"the header's field {name} must be True or False"
        raise Malformed(msg)
    return value


def _names_the_data(line: str) -> bool:
    found = _LINE.fullmatch(line)
    return found is not None and re.sub(r"[\s_-]", "", found[1]).lower() == "elementdatafile"
