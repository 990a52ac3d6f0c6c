"""What an object that is made of a series repeats of it: whose it is, of which study; and the series' own digest.

It is read when it is wanted, in a walk of its own, so that nothing of a patient lies in memory before. Texts are copied
as they stand, byte for byte: a PACS files an answer with its patient only if name and number are the very same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...limits import Limits
from .container import Container, Meter, walk
from .copied import LONGEST_BYTES, READ
from .elements import Budget, Encoding, Selection, Walk, encoding_of
from .header import ImageHeader
from .image_classes import IMAGE_CLASSES
from .library import data_set, quietly
from .series import FIRST_BYTES, data_set_stream, walk_header

_SELECTION = Selection(READ, frozenset(), frozenset(IMAGE_CLASSES))
_CHUNK_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a series beside its images' places and values.

    Attributes:
        elements: tag -> value as it stands in the header of the first slice, an even number of bytes; without those
            that are too long, with which no segmentation is made.
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
        Malformed: the files are damaged.
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
        for tag in READ:
            item = found.get_item(tag)
            if item is not None and isinstance(item.value, bytes) and len(item.value) <= LONGEST_BYTES:
                values[tag] = item.value + b" " * (len(item.value) % 2)
    return values
