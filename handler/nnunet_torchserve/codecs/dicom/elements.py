"""The elements of a DICOM file, walked over before anything interprets them (PS3.5, section 7).

Why: a few bytes can hold 100,000 sequences within each other, or declare lengths beyond the file. Here they are
counted, without recursion, and only the elements that are wanted are handed on to pydicom, as they stand. Values are
skipped and not looked at, but for the transfer syntax and the class of the object.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass, field

from ...errors import Malformed, TooLarge
from ...limits import Limits
from ..inflate import refuse_damage

PREAMBLE_BYTES = 128
_MAGIC = b"DICM"
HEAD_BYTES = PREAMBLE_BYTES + len(_MAGIC)

IMPLICIT_LITTLE, EXPLICIT_LITTLE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, EXPLICIT_BIG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"

_MEDIA_CLASS, _TRANSFER_SYNTAX = 0x00020002, 0x00020010
_DIRECTORY = "1.2.840.10008.1.3.10"
_SOP_CLASS, _SERIES, _FRAMES = 0x00080016, 0x0020000E, 0x00280008
_PER_FRAME = 0x52009230
_META_GROUP, _PIXEL_GROUP = 0x0002, 0x7FE0
PIXEL_DATA, FLOAT_PIXELS, DOUBLE_PIXELS = 0x7FE00010, 0x7FE00008, 0x7FE00009
_PIXELS = frozenset({PIXEL_DATA, FLOAT_PIXELS, DOUBLE_PIXELS})
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF

_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations with a length of four bytes."""

_SHORT = frozenset({
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
    b"ST", b"TM", b"UI", b"UL", b"US",
})  # fmt: skip
_RAW = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW"})
"""Representations whose undefined length means fragments, which hold no elements."""

LONGEST_UID = 64
"""Characters (PS3.5, section 9)."""

_GROUPS_WITHOUT_PREAMBLE = (b"\x08\x00", b"\x02\x00")
_MOST_DIGITS = 12
"""Of an IS (PS3.5, section 6.2)."""

_EARLY_ELEMENTS = frozenset({0x00, 0x01, 0x05, 0x06, 0x08, 0x12, 0x14, 0x16, 0x18})
_DAMAGED = "a DICOM file is damaged: its elements do not follow each other"


_ELEMENTS_A_FRAME, _EXTRA_FRAMES = 2000, 10
"""Elements that the sequences of an object may hold for each of its frames, and for all together as if they were so
many frames more. Some scanners put some hundred of their own beside each frame."""

_MOST_AT_ONCE = 1_000_000
"""Elements that the sequences of one object may hold, whatever its frames: pydicom takes some 300 bytes for each."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a walk is for.

    Attributes:
        elements: tags of elements at the top, which are handed on whole.
        sequences: tags of those sequences, there and within them, whose items are read: files of implicit encoding do
            not say that they are sequences.
        classes: of objects; the walk ends where it meets another one.
        texts: tags of elements at the top that have at most ``longest`` bytes.
        longest: bytes.
    """

    elements: Collection[int]
    sequences: Collection[int]
    classes: Collection[str]
    texts: Collection[int] = ()
    longest: int = 0


@dataclass(slots=True)
class Budget:
    """What the headers of one image may still hold.

    Attributes:
        elements: how many.
        frames: of one object.
        nesting: sequences within each other.
        header_bytes: of one file.
    """

    elements: int
    frames: int
    nesting: int
    header_bytes: int

    @classmethod
    def of(cls, limits: Limits) -> Budget:
        """All that is allowed."""
        return cls(limits.dicom_elements, limits.dicom_frames, limits.dicom_nesting, limits.dicom_header_bytes)

    def take(self, elements: int) -> None:
        """Count elements; raises :class:`TooLarge` when there are too many."""
        self.elements -= elements
        if self.elements < 0:
            msg = "the DICOM headers hold far more elements than a series has; send one series"
            raise TooLarge(msg)


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the elements of a file are stored.

    Attributes:
        transfer_syntax: UID, as the file says it or its first element shows.
        implicit: without value representations.
        little: the byte order of numbers.
        start: first byte of the data set in the file; what follows may be deflated.
        is_directory: a DICOMDIR, which lists other files and is no object.
    """

    transfer_syntax: str
    implicit: bool
    little: bool
    start: int
    is_directory: bool = False


@dataclass(slots=True)
class Walk:
    """How far the elements of a data set were walked over.

    Attributes:
        wanted: the elements that were asked for, as they stand in the file.
        sop_class, series: UIDs, once they were met.
        pixels: tag of the pixels that follow; ``None`` if there are none so far.
        pixels_at: first byte of their value.
        pixels_length: of their value, or :data:`UNDEFINED`.
        pixels_vr: their value representation; ``None`` in implicit files.
        is_other: the object is of none of the classes, and was walked over no further.
        has_long_texts: one of the selection's texts is longer than it may be.
        is_whole: the end of the header was reached; else more bytes are needed.
        elements: how many there were.
    """

    wanted: list[bytes] = field(default_factory=list)
    sop_class: str | None = None
    series: str | None = None
    pixels: int | None = None
    pixels_at: int = 0
    pixels_length: int = 0
    pixels_vr: bytes | None = None
    is_other: bool = False
    has_long_texts: bool = False
    is_whole: bool = False
    elements: int = 0

    def restart(self) -> None:
        """Forget all of it: the same bytes come again, with more."""
        self.__init__()  # type: ignore[misc]


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is DICOM, with its preamble or without, as old exports have it."""
    if head[PREAMBLE_BYTES:HEAD_BYTES] == _MAGIC:
        return True
    early = int.from_bytes(head[2:4], "little") in _EARLY_ELEMENTS
    length = int.from_bytes(head[4:8], "little")
    known = head[4:6] in _SHORT or head[4:6] in _LONG or length <= PREAMBLE_BYTES
    return len(head) >= HEAD_BYTES and head[:2] in _GROUPS_WITHOUT_PREAMBLE and early and known


