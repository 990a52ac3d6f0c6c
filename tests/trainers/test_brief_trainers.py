"""The recipe's trainers: both students begin alike and see the same, also where a training was ended and goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import distill_brain_tissue
from support.distilling import certain, teach
from support.training import Home, Task, at_home, same_everywhere

LABELS = {"background": 0, "one": 1, "two": 2}
EXTERNAL = Path(distill_brain_tissue.__file__).with_name("external")

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # of what nnU-Net's own trainers import


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    same_everywhere(monkeypatch)
    monkeypatch.setenv("nnUNet_extTrainer", str(EXTERNAL))
    monkeypatch.setenv(distill_brain_tissue.EPOCHS_VARIABLE, "2")
    monkeypatch.setenv(distill_brain_tissue.ITERATIONS_VARIABLE, "1")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with at_home(tmp_path, Task(LABELS)) as made:
        teach(made, certain)
        yield made


def trainer_of(home: Home, model: str) -> Any:
    return home.trainer(recursive_find_trainer_class_by_name(distill_brain_tissue.TRAINERS[model]))


def test_both_students_begin_with_the_same_weights_and_see_the_same_batches(home: Home) -> None:
    trainers = [trainer_of(home, model) for model in (distill_brain_tissue.ALONE, distill_brain_tissue.TAUGHT)]
    batches = []
    for trainer in trainers:
        trainer.initialize()
        trainer.dataloader_train, _ = trainer.get_dataloaders()
        trainer.on_epoch_start()
        batches.append(next(trainer.dataloader_train))
    alone, taught = trainers
    assert (alone.num_epochs, alone.num_iterations_per_epoch) == (2, 1)
    for one, other in zip(alone.network.parameters(), taught.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(batches[0]["data"], batches[1]["data"])
    for one, other in zip(batches[0]["target"], batches[1]["target"], strict=False):
        assert torch.equal(one, other)
    assert len(batches[1]["target"]) == len(batches[0]["target"]) + 1, "the soft targets are behind the labels"


class Ended(Exception):
    """Somebody ends a training."""


@pytest.mark.long
@pytest.mark.parametrize("model", distill_brain_tissue.TRAINERS)
def test_a_training_that_was_ended_and_goes_on_gives_the_same_weights(model: str, home: Home) -> None:
    whole = trainer_of(home, model)
    whole.run_training()
    ended = trainer_of(home, model)
    begin = ended.on_train_epoch_start

    def end() -> None:
        if ended.current_epoch == 1:
            raise Ended
        begin()

    ended.on_train_epoch_start = end
    with pytest.raises(Ended):
        ended.run_training()
    going_on = trainer_of(home, model)
    going_on.load_checkpoint(str(Path(ended.output_folder, "checkpoint_latest.pth")))
    going_on.run_training()
    assert going_on.logger.get_value("train_losses", step=None) == whole.logger.get_value("train_losses", step=None)
    checkpoint = torch.load(Path(whole.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    for name, weights in whole.network.state_dict().items():
        np.testing.assert_array_equal(weights, going_on.network.state_dict()[name], err_msg=name)
