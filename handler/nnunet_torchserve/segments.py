"""What a model's structures are, in codes that other programs understand; ``segments.json`` of an archive.

A name in dataset.json is for people. Viewers, PACS and registries go by coded concepts (SNOMED CT mostly), and no code
may be guessed from a name: the owner of a model writes them down (``archive --segments FILE``), with
``nnunet-torchserve segments`` for a proposal.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

SEGMENTS_FILE = "segments.json"

_Text = Annotated[str, Field(pattern=r"^[\x20-\x5b\x5d-\x7e]+$")]
"""Printable ASCII without a backslash, which separates values in DICOM."""

_Byte = Annotated[int, Field(ge=0, le=255)]

_GOLDEN_ANGLE = 0.381966
"""Of a circle of hues: whatever their number, neighbours are far apart."""


class Code(BaseModel):
    """A coded concept (PS3.3, section 8): what ``value`` means in ``scheme``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    value: Annotated[_Text, Field(max_length=16)]
    scheme: Annotated[_Text, Field(max_length=16)]
    meaning: Annotated[_Text, Field(max_length=64)]


class SegmentCodes(BaseModel):
    """What one structure is.

    Attributes:
        category: of which kind (PS3.16, CID 7150): an anatomical structure, a morphologically abnormal one, a device …
        type: what it is (CID 7151).
        laterality: on which side (CID 244), where it is one of two.
        region: where in the body it is (CID 4), for what may be anywhere, as a tumour.
        color: red, green and blue to show it in, 0 to 255.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    category: Code
    type: Code
    laterality: Code | None = None
    region: Code | None = None
    color: Annotated[tuple[_Byte, _Byte, _Byte], Field(strict=False)] | None = None


Codes = Mapping[str, SegmentCodes]
"""Name of a structure -> what it is."""

_TISSUE = Code(value="85756007", scheme="SCT", meaning="Tissue")
UNCODED = SegmentCodes(category=_TISSUE, type=_TISSUE)
"""Of a structure that nobody coded: the kind and type that say least, as dcmqi and 3D Slicer use them."""

_ADAPTER: TypeAdapter[dict[str, SegmentCodes]] = TypeAdapter(dict[str, SegmentCodes])


def read_segments(text: bytes) -> Codes:
    """The content of a ``segments.json``.

    Args:
        text: JSON: name -> :class:`SegmentCodes`.

    Raises:
        ValueError: it is none; the message says what and where.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        msg = f"{where + ': ' if where else ''}{first['msg']}"
        raise ValueError(msg) from None


def color_of(number: int, codes: SegmentCodes) -> tuple[int, int, int]:
    """Red, green and blue of the segment of this number: its own, else one that is unlike its neighbours'."""
    if codes.color is not None:
        return codes.color
    hue = number * _GOLDEN_ANGLE % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.65, 0.85)[number % 2], 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
