"""Trainers that ship packed targets: their batches and their steps are stock's, bit by bit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, SegOnlyTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)

from nnunet_torchserve_trainers.region_targets import (
    PackedRegionsMixin,
    RegionBitmaskMixin,
    RegionLabelmapMixin,
    Stage,
)
from nnunet_torchserve_trainers.region_trainers import nnUNetTrainerRegionBitmask, nnUNetTrainerRegionLabelmap
from support.tables import table
from support.training import IGNORE, REGIONS, Task, at_home, batches, many_regions, same_everywhere, scales, seed

MIXINS = (RegionLabelmapMixin, RegionBitmaskMixin)
PATCHES = {"2d": (16, 12), "3d": (16, 12, 8), "3d, augmented slice by slice": (4, 16, 16)}
SHIPPED: dict[type, torch.dtype] = {RegionLabelmapMixin: torch.uint8, RegionBitmaskMixin: torch.int32}


def mixed(mixin: type, trainer: type) -> type:
    """What a user writes."""
    return type(f"Packed{trainer.__name__}", (mixin, trainer), {})


@pytest.fixture(autouse=True)
def _same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)


STAGES = (Stage.TRAINING, Stage.TRAINING, Stage.VALIDATION, Stage.VALIDATION)
"""Of what ``batches`` gives."""


def assert_same_batches(stock: Any, ours: Any, shipped: torch.dtype, number: int = 0) -> None:
    """Of training and of validation, after the same seed: equal images, and equal targets once unpacked."""
    for stage, theirs, mine in zip(STAGES, batches(stock, number), batches(ours, number), strict=True):
        assert list(theirs["keys"]) == list(mine["keys"])
        assert torch.equal(theirs["data"], mine["data"])
        for target in scales(mine["target"]):
            assert target.dtype == shipped
            assert target.shape[1] == 1
        regions = ours._unpacked(stage, mine)["target"]
        assert isinstance(regions, list) == isinstance(theirs["target"], list)
        for expected, found in zip(scales(theirs["target"]), scales(regions), strict=True):
            assert expected.dtype == found.dtype == torch.bool
            assert torch.equal(expected, found)
        assert scales(theirs["target"])[0].any()


@pytest.mark.parametrize(
    ("mixin", "patch", "trainer", "ignore", "cascade"),
    table(MIXINS, PATCHES, (nnUNetTrainer, nnUNetTrainerNoDeepSupervision), (False, True), (False, True)),
)
def test_targets_are_stocks(
    mixin: type, patch: str, trainer: type, ignore: bool, cascade: bool, tmp_path: Path
) -> None:
    labels = REGIONS | IGNORE if ignore else REGIONS
    task = Task(labels, PATCHES[patch], is_cascade=cascade, masked=cascade)
    with at_home(tmp_path, task) as home:
        assert_same_batches(home.trainer(trainer), home.trainer(mixed(mixin, trainer)), SHIPPED[mixin])


@pytest.mark.parametrize(
    ("mixin", "regions", "shipped"),
    [
        (RegionLabelmapMixin, 70, torch.uint8),
        (RegionBitmaskMixin, 30, torch.int32),
        (RegionBitmaskMixin, 31, torch.int64),
        (RegionBitmaskMixin, 62, torch.int64),
        (RegionBitmaskMixin, 63, torch.bool),
    ],
)
def test_many_regions_are_packed_as_far_as_they_can_be(
    mixin: type, regions: int, shipped: torch.dtype, tmp_path: Path
) -> None:
    """The ignore label is a channel too."""
    with at_home(tmp_path, Task(many_regions(regions), (8, 8))) as home:
        stock, ours = home.trainer(nnUNetTrainer), home.trainer(mixed(mixin, nnUNetTrainer))
        if shipped != torch.bool:
            assert_same_batches(stock, ours, shipped)
            return
        for stage, theirs, mine in zip(STAGES, batches(stock, 0), batches(ours, 0), strict=True):
            assert all(map(torch.equal, theirs["target"], mine["target"]))
            assert ours._unpacked(stage, mine) is mine


@pytest.mark.parametrize("mixin", MIXINS)
def test_a_trainer_with_other_augmentation_gets_it_too(mixin: type, tmp_path: Path) -> None:
    with at_home(tmp_path, Task(REGIONS, (16, 16))) as home:
        stock, ours = home.trainer(nnUNetTrainerDA5), home.trainer(mixed(mixin, nnUNetTrainerDA5))
        assert_same_batches(stock, ours, SHIPPED[mixin])


@pytest.mark.parametrize("mixin", MIXINS)
def test_without_regions_everything_is_stocks(mixin: type, tmp_path: Path) -> None:
    with at_home(tmp_path, Task({"background": 0, "one": 1, "two": 2}, (8, 8))) as home:
        stock, ours = home.trainer(nnUNetTrainer), home.trainer(mixed(mixin, nnUNetTrainer))
        for stage, theirs, mine in zip(STAGES, batches(stock, 0), batches(ours, 0), strict=True):
            assert torch.equal(theirs["data"], mine["data"])
            assert all(map(torch.equal, theirs["target"], mine["target"]))
            assert ours._unpacked(stage, mine) is mine


class SeesRegions(SegOnlyTransform):  # type: ignore[misc]
    """A transform that wants a channel for each region."""

    def _apply_to_segmentation(self, segmentation: torch.Tensor, **_: Any) -> torch.Tensor:
        return segmentation.flip(0)


class OwnEnd(nnUNetTrainer):  # type: ignore[misc]
    """Does something with the regions before they are resampled."""

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        pipeline = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        pipeline.transforms.insert(-1, SeesRegions())
        return pipeline


class OwnRegions(nnUNetTrainer):  # type: ignore[misc]
    """Trains on regions that dataset.json does not have."""

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        return nnUNetTrainer.get_training_transforms(*args, **kwargs | {"regions": [(1, 3), (2,), 3]})


@pytest.mark.parametrize("trainer", [OwnEnd, OwnRegions])
@pytest.mark.parametrize("mixin", MIXINS)
def test_whoever_makes_regions_in_a_way_of_its_own_keeps_it(mixin: type, trainer: type, tmp_path: Path) -> None:
    """Where it does: here in training, and not in validation."""
    with at_home(tmp_path, Task(REGIONS, (16, 12))) as home:
        stock, ours = home.trainer(trainer), home.trainer(mixed(mixin, trainer))
        expected, found = batches(stock, 0, 1), batches(ours, 0, 1)
        assert [each["target"][0].dtype for each in found] == [torch.bool, SHIPPED[mixin]]
        for stage, theirs, mine in zip(Stage, expected, found, strict=True):
            assert all(map(torch.equal, theirs["target"], ours._unpacked(stage, mine)["target"]))
        assert "makes them in a way of its own" in Path(ours.log_file).read_text()


class ShipsLabels(nnUNetTrainer):  # type: ignore[misc]
    """Its loader ships the label map, of the type that our codes have, and its steps make something else of it."""

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        return nnUNetTrainer.get_training_transforms(*args, **kwargs | {"regions": None})


@pytest.mark.parametrize("mixin", MIXINS)
def test_whole_numbers_of_a_trainers_own_are_not_taken_for_codes(mixin: type, tmp_path: Path) -> None:
    with at_home(tmp_path, Task(REGIONS, (16, 12))) as home:
        ours = home.trainer(mixed(mixin, ShipsLabels))
        [training, validation] = batches(ours, 0, 1)
        training["target"] = [target.to(SHIPPED[mixin]) for target in training["target"]]
        assert ours._unpacked(Stage.TRAINING, training) is training
        assert ours._unpacked(Stage.VALIDATION, validation)["target"][0].dtype == torch.bool


@pytest.mark.parametrize("ignore", [{}, IGNORE])
@pytest.mark.parametrize("trainer", [nnUNetTrainerRegionLabelmap, nnUNetTrainerRegionBitmask])
def test_steps_give_stocks_losses_counts_and_weights(trainer: type, ignore: dict[str, int], tmp_path: Path) -> None:
    with at_home(tmp_path, Task(REGIONS | ignore, (16, 12))) as home:
        found = [_after_steps(home.trainer(kind)) for kind in (nnUNetTrainer, trainer)]
    (theirs, their_weights), (mine, my_weights) = found
    for expected, step in zip(theirs, mine, strict=True):
        assert expected.keys() == step.keys()
        assert all((expected[name] == step[name]).all() for name in expected)
    assert all(map(torch.equal, their_weights, my_weights))
    assert theirs[0]["loss"] != theirs[1]["loss"]
    assert theirs[-1]["tp_hard"].any()


def _after_steps(trainer: Any) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Two steps of training and two of validation, and the weights then."""
    seed(3)
    trainer.initialize()
    first, second, *validation = batches(trainer, 0)
    trainer.network.train()
    steps = [trainer.train_step(batch) for batch in (first, second)]
    trainer.network.eval()
    with torch.no_grad():
        steps += [trainer.validation_step(batch) for batch in validation]
    return steps, list(trainer.network.state_dict().values())


@pytest.mark.parametrize("trainer", [nnUNetTrainerRegionLabelmap, nnUNetTrainerRegionBitmask])
def test_what_the_loaders_processes_need_can_be_sent_to_them(trainer: type, tmp_path: Path) -> None:
    """Where processes are not forked, transforms are pickled."""
    with at_home(tmp_path, Task(REGIONS, (8, 8))) as home:
        ours = home.trainer(trainer)
        ours._set_batch_size_and_oversample()
        loader, _ = ours.get_dataloaders()
    sent = pickle.loads(pickle.dumps(loader.data_loader.transforms))  # noqa: S301 (our own)
    labels = torch.randint(0, 4, (1, 8, 8), dtype=torch.int16)
    image = torch.zeros(2, 8, 8)
    seed(0)
    [expected, *_] = loader.data_loader.transforms(image=image.clone(), segmentation=labels.clone())["segmentation"]
    seed(0)
    [found, *_] = sent(image=image.clone(), segmentation=labels.clone())["segmentation"]
    assert torch.equal(expected, found)


def test_a_mixin_alone_says_that_it_has_no_code() -> None:
    with pytest.raises(NotImplementedError):
        PackedRegionsMixin.region_code(((1,),))
