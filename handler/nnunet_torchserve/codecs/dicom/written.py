"""Elements as they are written: explicit VR, little endian (PS3.5, section 7.1.2).

Why not pydicom: an answer has thousands of frames that differ in a few bytes, and it makes a dozen objects of each.
What all frames share is written by it.
"""

from __future__ import annotations

import struct

_LONG = frozenset({"OB", "OW", "SQ"})
"""Of the value representations that are written here, those with a length of four bytes."""

_ITEM = 0xFFFEE000
_LONGEST_DECIMAL = 16
UNDEFINED_LENGTH = 0xFFFFFFFF


def element(tag: int, vr: str, value: bytes) -> bytes:
    """One element; its value gets an even number of bytes."""
    padded = value + (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    return element_head(tag, vr, len(padded)) + padded


def element_head(tag: int, vr: str, length: int) -> bytes:
    """What stands before a value of so many bytes."""
    group, number = tag >> 16, tag & 0xFFFF
    if vr in _LONG:
        return struct.pack("<HH2sHL", group, number, vr.encode(), 0, length)
    return struct.pack("<HH2sH", group, number, vr.encode(), length)


def item(*elements: bytes) -> bytes:
    """An item of a sequence, with its elements in the order of their tags."""
    content = b"".join(elements)
    return item_head(len(content)) + content


def item_head(length: int) -> bytes:
    """What stands before an item of so many bytes; of compressed pixels each frame is one."""
    return struct.pack("<HHL", _ITEM >> 16, _ITEM & 0xFFFF, length)


def sequence(tag: int, *items: bytes) -> bytes:
    """A sequence of items."""
    content = b"".join(items)
    return element_head(tag, "SQ", len(content)) + content


def decimal(number: float) -> str:
    """A number as a text of at most 16 characters (DS); one that a header said so comes out with the same value."""
    from pydicom.valuerep import format_number_as_ds

    text = repr(float(number) + 0.0).removesuffix(".0")  # + 0.0: no "-0"
    return text if len(text) <= _LONGEST_DECIMAL else str(format_number_as_ds(float(number)))
