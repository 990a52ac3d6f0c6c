"""Whole trainings of a region model: the loss curve is stock's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_torchserve_trainers.region_trainers import nnUNetTrainerRegionBitmask, nnUNetTrainerRegionLabelmap
from support.training import IGNORE, REGIONS, Task, at_home, named_folders, same_everywhere, seed

EPOCHS = 2
CURVES = ("train_losses", "val_losses", "mean_fg_dice", "dice_per_class_or_region")
ROUNDING = 1e-5

pytestmark = pytest.mark.long  # test_steps_give_stocks_losses_counts_and_weights guards single steps


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


def curves(make: Callable[[type], Any], kind: type, steps: int) -> dict[str, Any]:
    """What a training logs."""
    seed(11)
    trainer = make(kind)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, steps, 2
    trainer.run_training()
    return {name: np.asarray(trainer.logger.get_value(name, step=None)) for name in CURVES}


def assert_same_curves(make: Callable[[type], Any], steps: int) -> None:
    expected = curves(make, nnUNetTrainer, steps)
    assert len(set(expected["train_losses"].tolist())) == EPOCHS, "a curve that does not move proves nothing"
    for kind in (nnUNetTrainerRegionLabelmap, nnUNetTrainerRegionBitmask):
        found = curves(make, kind, steps)
        for name in CURVES:
            np.testing.assert_allclose(found[name], expected[name], rtol=ROUNDING, err_msg=f"{kind.__name__} {name}")


@pytest.mark.parametrize("ignore", [{}, IGNORE])
def test_two_epochs_of_a_small_model(ignore: dict[str, int], tmp_path: Path) -> None:
    with at_home(tmp_path, Task(REGIONS | ignore, (16, 16, 16))) as home:
        assert_same_curves(home.trainer, steps=4)


@pytest.mark.material
def test_two_epochs_of_the_trained_region_model(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its trained weights, on two images of the material."""
    name, configuration = "Dataset502_BrainRegions", "3d_fullres"
    trained = material / "models" / name / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    images = material / "images" / name
    base = tmp_path / "preprocessed" / name
    for variable, value in named_folders(tmp_path).items():
        monkeypatch.setenv(variable, value)
    plans, dataset = load_json(str(trained / "plans.json")), load_json(str(trained / "dataset.json"))
    manager = PlansManager(copy.deepcopy(plans))
    settings = manager.get_configuration(configuration)
    cases = base / settings.data_identifier
    cases.mkdir(parents=True)
    (base / "dataset_fingerprint.json").write_text("{}")
    for case in ("test_000", "test_001"):
        channels = [str(images / f"{case}_{channel:04d}.nii.gz") for channel in range(2)]
        labels = str(images / "labels" / f"{case}.nii.gz")
        preprocessor = DefaultPreprocessor(verbose=False)
        preprocessor.run_case_save(str(cases / case), channels, labels, manager, settings, dataset)
    weights = torch.load(trained / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]

    def make(kind: type) -> Any:
        given = copy.deepcopy(plans) | {"continue_training": False}
        trainer = kind(given, configuration, "all", copy.deepcopy(dataset), torch.device("cpu"))
        trainer.initialize()
        trainer.network.load_state_dict(weights)
        return trainer

    assert_same_curves(make, steps=6)
