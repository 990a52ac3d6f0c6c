"""Archives of trained models for each backend, made as anybody makes them, and what was measured of their accuracy.

They are allowed to lose anything: what the gate would have said by its defaults is noted beside the numbers, so that
the speed of a backend is known where its accuracy is not good enough.
"""

from __future__ import annotations

import time
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.material import FOLD
from benchmarks.harness.served import MODEL
from nnunet_torchserve.accuracy import ACCURACY_FILE, AccuracyReport
from nnunet_torchserve.backend import Backend
from nnunet_torchserve_tools.accuracy_gate import check, limits_of
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import ModelWarning, ToolError
from nnunet_torchserve_tools.validation_cases import Tolerance, Validation

_ANYTHING = Tolerance(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained model and images of it.

    Attributes:
        title: for the result file.
        folder: nnU-Net's.
        images: that answers are compared on.
        labels: folder with theirs; ``None`` if there are none.
        calibration: of int8.
    """

    title: str
    folder: Path
    images: tuple[Path, ...]
    labels: Path | None
    calibration: tuple[Path, ...]


@dataclass(slots=True)
class Archives:
    """Made when they are first asked for.

    Attributes:
        scratch: where they are put.
        made_s: seconds that each took, with its comparison.
    """

    scratch: Path
    made_s: dict[str, dict[str, float]] = field(default_factory=dict)
    _stores: dict[tuple[str, Backend], Path] = field(default_factory=dict)
    _refused: dict[tuple[str, Backend], str] = field(default_factory=dict)

    def store(self, model: Trained, backend: Backend) -> Path:
        """The folder with a model's archive for a backend.

        Raises:
            ToolError: this machine cannot make it.
        """
        key = (model.title, backend)
        if key in self._refused:
            raise ToolError(self._refused[key])
        if key not in self._stores:
            began = time.perf_counter()
            folder = self.scratch / f"archive_{len(self._stores) + len(self._refused)}"
            is_eager = backend is Backend.EAGER
            request = ArchiveRequest(
                model.folder,
                folder,
                folds=(FOLD,),
                name=MODEL,
                backend=backend,
                calibration=model.calibration if backend is Backend.OPENVINO_INT8 else (),
                validation=None if is_eager else Validation(model.images, model.labels, _ANYTHING),
            )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ModelWarning)
                    make_archives(request)
            except ToolError as error:
                self._refused[key] = str(error)
                raise
            self._stores[key] = folder
            self.made_s.setdefault(model.title, {})[str(backend)] = round(time.perf_counter() - began, 1)
        return self._stores[key]

    def report(self, model: Trained, backend: Backend) -> AccuracyReport:
        """What was measured when it was made.

        Raises:
            ToolError: this machine cannot make it.
        """
        with zipfile.ZipFile(self.store(model, backend) / f"{MODEL}.mar") as archive:
            return AccuracyReport.model_validate_json(archive.read(ACCURACY_FILE))


def accuracy_of(report: AccuracyReport) -> dict[str, Any]:
    """Voxels that differ, means of Dice, and what the gate says by its defaults."""
    summary = report.summary()
    structures: Mapping[str, Any] = summary["structures"]
    found: dict[str, Any] = {
        **{key: summary[key] for key in ("cases", "voxels", "different_voxels", "dice", "structures", "precisions")},
        "gate": gate_of(report, has_labels=report.has_labels),
        "gate_without_labels": gate_of(report, has_labels=False),
    }
    to_labels = [each["dice_to_labels"] for each in structures.values() if each["dice_to_labels"] is not None]
    if to_labels:
        for side in ("eager", "backend"):
            found[f"mean_dice_to_labels_{side}"] = sum(each[side] for each in to_labels) / len(to_labels)
    return found


def gate_of(report: AccuracyReport, *, has_labels: bool) -> str:
    """``passes``, or why it does not, with the default limits."""
    try:
        check(report.model_copy(update={"limits": limits_of(None, has_labels=has_labels)}))
    except ToolError as error:
        return str(error)
    return "passes"
