"""Reports of a backend's accuracy, as if something had been measured."""

from __future__ import annotations

from collections.abc import Mapping

from nnunet_torchserve.accuracy import AccuracyReport, CaseAccuracy, DiceLimits
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.structure_accuracy import LabelVoxels, Reference, StructureAccuracy

OPENVINO = Backend.OPENVINO_FLOAT32
FILES = {"members/m/fold_0.safetensors": "0" * 64}
VOXELS = 10_000


def structure(eager: int, backend: int, common: int, labels: LabelVoxels | None = None) -> StructureAccuracy:
    """Of so many voxels."""
    distance = None if min(eager, backend) == 0 else 0.0 if eager == backend == common else 1.5
    return StructureAccuracy(
        eager=eager, backend=backend, common=common, surface_distance_95_mm=distance, labels=labels
    )


def to_labels(eager: int, backend: int, *, voxels: int = 100, of_each: int = 100) -> LabelVoxels:
    """Answers of so many voxels each, of which so many are right."""
    return LabelVoxels(voxels=voxels, eager=of_each, backend=of_each, eager_common=eager, backend_common=backend)


def not_in_labels(eager: int, backend: int) -> LabelVoxels:
    """Labels without the structure, and answers with so many voxels of it."""
    return LabelVoxels(voxels=0, eager=eager, backend=backend, eager_common=0, backend_common=0)


def report(
    *cases: Mapping[str, StructureAccuracy],
    against: Reference = Reference.EAGER,
    mean: float = 0.005,
    most: float = 0.01,
    unlabelled: float = 0.01,
    backend: Backend = OPENVINO,
    files: Mapping[str, str] = FILES,
    calibrated_on: tuple[str, ...] | None = None,
) -> AccuracyReport:
    """Of cases ``case_0``, ``case_1``, …, each with these structures; as many voxels as possible are different.

    The sha256 of a case's image is its number, with zeros before it.
    """
    return AccuracyReport(
        report_version=1,
        backend=backend,
        files=dict(files),
        processor="a processor",
        software={"openvino": "2026.4.1"},
        max_patch_batch=1,
        calibrated_on=calibrated_on,
        limits=DiceLimits(against=against, mean=mean, structure=most, unlabelled=unlabelled),
        cases=tuple(
            CaseAccuracy(
                name=f"case_{number}",
                images=(f"{number:064}",),
                voxels=VOXELS,
                different=sum(each.different for each in case.values()),
                structures=dict(case),
            )
            for number, case in enumerate(cases)
        ),
    )
