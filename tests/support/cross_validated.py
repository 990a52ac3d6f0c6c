"""A results folder of nnU-Net's as a cross-validation leaves it, small enough for nnU-Net to find the best in seconds.

Networks are untrained; the predictions of their validation are made up, so that a test decides which model is the best.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.pool
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.evaluation import find_best_configuration as best
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from .odd_models import OddModel

DATASET = "Dataset950_Odd"
FOLDS = (0, 1)
FLAT = OddModel(2, folds=FOLDS)
LOWRES = OddModel(named="3d_lowres", spacing=3.0, folds=FOLDS)
CASCADE = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres", folds=FOLDS)
MODELS = (FLAT, LOWRES, CASCADE)

_CLASSES = 4
_STRAY = (slice(14, 17), slice(16, 19), slice(16, 19))


@dataclass(frozen=True)
class Mistake:
    """Where a model is wrong: it sees nothing in some planes.

    Attributes:
        planes: from and to which.
        certainty: the probability of being nothing that it gives there.
    """

    planes: tuple[int, int] = (0, 0)
    certainty: float = 0.6


def folder_name(model: OddModel) -> str:
    """TRAINER__PLANS__CONFIGURATION."""
    return f"{model.trainer}__nnUNetPlans__{model.configuration}"


@dataclass(frozen=True)
class Home:
    """nnU-Net's three folders, and which models are in there."""

    folder: Path
    models: tuple[OddModel, ...]

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def dataset(self) -> Path:
        return self.results / DATASET

    def model(self, model: OddModel) -> Path:
        return self.dataset / folder_name(model)

    def environment(self) -> dict[str, str]:
        """Which variables name them."""
        return {f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}


def cross_validated(folder: Path, mistakes: Sequence[tuple[OddModel, Mistake]]) -> Home:
    """Write it.

    Args:
        folder: where ``raw``, ``preprocessed`` and ``results`` go.
        mistakes: each model, and what its predictions lack; all of them have a stray component.
    """
    home = Home(folder, tuple(model for model, _ in mistakes))
    plans = mistakes[0][0].plans()
    for model, _ in mistakes:
        plans["configurations"] |= model.plans()["configurations"]
    for part, name in (("preprocessed", "gt_segmentations"), ("raw", "labelsTr")):
        (folder / part / DATASET / name).mkdir(parents=True)
        for fold in FOLDS:
            _write(_truth(fold), folder / part / DATASET / name / f"case_{fold}.nii.gz")
    (folder / "preprocessed" / DATASET / "nnUNetPlans.json").write_text(json.dumps(plans))
    reader = SimpleITKIO()
    for model, mistake in mistakes:
        trained = model.write(home.results)
        (trained / "plans.json").write_text(json.dumps(plans))
        for fold in FOLDS:
            place = trained / f"fold_{fold}" / "validation"
            place.mkdir()
            probabilities = _probabilities(_truth(fold), mistake)
            file = place / f"case_{fold}.nii.gz"
            _write(probabilities.argmax(0).astype(np.uint8), file)
            np.savez_compressed(place / f"case_{fold}.npz", probabilities=probabilities)
            save_pickle(reader.read_seg(str(file))[1], str(place / f"case_{fold}.pkl"))
            (place / "summary.json").write_text("{}")
            (trained / f"fold_{fold}" / "progress.png").write_bytes(b"")
        (trained / "dataset_fingerprint.json").write_text("{}")
    return home


def find_best(home: Home, patch: pytest.MonkeyPatch, **how: Any) -> None:
    """``nnUNetv2_find_best_configuration``; its pools are threads: processes would import it all again."""
    context = types.SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
    models = [
        {"plans": "nnUNetPlans", "configuration": model.configuration, "trainer": model.trainer}
        for model in home.models
    ]
    with patch.context() as inside:
        inside.setattr(multiprocessing, "get_context", lambda _method: context)
        inside.setattr(best, "print_inference_instructions", lambda *_, **__: None)  # which leaves its file open
        for name, value in home.environment().items():
            inside.setenv(name, value)
        best.find_best_configuration(DATASET, models, num_processes=2, folds=list(FOLDS), **how)


def _truth(fold: int) -> npt.NDArray[np.uint8]:
    """Three nested boxes."""
    labels = np.zeros((18, 20, 22), np.uint8)
    labels[2 : 12 + fold, 2:12, 2:12], labels[4:9, 4:9, 4:9], labels[6:8, 6:8, 6:8] = 1, 2, 3
    return labels


def _probabilities(truth: npt.NDArray[np.uint8], mistake: Mistake) -> npt.NDArray[np.float32]:
    probabilities = np.full((_CLASSES, *truth.shape), 0.1 / 3, np.float32)
    seen = truth.copy()
    seen[_STRAY] = 1
    np.put_along_axis(probabilities, seen[None].astype(np.int64), 0.9, 0)
    wrong = np.full((_CLASSES, *truth.shape), 0.0, np.float32)
    np.put_along_axis(wrong, seen[None].astype(np.int64), 1 - mistake.certainty, 0)
    wrong[0] = mistake.certainty
    planes = slice(*mistake.planes)
    probabilities[:, planes] = np.where(seen > 0, wrong, probabilities)[:, planes]
    return probabilities


def _write(labels: npt.NDArray[np.uint8], file: Path) -> None:
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(file))
