"""A structure in eager's and a backend's answer to a case, and in somebody's labels of it: what is counted of it.

Only voxels are kept. Dice and what is lost of it follow from them here, so that no two numbers can disagree.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0)]
"""Of voxels, or of layers."""


class Part(BaseModel):
    """Of a report: what is unknown, of another type, or no finite number is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Reference(StrEnum):
    """What a loss of Dice is a loss against."""

    LABELS = "labels"
    """Of somebody who knows: eager's Dice to them less the backend's."""

    EAGER = "eager"
    """Eager's answer, which the backend's should be: 1 less the Dice of the two."""


class LabelVoxels(Part):
    """A structure in a case's labels, in voxels. Those that the labels say nothing of (``ignore``) are in no number.

    Attributes:
        voxels: of the labels.
        eager, backend: of each answer.
        eager_common, backend_common: of each answer, that the labels have too.
    """

    voxels: Count
    eager: Count
    backend: Count
    eager_common: Count
    backend_common: Count

    @model_validator(mode="after")
    def _is_possible(self) -> LabelVoxels:
        if self.eager_common > min(self.voxels, self.eager) or self.backend_common > min(self.voxels, self.backend):
            msg = "an answer has more voxels in common with the labels than there are"
            raise ValueError(msg)
        return self

    @property
    def eager_dice(self) -> float | None:
        """Of eager's answer and the labels."""
        return dice(self.voxels, self.eager, self.eager_common)

    @property
    def backend_dice(self) -> float | None:
        """Of the backend's answer and the labels."""
        return dice(self.voxels, self.backend, self.backend_common)


class StructureAccuracy(Part):
    """A structure in both answers to a case.

    Attributes:
        eager, backend: voxels of each answer.
        common: voxels of both.
        surface_distance_95_mm: the 95 % surface distance; ``None`` if one answer has nothing of the structure.
        labels: what it is like in the case's labels, if there are some.
    """

    eager: Count
    backend: Count
    common: Count
    surface_distance_95_mm: Annotated[float, Field(ge=0)] | None
    labels: LabelVoxels | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> StructureAccuracy:
        if self.common > min(self.eager, self.backend):
            msg = "two answers have more voxels in common than there are"
            raise ValueError(msg)
        if (self.surface_distance_95_mm is None) != (min(self.eager, self.backend) == 0):
            msg = "a surface distance is that of two structures, neither of them empty"
            raise ValueError(msg)
        if self.labels is not None and (self.labels.eager > self.eager or self.labels.backend > self.backend):
            msg = "labels compare more voxels of an answer than it has"
            raise ValueError(msg)
        return self

    @property
    def dice(self) -> float | None:
        """Of the two answers; ``None`` if neither has the structure."""
        return dice(self.eager, self.backend, self.common)

    @property
    def different(self) -> int:
        """Voxels that one answer has and the other has not."""
        return self.eager + self.backend - 2 * self.common

    @property
    def is_labelled(self) -> bool:
        """Whether labels of the case have any of it: without that every answer with it has a Dice of 0 to them."""
        return self.labels is not None and self.labels.voxels > 0

    def reference(self, against: Reference) -> Reference:
        """What its loss is taken against: eager's answer, too, where labels have nothing that could be lost."""
        return Reference.LABELS if against is Reference.LABELS and self.is_labelled else Reference.EAGER

    def loss(self, against: Reference) -> float:
        """What the backend loses; below 0 where it is nearer to the labels than eager.

        Args:
            against: the labels, as far as they have any of it; else eager's answer, as :meth:`reference` says.
        """
        if self.labels is None or self.reference(against) is Reference.EAGER:
            return 1 - _or_one(self.dice)
        return _or_one(self.labels.eager_dice) - _or_one(self.labels.backend_dice)


def dice(first: int, second: int, common: int) -> float | None:
    """Sørensen and Dice's coefficient of two sets; ``None`` of two empty ones, as nnU-Net leaves such out.

    >>> dice(4, 2, 2)
    0.6666666666666666
    """
    return 2 * common / (first + second) if first + second else None


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value
