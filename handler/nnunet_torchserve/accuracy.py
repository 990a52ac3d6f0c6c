"""How far a backend's answers are from eager's, as it was measured: ``accuracy.json`` of an archive.

A backend that does not compute as stock does is worth as much as what is known of its answers. The report holds what
was counted, voxels, and nothing that can be worked out from that: Dice and the means are made of it here, so that no
two numbers can disagree. It names the files that were run by their checksums. An archive whose weights, graphs or
backend are others than the report's is refused: nobody may read a measured number of something else.

It holds no name of a case, which might be a patient's: clients may ask a model for what is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from .backend import Backend, StoredBackend
from .errors import BundleError
from .member_description import MEMBERS_FOLDER
from .own_code import CODE_FOLDER
from .structure_accuracy import Count, Part, Reference, StructureAccuracy

ACCURACY_FILE = "accuracy.json"
REPORT_VERSION: Final = 1

_DECIDING = (f"{MEMBERS_FOLDER}/", f"{CODE_FOLDER}/")
"""Where an archive keeps what decides a segmentation: plans, weights, graphs, somebody's own code."""

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Loss = Annotated[float, Field(ge=0, le=1)]


class DiceLimits(Part):
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


class CaseAccuracy(Part):
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
    different: Count
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


class AccuracyReport(Part):
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
        calibrated_on: sha256 of the image files that the backend was calibrated on; ``None`` of one that is not
            calibrated, or of an archive that does not say it.
        limits: what might have been lost.
        cases: all that were predicted, by both, as a request without options is.
    """

    report_version: Literal[1]
    backend: Backend
    files: dict[str, _Digest]
    processor: str
    software: dict[str, str]
    max_patch_batch: Annotated[int, Field(gt=0)]
    precisions: dict[str, Count] | None = None
    calibrated_on: tuple[_Digest, ...] | None = None
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

    @property
    def calibrated_cases(self) -> int | None:
        """Cases that the backend was calibrated on, too: of these it loses less than of others; ``None``: not known."""
        if self.calibrated_on is None:
            return None
        seen = set(self.calibrated_on)
        return sum(not seen.isdisjoint(case.images) for case in self.cases)

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
            "calibrated_cases": self.calibrated_cases,
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


def _mean(values: Iterator[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
