"""The slices of a volume and what they were made of: what an answer refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .header import ImageHeader
from .planes import Plane


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice of the source.

    Attributes:
        plane: where it lies.
        image: the object that it is of.
        frame: its number there, from 1; ``None`` for an object of one frame.
    """

    plane: Plane
    image: ImageHeader
    frame: int | None


def slices_of(images: Sequence[ImageHeader], order: Sequence[int]) -> list[Slice]:
    """The slices of a series from the first to the last.

    Args:
        images: its objects.
        order: of their frames, see :class:`~.planes.Stack`.
    """
    frames = [
        Slice(plane, image, number if len(image.planes) > 1 else None)
        for image in images
        for number, plane in enumerate(image.planes, start=1)
    ]
    return [frames[number] for number in order]
