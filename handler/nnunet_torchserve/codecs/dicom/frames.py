"""Frames of a segmentation: where each lies and of which image it is, and its pixels.

BINARY has a frame of bits for each segment and slice in which there is something of it, so segments may overlap.
LABELMAP has one of segment numbers for each slice, packed by RLE.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from ...errors import ResponseTooLarge
from ...volume import LabelArray
from .segment import Segment
from .slices import Slice
from .written import UNDEFINED_LENGTH, decimal, element, element_head, item, item_head, sequence

PIXEL_DATA = 0x7FE00010
_PER_FRAME = 0x52009230
_END_OF_SEQUENCE = struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)

_SEGMENTATION = (b"113076", b"DCM", b"Segmentation")
_SOURCE_IMAGE = (b"121322", b"DCM", b"Source image for image processing operation")
"""Codes (PS3.16, CID 7203 and 7202)."""

_RLE_HEADER_WORDS = 16
GROUPS_BYTES = 700
"""About what a frame takes beside its pixels."""

MOST_OF_RLE = 2
"""Bytes that RLE makes of one at most: rows of a single pixel have a byte of their own for each."""


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a segmentation.

    Attributes:
        slices: of which slice each is, from 0.
        groups: their functional groups, the whole element.
        pixels: theirs, the whole element, in parts.
    """

    slices: Sequence[int]
    groups: bytes
    pixels: Sequence[bytes | memoryview]


