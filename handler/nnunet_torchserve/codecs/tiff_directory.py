"""The directories of a TIFF or BigTIFF: tags and their values, read within bounds."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import Malformed, TooLarge
from ..limits import Limits

_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 7: "u1", 16: "u8"}
"""TIFF's BYTE, ASCII, SHORT, LONG, UNDEFINED and LONG8."""


class Directory:
    """The tags of one page, unread."""

    def __init__(self, body: memoryview, order: str, *, big: bool, offset: int, limits: Limits) -> None:
        self._body, self._order = body, order
        count_format, entry, link = ("Q", struct.Struct(f"{order}HHQ8s"), "Q") if big else ("H", None, "I")
        entry = entry or struct.Struct(f"{order}HHI4s")
        (count,) = unpack(body, order + count_format, offset)
        if count > limits.header_fields:
            msg = f"a page of the TIFF has {count} tags; this server takes at most {limits.header_fields}"
            raise TooLarge(msg)
        start = offset + struct.calcsize(order + count_format)
        end = start + count * entry.size
        (self.next,) = unpack(body, order + link, end)
        self._entries: dict[int, list[tuple[int, int, int]]] = {}
        for position in range(start, end, entry.size):
            tag, kind, items, inline = entry.unpack_from(body, position)
            value_bytes = items * np.dtype(_TYPES.get(kind, "u1")).itemsize
            place_of_value = position + entry.size - len(inline)
            if value_bytes > len(inline):
                (place_of_value,) = struct.unpack(order + link, inline)
            self._entries.setdefault(tag, []).append((kind, items, place_of_value))

    @property
    def tags(self) -> set[int]:
        """The numbers of the tags."""
        return set(self._entries)

    def values(self, tag: int, most: int) -> npt.NDArray[np.uint64]:
        """The first ``most`` numbers of a tag.

        Raises:
            Malformed: not whole numbers, none, or outside the file.
        """
        kind, items, start = self._entries[tag][0]
        dtype = np.dtype(self._order + _TYPES.get(kind, "u1"))
        count = min(items, most)
        if kind not in _TYPES or not count or start + count * dtype.itemsize > len(self._body):
            msg = f"the TIFF's tag {tag} is no whole number, or points outside the file"
            raise Malformed(msg)
        return np.frombuffer(self._body, dtype, count, start).astype(np.uint64)

    def texts(self, tag: int, most: int) -> list[str]:
        """The texts of a tag, which may stand twice.

        Raises:
            TooLarge: a text of more than ``most`` bytes.
        """
        texts = []
        for _kind, items, start in self._entries.get(tag, [])[:2]:
            if items > most:
                msg = f"the TIFF's description has {items} bytes; this server takes at most {most}"
                raise TooLarge(msg)
            texts.append(bytes(self._body[start : start + items]).split(b"\0")[0].decode("latin-1"))
        return texts


def unpack(body: memoryview, layout: str, offset: int) -> tuple[Any, ...]:
    """Numbers at an offset; raises Malformed where the file ends before."""
    if offset + struct.calcsize(layout) > len(body):
        msg = "the TIFF is cut off: a directory lies outside the file"
        raise Malformed(msg)
    return struct.unpack_from(layout, body, offset)
