"""A model that was trained with these trainers is a stock model: predicted, exported and served without their files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)

from nnunet_torchserve.request import Request
from nnunet_torchserve_client.answers import Answer
from nnunet_torchserve_client.choosing import Wanted, check, choose, wanted_of_folder
from nnunet_torchserve_client.description import read_description
from nnunet_torchserve_client.errors import WrongModel
from nnunet_torchserve_client.model_folder import ModelFolder
from nnunet_torchserve_tools.zip_source import models_in
from nnunet_torchserve_trainers.region_targets import RegionLabelmapMixin
from nnunet_torchserve_trainers.region_trainers import nnUNetTrainerRegionBitmask, nnUNetTrainerRegionLabelmap
from nnunet_torchserve_trainers.stock_name import network_trainer_name
from support import stock, volumes
from support.packaged import pipeline_of
from support.training import REGIONS, Home, Task, at_home, seed

BEST, FINAL = "checkpoint_best.pth", "checkpoint_final.pth"
ENSEMBLE_FOLD = 0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Without nnUNet_extTrainer, as in every test."""
    with at_home(tmp_path_factory.mktemp("home"), Task(REGIONS, (16, 16))) as made:
        (made.base / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
        yield made


def short(trainer: Any, epochs: int = 1) -> Any:
    """One step an epoch."""
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 1, 1
    return trainer


@pytest.fixture(scope="module")
def trained(home: Home) -> Path:
    """The model folder of a whole training."""
    seed(0)
    trainer = short(home.trainer(nnUNetTrainerRegionLabelmap, ENSEMBLE_FOLD))
    trainer.run_training()
    return Path(trainer.output_folder_base)


def load(file: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(file, weights_only=False)
    return checkpoint


def test_the_checkpoint_is_stocks_but_the_folder_says_how_it_was_trained(trained: Path, home: Home) -> None:
    fold = trained / "fold_0"
    assert trained.name == "nnUNetTrainerRegionLabelmap__nnUNetPlans__2d"
    assert {file.name for file in fold.glob("checkpoint*")} == {BEST, FINAL}
    stocks = home.trainer(nnUNetTrainer, ENSEMBLE_FOLD)
    stocks.initialize()
    stocks.save_checkpoint(str(fold / "stock.pth"))
    expected = load(fold / "stock.pth")
    for name in (BEST, FINAL):
        found = load(fold / name)
        assert found["trainer_name"] == "nnUNetTrainer"
        assert found.keys() == expected.keys()
        assert found["init_args"].keys() == expected["init_args"].keys()
        assert found["network_weights"].keys() == expected["network_weights"].keys()


def test_it_goes_on_from_there(trained: Path, home: Home) -> None:
    trainer = short(home.trainer(nnUNetTrainerRegionLabelmap, ENSEMBLE_FOLD), epochs=2)
    trainer.load_checkpoint(str(trained / "fold_0" / FINAL))
    weights = load(trained / "fold_0" / FINAL)["network_weights"]
    assert trainer.current_epoch == 1
    assert all(torch.equal(each, weights[name]) for name, each in trainer.network.state_dict().items())
    trainer.on_train_start()
    trainer.train_step(next(trainer.dataloader_train))


def test_it_is_predicted_and_served_by_whoever_has_no_such_trainer(trained: Path, tmp_path: Path) -> None:
    images = [volumes.blobs((24, 26, 4), seed=number)[0].astype(np.float32) for number in (3, 4)]
    bodies = [volumes.nifti_gz(image, volumes.oblique((1.5, 1.5, 3.0), angle=0.0)) for image in images]
    files = [volumes.write(tmp_path, f"case_{number:04d}.nii.gz", body) for number, body in enumerate(bodies)]
    expected = stock.predict(trained, files, probabilities=False).labels
    assert len(np.unique(expected)) > 1
    pipeline = pipeline_of(trained, tmp_path)
    parts = {f"image_{number:04d}": body for number, body in enumerate(bodies)}
    response = pipeline.answer(Request(parts | {"options": b'{"output_format": "npz"}'}, {}))
    with np.load(io.BytesIO(response.body)) as answer:
        np.testing.assert_array_equal(answer["labels"], expected)


def test_a_client_finds_it_by_the_folders_name(trained: Path, home: Home, tmp_path: Path) -> None:
    """As ``nnUNetv2_predict -tr`` does, whatever the checkpoints say."""
    described = json.loads(pipeline_of(trained, tmp_path).answer(Request({"options": b'{"describe": true}'}, {})).body)
    names = ("name", "version", "digest", "dataset", "trainer", "folder_trainer", "plans", "configuration", "folds")
    served = [{name: described[name] for name in (*names, "checkpoint")}]
    document = json.dumps(described | {"served": served}).encode()
    description = read_description(Answer("", document, "application/json", {}, "", ""))
    assert (described["trainer"], described["folder_trainer"]) == ("nnUNetTrainer", "nnUNetTrainerRegionLabelmap")
    wanted = Wanted(home.plans["dataset_name"], "nnUNetTrainerRegionLabelmap", "nnUNetPlans", "2d")
    assert choose(wanted, (ENSEMBLE_FOLD,), None, description).model_folder == trained.name
    check(wanted_of_folder(trained, FINAL), None, description)
    ModelFolder.read(trained, FINAL).check(description, FINAL, None)
    with pytest.raises(WrongModel, match="trainer nnUNetTrainerRegionLabelmap, not nnUNetTrainerOther"):
        check(replace(wanted, trainer="nnUNetTrainerOther"), None, description)


def test_nnunet_exports_it(trained: Path, home: Home, tmp_path: Path) -> None:
    (trained / "fold_0" / "validation").mkdir()
    (trained / "fold_0" / "validation" / "summary.json").write_text("{}")
    made = tmp_path / "model.zip"
    export_pretrained_model(
        home.plans["dataset_name"], str(made), ("2d",), trainer="nnUNetTrainerRegionLabelmap", folds=(ENSEMBLE_FOLD,)
    )
    [model] = models_in(made)
    assert model.folder_name == trained.name


class OwnNetwork(RegionLabelmapMixin, nnUNetTrainer):  # type: ignore[misc]
    @staticmethod
    def build_network_architecture(plans_manager: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        network: torch.nn.Module = nnUNetTrainer.build_network_architecture(plans_manager, *args, **kwargs)
        return network


def test_a_network_of_ones_own_keeps_the_name_of_its_trainer(home: Home, tmp_path: Path) -> None:
    trainer = home.trainer(OwnNetwork)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / FINAL))
    assert load(tmp_path / FINAL)["trainer_name"] == "OwnNetwork"


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        (nnUNetTrainerRegionLabelmap, "nnUNetTrainer"),
        (nnUNetTrainerRegionBitmask, "nnUNetTrainer"),
        (type("Mine", (RegionLabelmapMixin, nnUNetTrainerNoDeepSupervision), {}), "nnUNetTrainer"),
        (type("Mine", (RegionLabelmapMixin, nnUNetTrainerBN), {}), "nnUNetTrainerBN"),
        (OwnNetwork, None),
        (type("Mine", (OwnNetwork,), {}), None),
    ],
)
def test_the_name_is_that_of_the_trainer_whose_network_it_is(trainer: type, name: str | None) -> None:
    assert network_trainer_name(trainer) == name


def test_what_a_subclass_decides_is_not_nnunets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class method of nnU-Net's may build what attributes of the subclass say."""
    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", classmethod(lambda *_: None))
    assert network_trainer_name(nnUNetTrainerRegionLabelmap) is None


def test_no_checkpoint_is_written_where_none_is_wanted(home: Home, tmp_path: Path) -> None:
    trainer = home.trainer(nnUNetTrainerRegionLabelmap)
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / FINAL))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_names_another_trainer_is_left_alone(home: Home, tmp_path: Path) -> None:
    class Renamed(RegionLabelmapMixin, NamesItself):
        pass

    trainer = home.trainer(Renamed)
    trainer.initialize()
    trainer.save_checkpoint(str(tmp_path / FINAL))
    assert load(tmp_path / FINAL)["trainer_name"] == "of my own"


class NamesItself(nnUNetTrainer):  # type: ignore[misc]
    def save_checkpoint(self, filename: str) -> None:
        super().save_checkpoint(filename)
        torch.save(load(Path(filename)) | {"trainer_name": "of my own"}, filename)
