"""How far a backend's answers are from eager's, as it was measured: ``accuracy.json`` of an archive.

A backend that does not compute as stock does is worth as much as what is known of its answers. The report holds what
was counted, voxels, and nothing that can be worked out from that: Dice and the means are made of it here, so that no
two numbers can disagree. It names the files that were run by their checksums. An archive whose weights, graphs or
backend are others than the report's is refused: nobody may read a measured number of something else.

It holds no name of a case, which might be a patient's: clients may ask a model for what is in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from statistics import fmean
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .backend import Backend, StoredBackend, names_of
from .errors import BundleError
from .member_description import MEMBERS_FOLDER
from .own_code import CODE_FOLDER

ACCURACY_FILE = "accuracy.json"
REPORT_VERSION: Final = 1

_DECIDING = (f"{MEMBERS_FOLDER}/", f"{CODE_FOLDER}/")
"""Where an archive keeps what decides a segmentation: plans, weights, graphs, somebody's own code."""

INT8_NAMES = frozenset({"u8", "i8"})
"""OpenVINO's names of whole numbers of 8 bits."""

_HEADER_DIGITS = 4
_ROUNDING = 1e-9
"""Less than what one voxel of any image can do to a Dice of so many digits, more than what float64 does."""

_Count = Annotated[int, Field(ge=0)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Loss = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Reference(StrEnum):
    """What a loss of Dice is a loss against."""

    LABELS = "labels"
    """Of somebody who knows: eager's Dice to them less the backend's."""

    EAGER = "eager"
    """Eager's answer, which the backend's should be: 1 less the Dice of the two."""


class DiceLimits(_Part):
    """What may be lost, in Dice.

    Attributes:
        against: what it is lost against.
        mean: over all structures, of each structure's mean over the cases.
        structure: of one structure in one case.
        unlabelled: the same to eager's answer, in a case whose labels have nothing of the structure; without labels
            there is no other, and it is ``structure``.
    """

    against: Reference
    mean: _Loss
    structure: _Loss
    unlabelled: _Loss


class LabelVoxels(_Part):
    """A structure in a case's labels, in voxels. Those that the labels say nothing of (``ignore``) are in no number.

    Attributes:
        voxels: of the labels.
        eager, backend: of each answer.
        eager_common, backend_common: of each answer, that the labels have too.
    """

    voxels: _Count
    eager: _Count
    backend: _Count
    eager_common: _Count
    backend_common: _Count

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


class StructureAccuracy(_Part):
    """A structure in both answers to a case.

    Attributes:
        eager, backend: voxels of each answer.
        common: voxels of both.
        surface_distance_95_mm: the 95 % surface distance; ``None`` if one answer has nothing of the structure.
        labels: what it is like in the case's labels, if there are some.
    """

    eager: _Count
    backend: _Count
    common: _Count
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


class CaseAccuracy(_Part):
    """Both answers to one case.

    Attributes:
        name: of the case; ``None`` in an archive, which clients may ask.
        images: sha256 of each image file.
        voxels: of the image.
        different: of them, those that have another label in the backend's answer.
        structures: name -> what was counted.
    """

    name: str | None
    images: Annotated[tuple[_Digest, ...], Field(min_length=1)]
    voxels: Annotated[int, Field(gt=0)]
    different: _Count
    structures: Annotated[dict[str, StructureAccuracy], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_possible(self) -> CaseAccuracy:
        most = max(each.different for each in self.structures.values())
        if not most <= self.different <= self.voxels:
            msg = f"{self.different} voxels are different, but {most} of a structure are, and there are {self.voxels}"
            raise ValueError(msg)
        if max(max(each.eager, each.backend) for each in self.structures.values()) > self.voxels:
            msg = f"a structure has more voxels than the image, which has {self.voxels}"
            raise ValueError(msg)
        return self


class AccuracyReport(_Part):
    """The content of ``accuracy.json``.

    Attributes:
        report_version: of this format.
        backend: that was compared with eager.
        files: of the archive -> sha256: those that were run.
        processor: whose precision it was.
        software: package -> version.
        max_patch_batch: patches in a forward pass of the backend.
        precisions: name of a precision -> how many convolutions and matrix products of all networks ran in it, read
            from what was compiled; ``None`` of a backend that does not say it.
        limits: what might have been lost.
        cases: all that were predicted, by both, as a request without options is.
    """

    report_version: Literal[1]
    backend: Backend
    files: dict[str, _Digest]
    processor: str
    software: dict[str, str]
    max_patch_batch: Annotated[int, Field(gt=0)]
    precisions: dict[str, _Count] | None = None
    limits: DiceLimits
    cases: Annotated[tuple[CaseAccuracy, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_one_measurement(self) -> AccuracyReport:
        if self.backend is Backend.EAGER:
            msg = f"{Backend.EAGER} is what others are compared with"
            raise ValueError(msg)
        if len({tuple(case.structures) for case in self.cases}) != 1:
            msg = "the cases have other structures"
            raise ValueError(msg)
        if len({each.labels is None for case in self.cases for each in case.structures.values()}) != 1:
            msg = "some of it has labels, and some has none"
            raise ValueError(msg)
        if self.limits.against is Reference.LABELS and not self.has_labels:
            msg = "there are no labels that anything could be lost against"
            raise ValueError(msg)
        return self

    @property
    def structures(self) -> tuple[str, ...]:
        """Names."""
        return tuple(self.cases[0].structures)

    @property
    def has_labels(self) -> bool:
        """Whether somebody's labels were compared too."""
        return next(iter(self.cases[0].structures.values())).labels is not None

    def of(self, structure: str) -> list[StructureAccuracy]:
        """A structure in each case."""
        return [case.structures[structure] for case in self.cases]

    def seen(self, structure: str) -> bool:
        """Whether any answer has it: of one that none has, nothing is known."""
        return any(each.dice is not None for each in self.of(structure))

    @property
    def dice(self) -> float | None:
        """Mean Dice to eager: over structures, of the mean over the cases that have one; ``None`` if there is none."""
        return _mean(_mean(each.dice for each in self.of(structure)) for structure in self.structures)

    def mean_loss(self) -> float:
        """Over all structures, of each structure's mean over the cases that can tell.

        Those are cases whose labels have it, or without labels those in which an answer has it. What a structure gains
        is no other one's: a mean below 0 counts as 0.
        """
        return _mean(self._losses()) or 0.0

    def _losses(self) -> Iterator[float | None]:
        """Of each structure."""
        against = self.limits.against
        is_labels = against is Reference.LABELS
        for name in self.structures:
            tell = (each for each in self.of(name) if (each.is_labelled if is_labels else each.dice is not None))
            loss = _mean(each.loss(against) for each in tell)
            yield None if loss is None else max(0.0, loss)

    def without_names(self) -> AccuracyReport:
        """The same with no name of a case, as an archive keeps it."""
        return self.model_copy(update={"cases": tuple(case.model_copy(update={"name": None}) for case in self.cases)})

    def summary(self) -> dict[str, Any]:
        """What it comes to, as JSON: of each structure means, and what was worst."""
        return {
            "backend": str(self.backend),
            "cases": len(self.cases),
            "voxels": sum(case.voxels for case in self.cases),
            "different_voxels": sum(case.different for case in self.cases),
            "dice": self.dice,
            "structures": {name: self._structure(name) for name in self.structures},
            "limits": self.limits.model_dump(mode="json"),
            "processor": self.processor,
            "software": self.software,
            "max_patch_batch": self.max_patch_batch,
            "precisions": self.precisions,
        }

    def _structure(self, name: str) -> dict[str, Any]:
        found = self.of(name)
        labels = [each.labels for each in found if each.labels is not None and each.is_labelled]
        to_labels = {
            "eager": _mean(each.eager_dice for each in labels),
            "backend": _mean(each.backend_dice for each in labels),
        }
        return {
            "dice": _mean(each.dice for each in found),
            "worst_dice": min((each.dice for each in found if each.dice is not None), default=None),
            "worst_surface_distance_95_mm": max(
                (each.surface_distance_95_mm for each in found if each.surface_distance_95_mm is not None), default=None
            ),
            "dice_to_labels": to_labels if labels else None,
        }


def dice(first: int, second: int, common: int) -> float | None:
    """Sørensen and Dice's coefficient of two sets; ``None`` of two empty ones, as nnU-Net leaves such out.

    >>> dice(4, 2, 2)
    0.6666666666666666
    """
    return 2 * common / (first + second) if first + second else None


def whole_layers(precisions: Mapping[str, int]) -> tuple[int, int]:
    """Of layers that compute: how many do so in int8, and how many there are.

    >>> whole_layers({"f32": 2, "u8": 10, "i8": 1})
    (11, 13)
    """
    return sum(count for name, count in precisions.items() if name in INT8_NAMES), sum(precisions.values())


def deciding_files(files: Mapping[str, str]) -> dict[str, str]:
    """Those of an archive's files, with their sha256, that decide what is predicted."""
    return {name: digest for name, digest in files.items() if name.startswith(_DECIDING)}


def read_accuracy(text: bytes, stored: StoredBackend | None, files: Mapping[str, str]) -> AccuracyReport:
    """The report of an archive.

    Args:
        text: of ``accuracy.json``.
        stored: what the archive holds for another backend than eager.
        files: of the archive -> sha256.

    Raises:
        BundleError: it is no report, of another version, contradicts itself, or was made of another backend or other
            files than the archive has.
    """
    try:
        report = AccuracyReport.model_validate_json(text)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        msg = f"{ACCURACY_FILE} is not valid: {where + ': ' if where else ''}{first['msg']}"
        raise BundleError(msg) from None
    if stored is None or report.backend is not stored.backend:
        has = Backend.EAGER if stored is None else stored.backend
        msg = f"{ACCURACY_FILE} was measured with {report.backend}, the archive is made for {has}; make it again"
        raise BundleError(msg)
    if report.files != deciding_files(files):
        msg = f"{ACCURACY_FILE} was measured with other weights or graphs than the archive holds; make it again"
        raise BundleError(msg)
    return report


def said_of(backends: Collection[str], measured: AccuracyReport | None) -> str:
    """What ran the networks, for a header, with what is known of its answers.

    Args:
        backends: what ran.
        measured: the archive's report, of an answer that was made as those were that it compares.

    >>> said_of({Backend.EAGER}, None)
    'eager'
    """
    names = names_of(backends)
    if measured is None or set(backends) != {measured.backend} or (known := measured.dice) is None:
        return names
    return f"{names}; dice={rounded_down(known, different=sum(case.different for case in measured.cases))}"


def rounded_down(value: float, *, different: int = 0) -> str:
    """A Dice with four digits, and 1.0000 only for 1.

    Args:
        value: the Dice.
        different: voxels that it is about; if there is any, it is not 1, however many others there are.

    >>> rounded_down(0.99999), rounded_down(1.0), rounded_down(0.9989), rounded_down(1.0, different=1)
    ('0.9999', '1.0000', '0.9989', '0.9999')
    """
    scale = 10**_HEADER_DIGITS
    most = scale - 1 if different else scale
    return f"{min(math.floor(value * scale + _ROUNDING), most) / scale:.{_HEADER_DIGITS}f}"


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


def _mean(values: Iterator[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
