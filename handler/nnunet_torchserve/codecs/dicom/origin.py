"""What an object that is made of a series repeats of it: whose it is, of which study; and the series' own digest.

It is read when it is wanted, in a walk of its own, so that nothing of a patient lies in memory before. Texts are copied
as they stand, byte for byte: a PACS files an answer with its patient only if name and number are the very same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import Malformed
from ...limits import Limits
from .container import Container, Meter, walk
from .elements import Budget, Encoding, Selection, Walk, encoding_of
from .header import IMAGE_CLASSES, ImageHeader
from .library import data_set, quietly
from .series import FIRST_BYTES, data_set_stream, walk_header

CHARACTER_SET = 0x00080005

COPIED = {
    CHARACTER_SET: "CS",
    0x00080020: "DA",  # study date
    0x00080030: "TM",  # study time
    0x00080050: "SH",  # accession number
    0x00080090: "PN",  # referring physician
    0x00080201: "SH",  # time zone
    0x00081030: "LO",  # study description
    0x00100010: "PN",  # patient's name
    0x00100020: "LO",  # patient's number
    0x00100021: "LO",  # who gave that
    0x00100030: "DA",  # birth date
    0x00100032: "TM",  # birth time
    0x00100040: "CS",  # sex
    0x00101010: "AS",  # age
    0x00101020: "DS",  # size
    0x00101030: "DS",  # weight
    0x00120062: "CS",  # whether the identity was removed
    0x00120063: "LO",  # by what method
    0x00200010: "SH",  # study's number
    0x00201040: "LO",  # position reference indicator
    0x00280303: "CS",  # whether dates were changed
}
"""Tag -> value representation (PS3.6): modules of patient, study, patient in the study, and frame of reference."""

EMPTY_IF_UNKNOWN = (
    0x00080020, 0x00080030, 0x00080050, 0x00080090, 0x00100010, 0x00100020, 0x00100030, 0x00100040, 0x00200010,
    0x00201040,
)  # fmt: skip
"""Those that must be there, with no value if it is not known (type 2)."""

SERIES_NUMBER = 0x00200011
DATES = ((0x00080021, 0x00080031), (0x00080022, 0x00080032), (0x00080023, 0x00080033), (0x00080020, 0x00080030))
"""Date and time of series, acquisition, content and study."""

_READ = frozenset(COPIED) | {SERIES_NUMBER} | {tag for pair in DATES for tag in pair}
_SELECTION = Selection(_READ, frozenset(), frozenset(IMAGE_CLASSES))
_LONGEST = 1024
"""Bytes: the longest of these elements may have 64 characters, or three times that of a name."""

_CHUNK_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a series beside its images' places and values.

    Attributes:
        elements: tag -> value as it stands in the header of the first slice, an even number of bytes.
        digest: sha256 over the sha256 of each object's data set, in the order of their slices: the same however the
            files are packed, named and ordered, and another one if anything in any of them changes.
    """

    elements: Mapping[int, bytes]
    digest: str

    def text(self, tag: int) -> str:
        """A value of plain characters, empty if there is none."""
        return self.elements.get(tag, b"").decode("latin-1").strip("\0 ")


def read_origin(container: Container, limits: Limits, images: Sequence[ImageHeader]) -> Origin:
    """Walk through the files once more.

    Args:
        container: the files.
        limits: what is allowed.
        images: of the series, in the order of their slices.

    Raises:
        Malformed: an element that is far longer than its kind can be.
    """
    numbers = {image.file for image in images}
    digests: dict[int, bytes] = {}
    elements: Mapping[int, bytes] = {}
    meter = Meter(limits)
    for number, file in enumerate(walk(container, limits, meter)):
        if number not in numbers:
            continue
        opened, digest = file.open(), hashlib.sha256()
        encoding = encoding_of(opened.peek(min(FIRST_BYTES, file.size)))
        stream = data_set_stream(opened, encoding, meter)
        if number == images[0].file:
            seen = Walk()
            walk_header(stream, encoding, _SELECTION, Budget.of(limits), seen)
            elements = _elements(seen, encoding)
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
        digests[number] = digest.digest()
        opened.finish()
    whole = hashlib.sha256(b"".join(digests[image.file] for image in images))
    return Origin(elements, whole.hexdigest())


def _elements(seen: Walk, encoding: Encoding) -> Mapping[int, bytes]:
    found: Any = data_set(seen.wanted, encoding)
    values: dict[int, bytes] = {}
    with quietly():
        for tag in _READ:
            item = found.get_item(tag)
            if item is None or item.value is None:
                continue
            value = bytes(item.value)
            if len(value) > _LONGEST:
                msg = "a DICOM header has a text that is far longer than its kind may be"
                raise Malformed(msg)
            values[tag] = value + b" " * (len(value) % 2)
    return values