def encoding_of(head: bytes) -> Encoding:
    """How a DICOM file is stored, from its first bytes, which hold its whole file meta information.

    Raises:
        Malformed: that is damaged or far too long.
    """
    position = HEAD_BYTES if head[PREAMBLE_BYTES:HEAD_BYTES] == _MAGIC else 0
    syntax, media = None, ""
    while head[position : position + 2] == b"\x02\x00":
        with refuse_damage((struct.error,), _DAMAGED):
            tag, _, start, length = _element(head, position, "<", implicit=False)
        if length == UNDEFINED or start + length > len(head):
            raise Malformed(_DAMAGED)
        if tag == _TRANSFER_SYNTAX:
            syntax = _uid(head[start : start + length])
        if tag == _MEDIA_CLASS:
            media = _uid(head[start : start + length])
        position = start + length
    shown = head[position + 4 : position + 6]
    implicit = shown not in _SHORT and shown not in _LONG
    if syntax is None:
        syntax = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE
    if syntax == DEFLATED:
        implicit = False
    return Encoding(syntax, implicit, syntax != EXPLICIT_BIG, position, media == _DIRECTORY)


def walk_elements(
    data: bytes,
    encoding: Encoding,
    selection: Selection,
    budget: Budget,
    walk: Walk,
    *,
    is_all: bool,
) -> None:
    """Walk over a data set's elements up to its pixels.

    Args:
        data: the data set's first bytes.
        encoding: how it is stored.
        selection: what it is for.
        budget: how deep sequences may go; elements are not taken from it here, for ``data`` may come again with more.
        walk: what is found is noted there anew, up to where the elements are damaged.
        is_all: no bytes follow.

    Raises:
        Malformed: elements that do not follow each other, or end beyond the file; items of more frames than there
            are.
        TooLarge: deeper than allowed, or more elements, or more frames.
    """
    walker = _Walker(data, encoding, selection, budget, walk)
    while walker.step():
        pass
    if is_all and walker.walk.pixels is None and not walker.walk.is_other:
        walker.end()


@dataclass(slots=True)
class _Level:
    """A sequence or an item that the walk is in.

    Attributes:
        end: byte after it; ``None`` where a delimiter ends it.
        is_item: an item, which holds elements; else a sequence, which holds items.
        is_raw: its items are fragments, which hold no elements.
    """

    end: int | None
    is_item: bool
    is_raw: bool = False