def binary_frames(labels: LabelArray, slices: Sequence[Slice], segments: Sequence[Segment], most_bytes: int) -> Frames:
    """A frame for each segment and slice in which it is; a single empty one where nothing was found at all.

    Args:
        labels: (Z, Y, X).
        slices: of the source, one for each of ``labels``.
        segments: numbered from 1.
        most_bytes: that they may take.

    Raises:
        ResponseTooLarge: they would take more.
    """
    found = _presence(labels)
    shown = [(segment, z) for segment in segments for z in _slices_with(segment, found)] or [(segments[0], 0)]
    voxels = labels[0].size
    size = -(-len(shown) * voxels // 8)
    if (whole := size + len(shown) * GROUPS_BYTES) > most_bytes:
        msg = f"the segmentation would have about {whole} bytes, this server sends at most {most_bytes}; "
        msg += "ask for seg_type labelmap, or for another output_format"
        raise ResponseTooLarge(msg)
    bits = np.zeros(size + size % 2, np.uint8)
    at_a_time = 8 // gcd(8, voxels)  # frames whose bits together are whole bytes
    batch = np.empty((at_a_time, voxels), bool)
    tables = {segment.number: _table(segment, found.shape[1]) for segment in segments if len(segment.values) > 1}
    for first in range(0, len(shown), at_a_time):
        some = shown[first : first + at_a_time]
        for mask, (segment, z) in zip(batch, some, strict=False):
            _mask(labels[z], segment, tables.get(segment.number), mask.reshape(labels.shape[1:]))
        packed = np.packbits(batch[: len(some)], bitorder="little")
        start = first * voxels // 8
        bits[start : start + packed.size] = packed
    places = _places(slices)
    ranks = _ranks([z for _, z in shown])
    groups = sequence(
        _PER_FRAME,
        *(
            item(
                places[z].derivation,
                _content(segment.number, ranks[z]),
                places[z].position,
                sequence(0x0062000A, item(element(0x0062000B, "US", struct.pack("<H", segment.number)))),
            )
            for segment, z in shown
        ),
    )
    return Frames([z for _, z in shown], groups, [element_head(PIXEL_DATA, "OB", bits.size), bits.data])


def labelmap_frames(labels: LabelArray, slices: Sequence[Slice], segments: Sequence[Segment]) -> Frames:
    """A frame for each slice.

    Args:
        labels: (Z, Y, X).
        slices: of the source, one for each of ``labels``.
        segments: no value of ``labels`` belongs to two of them.
    """
    kind = np.uint8 if len(segments) < 2**8 else np.uint16
    numbers = np.zeros(int(labels.max()) + 1, kind)
    for segment in segments:
        numbers[_below(segment, numbers.size)] = segment.number
    parts: list[bytes | memoryview] = []
    offsets, position = [], 0
    for one in labels:
        frame = _rle(numbers[one])
        parts += [item_head(len(frame)), frame]
        offsets.append(position)
        position += len(frame) + 8
    table = struct.pack(f"<{len(offsets)}L", *offsets) if position <= UNDEFINED_LENGTH else b""
    head = [element_head(PIXEL_DATA, "OB", UNDEFINED_LENGTH), item_head(len(table)), table]
    places = _places(slices)
    groups = sequence(
        _PER_FRAME,
        *(item(place.derivation, _content(z), place.position) for z, place in enumerate(places, start=1)),
    )
    return Frames(range(len(labels)), groups, [*head, *parts, _END_OF_SEQUENCE])


@dataclass(frozen=True, slots=True)
class _Place:
    """What all frames of a slice have in common, as it is written."""

    derivation: bytes
    position: bytes


def _places(slices: Sequence[Slice]) -> list[_Place]:
    derived = sequence(0x00089215, _coded(_SEGMENTATION))
    purpose = sequence(0x0040A170, _coded(_SOURCE_IMAGE))
    places = []
    for one in slices:
        source = item(
            element(0x00081150, "UI", one.image.sop_class.encode()),
            element(0x00081155, "UI", one.image.sop_instance.encode()),
            b"" if one.frame is None else element(0x00081160, "IS", str(one.frame).encode()),
            element(0x0028135A, "CS", b"YES"),
            purpose,
        )
        position = "\\".join(decimal(mm) for mm in one.plane.position.tolist())
        places.append(
            _Place(
                sequence(0x00089124, item(sequence(0x00082112, source), derived)),
                sequence(0x00209113, item(element(0x00200032, "DS", position.encode()))),
            )
        )
    return places


def _content(*indices: int) -> bytes:
    return sequence(0x00209111, item(element(0x00209157, "UL", struct.pack(f"<{len(indices)}L", *indices))))


def _coded(code: tuple[bytes, bytes, bytes]) -> bytes:
    value, scheme, meaning = code
    return item(element(0x00080100, "SH", value), element(0x00080102, "SH", scheme), element(0x00080104, "LO", meaning))


def _ranks(slices: Sequence[int]) -> dict[int, int]:
    """Slice -> its place among those that are shown, from 1."""
    return {z: rank for rank, z in enumerate(sorted(set(slices)), start=1)}


def _presence(labels: LabelArray) -> npt.NDArray[np.bool_]:
    """(Z, values): whether a value is in a slice, up to the largest that is anywhere."""
    found = np.zeros((len(labels), int(labels.max()) + 1), bool)
    for z, one in enumerate(labels):
        found[z, one.ravel()] = True
    return found


def _slices_with(segment: Segment, found: npt.NDArray[np.bool_]) -> list[int]:
    slices: list[int] = np.flatnonzero(found[:, _below(segment, found.shape[1])].any(axis=1)).tolist()
    return slices


def _below(segment: Segment, end: int) -> list[int]:
    """Its values, as far as a label map has any like them."""
    return [value for value in segment.values if value < end]


def _table(segment: Segment, end: int) -> npt.NDArray[np.bool_]:
    table = np.zeros(end, bool)
    table[_below(segment, end)] = True
    return table


def _mask(one: LabelArray, segment: Segment, table: npt.NDArray[np.bool_] | None, out: npt.NDArray[np.bool_]) -> None:
    if table is None:
        np.equal(one, segment.values[0] if segment.values else -1, out=out)
    else:
        np.take(table, one, out=out, mode="clip")  # any other mode makes a copy first


def _rle(frame: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """One frame in RLE (PS3.5, annex G): byte planes, the highest first, each packed row by row."""
    import imagecodecs

    planes = frame.astype(frame.dtype.newbyteorder(">")).view(np.uint8).reshape(*frame.shape, frame.itemsize)
    segments = []
    for number in range(frame.itemsize):
        packed = bytes(imagecodecs.packbits_encode(np.ascontiguousarray(planes[..., number]), axis=-1))
        segments.append(packed + b"\0" * (len(packed) % 2))
    header, position = [len(segments)], 4 * _RLE_HEADER_WORDS
    for segment in segments:
        header.append(position)
        position += len(segment)
    header += [0] * (_RLE_HEADER_WORDS - len(header))
    return struct.pack(f"<{_RLE_HEADER_WORDS}L", *header) + b"".join(segments)
