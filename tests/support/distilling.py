"""Soft targets for the tiny datasets of :mod:`.training`, made of their labels; images for teachers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_torchserve_trainers.soft_target_files import SoftTargets, Teacher, channels_of

from . import volumes
from .odd_models import Json
from .training import CASES, Home

Volume = npt.NDArray[Any]
Teaches = Callable[[Volume, Any], Volume]
"""Labels (1, Z, Y, X) and nnU-Net's label manager -> probabilities (C, Z, Y, X)."""


def label_manager(home: Home) -> Any:
    """nnU-Net's, of a home's dataset."""
    return PlansManager(copy.deepcopy(home.plans)).get_label_manager(home.dataset)


def teacher_of(manager: Any, **other: Any) -> Teacher:
    """One that has these labels, and whatever is given."""
    named: Json = {"name": "a teacher", "digest": f"sha256:{64 * '0'}", "folds": (0, 1), "use_mirroring": True}
    named |= {"reader": "SimpleITKIO"}
    return Teacher(**named | {"has_regions": manager.has_regions, "channels": channels_of(manager)} | other)


def cases_of(home: Home) -> Path:
    """The folder of a home's preprocessed cases."""
    return Path(home.base, home.plans["configurations"][home.task.model.configuration]["data_identifier"])


def teach(home: Home, teaches: Teaches) -> SoftTargets:
    """Give each case of a home soft targets."""
    manager, cases = label_manager(home), cases_of(home)
    targets = SoftTargets.beside(cases)
    targets.begin(teacher_of(manager))
    dataset = nnUNetDatasetBlosc2(str(cases))
    for case in dataset.identifiers:
        labels = np.asarray(dataset.load_case(case)[1][:])
        targets.save(case, teaches(labels, manager).astype(np.float16), home.task.patch)
    return targets


def certain(labels: Volume, manager: Any) -> Volume:
    """What a teacher says who knows the labels: 1 or 0. What has no label he takes for background."""
    if manager.has_regions:
        return np.stack([np.isin(labels[0], region) for region in manager.foreground_regions])
    foreground = np.stack([labels[0] == label for label in manager.all_labels[1:]])
    return np.concatenate((~foreground.any(0, keepdims=True), foreground))


def doubtful(labels: Volume, manager: Any) -> Volume:
    """What a teacher says who is not sure, and differently so in each voxel."""
    known = certain(labels, manager)
    logits = 2 * known + np.random.default_rng(labels.size).normal(0, 1, known.shape)
    if manager.has_regions:
        sigmoids: Volume = 1 / (1 + np.exp(1 - logits))
        return sigmoids
    exponentials = np.exp(logits - logits.max(0))
    softmax: Volume = exponentials / exponentials.sum(0)
    return softmax


def one_process(patch: pytest.MonkeyPatch) -> None:
    """nnU-Net starts twelve to match a few file names, which take longer to be forked than all else in a test."""
    patch.setattr(create_lists_from_splitted_dataset_folder, "__defaults__", (None, 1))


SPACING = 1.5
"""mm of the images of :func:`write_dataset`."""


def write_dataset(folder: Path, plans: Json, dataset: Json, orientation: str = "RAS") -> Path:
    """nnU-Net's folders ``raw`` and ``preprocessed`` of a dataset of blobs in a black border, which is cropped.

    Args:
        folder: that they are put in.
        plans: of the student.
        dataset: dataset.json.
        orientation: towards which the stored axes x, y, z run: R or L, A or P, S or I.

    Returns:
        The plans in the preprocessed folder, by which nothing is preprocessed yet.
    """
    raw, base = (folder / each / str(plans["dataset_name"]) for each in ("raw", "preprocessed"))
    affine = np.diag([*(SPACING if axis in "RAS" else -SPACING for axis in orientation), 1])
    for number in range(CASES):
        image, labels = volumes.blobs((21, 18, 14), number)
        for each in (image, labels):
            each[:3], each[:, -2:] = 0, 0
        volumes.write(raw / "imagesTr", f"case_{number}_0000.nii.gz", volumes.nifti_gz(image, affine))
        volumes.write(raw / "labelsTr", f"case_{number}.nii.gz", volumes.nifti_gz(labels, affine))
    base.mkdir(parents=True)
    (base / "dataset.json").write_text(json.dumps(dataset))
    (base / f"{plans['plans_name']}.json").write_text(json.dumps(plans))
    return base / f"{plans['plans_name']}.json"


def preprocess(plans_file: Path, configuration: str) -> None:
    """As ``nnUNetv2_preprocess``, of such a dataset."""
    plans, dataset = (json.loads(file.read_text()) for file in (plans_file, plans_file.with_name("dataset.json")))
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    raw = plans_file.parents[2] / "raw" / plans_file.parent.name
    for number in range(CASES):
        target = plans_file.parent / settings.data_identifier / f"case_{number}"
        target.parent.mkdir(exist_ok=True)
        images, labels = (
            [str(raw / "imagesTr" / f"{target.name}_0000.nii.gz")],
            raw / "labelsTr" / f"{target.name}.nii.gz",
        )
        DefaultPreprocessor(verbose=False).run_case_save(str(target), images, str(labels), manager, settings, dataset)