class _Walker:
    """A place in a data set, and the levels above it."""

    def __init__(self, data: bytes, encoding: Encoding, selection: Selection, budget: Budget, walk: Walk) -> None:
        self.walk = walk
        walk.restart()
        self._data, self._selection, self._budget = data, selection, budget
        self._order, self._implicit = "<" if encoding.little else ">", encoding.implicit
        self._levels: list[_Level] = []
        self._position = self._element_at = self._element = 0
        self._frames = 1
        self._items = self._inside = 0

    def step(self) -> bool:
        """Over one element, item or delimiter; false at the pixels, or where the bytes end."""
        self._leave_ended()
        if not self._levels:
            self._keep()
        try:
            tag, vr, start, length = _element(self._data, self._position, self._order, implicit=self._implicit)
        except struct.error:
            return False
        self.walk.elements += 1
        if self.walk.elements > self._budget.elements:
            self._budget.take(self.walk.elements)
        self._count_inside()
        if tag in {_END_OF_ITEM, _END_OF_SEQUENCE}:
            self._leave(tag, start)
        elif self._levels and not self._levels[-1].is_item:
            self._enter_item(tag, start, length)
        elif tag == _ITEM:
            raise Malformed(_DAMAGED)
        elif not self._levels and self._is_found(tag, vr, start, length):
            return False
        elif length == UNDEFINED or self._is_sequence(tag, vr):
            self._enter_sequence(vr, start, length)
        else:
            self._position = start + length
        return True

    def _is_sequence(self, tag: int, vr: bytes | None) -> bool:
        """Whether an element of defined length is one that is entered: pydicom will read what it holds."""
        is_read = self._element in self._selection.sequences and tag in self._selection.sequences
        if is_read and vr not in {None, b"SQ"}:
            msg = "a DICOM file stores a sequence as bytes of another kind; send the files as the scanner wrote them"
            raise Malformed(msg)
        return is_read or (vr == b"SQ" and bool(self._levels))

    def _count_inside(self) -> None:
        """Elements of sequences that are read; of each pydicom makes an object."""
        if not self._levels or self._element not in self._selection.sequences:
            return
        self._inside += 1
        if self._inside > min(_ELEMENTS_A_FRAME * (self._frames + _EXTRA_FRAMES), _MOST_AT_ONCE):
            msg = "the header of a DICOM file holds far more elements than its frames need"
            raise TooLarge(msg)

    def end(self) -> None:
        """The bytes end: so must the elements."""
        self._leave_ended()
        if self._position != len(self._data) or self._levels:
            raise Malformed(_DAMAGED)
        self._keep()
        self.walk.is_whole = True

    def _leave_ended(self) -> None:
        while self._levels and (end := self._levels[-1].end) is not None and self._position >= end:
            if self._position > end:
                raise Malformed(_DAMAGED)
            self._levels.pop()

    def _leave(self, tag: int, start: int) -> None:
        if not self._levels or self._levels[-1].end is not None or self._levels[-1].is_item != (tag == _END_OF_ITEM):
            raise Malformed(_DAMAGED)
        self._levels.pop()
        self._position = start

    def _enter_item(self, tag: int, start: int, length: int) -> None:
        if tag != _ITEM:
            raise Malformed(_DAMAGED)
        if len(self._levels) == 1 and self._element in self._selection.sequences:
            self._count_item()
        self._position = start
        if self._levels[-1].is_raw:
            self._position += length
        else:
            self._levels.append(_Level(None if length == UNDEFINED else start + length, is_item=True))

    def _count_item(self) -> None:
        """Of a sequence at the top that is read: one a frame, or a single one."""
        self._items += 1
        if self._items > self._budget.frames:
            msg = f"a DICOM file describes more than {self._budget.frames} frames, the limit"
            raise TooLarge(msg)
        if self._items > (self._frames if self._element == _PER_FRAME else 1):
            msg = f"a DICOM file declares {self._frames} frames, and describes more"
            raise Malformed(msg)

    def _enter_sequence(self, vr: bytes | None, start: int, length: int) -> None:
        end = None if length == UNDEFINED else start + length
        self._levels.append(_Level(end, is_item=False, is_raw=vr in _RAW))
        self._position = start
        if len(self._levels) > 2 * self._budget.nesting:  # an item for each sequence
            msg = f"a DICOM header holds sequences within each other, deeper than {self._budget.nesting}, the limit"
            raise TooLarge(msg)

    def _is_found(self, tag: int, vr: bytes | None, start: int, length: int) -> bool:
        """Note an element at the top; true if the walk ends there: at the pixels, or in an object of another class."""
        self._element, self._items = tag, 0
        if tag in _PIXELS:
            self.walk.pixels, self.walk.pixels_vr = tag, vr
            self.walk.pixels_at, self.walk.pixels_length = start, length
            self.walk.is_whole = True
            return True
        if tag == _SOP_CLASS and start + length <= len(self._data):
            self.walk.sop_class = _uid(self._data[start : start + length])
            self.walk.is_other = self.walk.sop_class not in self._selection.classes
        if tag in self._selection.texts and length > self._selection.longest:
            self.walk.has_long_texts = True
        if tag == _SERIES and start + length <= len(self._data):
            self.walk.series = _uid(self._data[start : start + length])
        if tag == _FRAMES and start + length <= len(self._data):
            said = self._data[start : start + length].strip(b"\0 ")
            self._frames = int(said) if said.isdigit() and len(said) <= _MOST_DIGITS else 1
        return self.walk.is_other

    def _keep(self) -> None:
        """The element that ended here, if it is wanted."""
        if self._element in self._selection.elements and self._position <= len(self._data):
            self.walk.wanted.append(self._data[self._element_at : self._position])
        self._element, self._element_at = 0, self._position


def _element(data: bytes, position: int, order: str, *, implicit: bool) -> tuple[int, bytes | None, int, int]:
    """Tag, value representation, first byte of the value, and its length.

    Within explicit files some writers put implicit elements; what has no representation that exists is one of them.
    """
    group, number = struct.unpack_from(f"{order}HH", data, position)
    tag = group << 16 | number
    vr = None if implicit or group == 0xFFFE else data[position + 4 : position + 6]
    if vr in _LONG:
        (length,) = struct.unpack_from(f"{order}L", data, position + 8)
        return tag, vr, position + 12, length
    if vr in _SHORT:
        (length,) = struct.unpack_from(f"{order}H", data, position + 6)
        return tag, vr, position + 8, length
    (length,) = struct.unpack_from(f"{order}L", data, position + 4)
    return tag, None, position + 8, length


def _uid(value: bytes) -> str:
    """As far as it could be one: of more characters it is none."""
    return value[: LONGEST_UID + 2].decode("ascii", "replace").strip("\0 ")
