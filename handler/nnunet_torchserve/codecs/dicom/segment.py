"""The segments of a segmentation: which of a model's structures become one, with which number and codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import BadOption
from ...options import SegType
from ...painting import Painting
from ...segments import UNCODED, Codes, SegmentCodes


@dataclass(frozen=True, slots=True)
class Segment:
    """One structure as a segment.

    Attributes:
        number: from 1, without gaps (PS3.3, C.8.20.2).
        name: in dataset.json.
        values: of the label map that make it up.
        codes: what it is; ``None`` if nobody said it.
    """

    number: int
    name: str
    values: tuple[int, ...]
    codes: SegmentCodes | None

    @property
    def said(self) -> SegmentCodes:
        """What it is, in the codes that say least if nobody said it."""
        return self.codes or UNCODED


def segments_of(painting: Painting, codes: Codes) -> list[Segment]:
    """All structures of a model, found or not, ordered by their values: labels 1, 2, 3 are segments 1, 2, 3.

    Args:
        painting: what the values of its label maps mean; checked by :func:`check_segments`.
        codes: what its structures are.
    """
    known = [(values, name) for name, values in painting.structures.items() if values is not None]
    ordered = sorted(known, key=lambda each: each[0])
    return [Segment(n, name, values, codes.get(name)) for n, (values, name) in enumerate(ordered, start=1)]


def check_segments(painting: Painting, kind: SegType) -> None:
    """Refuse a segmentation that could not say what the label map says.

    Raises:
        BadOption: a structure cannot be told from others; or voxels are in several, where each may be in one only.
    """
    if unknown := [name for name, values in painting.structures.items() if values is None]:
        msg = f"the label map of this model does not tell {unknown[0]!a} from others: no DICOM segmentation can "
        msg += "be made of it; take another output_format, nii.gz for example"
        raise BadOption(msg)
    if not painting.structures:
        msg = "this model has no structures, so it makes no DICOM segmentation; take another output_format"
        raise BadOption(msg)
    if kind is SegType.LABELMAP and (names := _shared(painting)):
        msg = f"seg_type labelmap gives each voxel one segment, and {names} have voxels in common; take binary"
        raise BadOption(msg)


def _shared(painting: Painting) -> str:
    """Two structures that have a value in common, in words; empty if none have."""
    owner: dict[int, str] = {}
    for name, values in painting.structures.items():
        for value in values or ():
            if (other := owner.setdefault(value, name)) != name:
                return f"{other!a} and {name!a}"
    return ""


def uncoded(segments: Sequence[Segment]) -> int:
    """How many of them nobody coded."""
    return sum(segment.codes is None for segment in segments)
