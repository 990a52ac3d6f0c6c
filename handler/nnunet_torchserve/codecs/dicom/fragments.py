"""Compressed frames in their pieces (PS3.5, annex A.4): found, counted and bounded; nothing is unpacked here."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ...errors import DicomReason, DicomRefused, Malformed
from .stored_pixels import Pixels

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_MOST_FRAGMENTS = 200_000
_DAMAGED = "the compressed pixels of an image are damaged: its pieces do not follow each other"


def frames_of(value: memoryview, pixels: Pixels) -> Iterator[bytes]:
    """The bytes of each frame, copied when its turn comes; all that can be wrong is noticed before the first.

    An extended offset table is not needed: where there is one, each frame is a piece (PS3.3, C.7.6.3.1.8).

    Args:
        value: of the pixels, from the item of the basic offset table on.
        pixels: how many frames there are.

    Raises:
        Malformed: the pieces do not follow each other, or are no such number of frames.
        DicomRefused: they end early.
    """
    table, starts, pieces = _split(value)
    if len(pieces) == pixels.frames:
        return (bytes(piece) for piece in pieces)
    if pixels.frames == 1:
        return iter([b"".join(pieces)])
    offsets = np.frombuffer(table[: len(table) // 4 * 4], "<u4").tolist()
    number_of = {start: number for number, start in enumerate(starts)}
    firsts = [number_of.get(offset) for offset in offsets]
    if len(firsts) != pixels.frames or None in firsts or sorted(set(offsets)) != offsets or firsts[0] != 0:
        msg = f"{pixels.frames} compressed frames in {len(pieces)} pieces, and no table says where each begins"
        raise Malformed(msg)
    bounds = [number for number in firsts if number is not None] + [len(pieces)]
    return (b"".join(pieces[first:last]) for first, last in pairwise(bounds))


def _split(value: memoryview) -> tuple[bytes, list[int], list[memoryview]]:
    """The basic offset table; where each fragment's item begins, counted from the first one; the fragments."""
    pieces: list[memoryview] = []
    starts: list[int] = []
    position = 0
    while True:
        head = bytes(value[position : position + 8])
        if len(head) < 8:
            msg = "the compressed pixels of an image are cut off"
            raise DicomRefused(DicomReason.TRUNCATED_PIXELS, msg)
        if head.startswith(_END):
            break
        (length,) = struct.unpack_from("<L", head, 4)
        if not head.startswith(_ITEM) or len(pieces) > _MOST_FRAGMENTS:
            raise Malformed(_DAMAGED)
        piece = value[position + 8 : position + 8 + length]
        if len(piece) < length:
            msg = "the compressed pixels of an image are cut off"
            raise DicomRefused(DicomReason.TRUNCATED_PIXELS, msg)
        pieces.append(piece)
        starts.append(position)
        position += 8 + length
    if len(pieces) < 2:
        raise Malformed(_DAMAGED)
    return bytes(pieces[0]), [start - starts[1] for start in starts[1:]], pieces[1:]
