"""nnU-Net finds the trainers in the folder that the command line prints, and others that inherit from their mixins."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from typer.testing import CliRunner

from nnunet_torchserve_tools import added_trainers
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_trainers import distill_trainers, region_trainers
from nnunet_torchserve_trainers.region_targets import RegionLabelmapMixin

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # of what nnU-Net's own trainers import

OF_ONES_OWN = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_torchserve_trainers.region_targets import RegionLabelmapMixin

class nnUNetTrainerMine(nnUNetTrainer):
    pass

class nnUNetTrainerMineLabelmap(RegionLabelmapMixin, nnUNetTrainerMine):
    pass
"""


@pytest.fixture
def folder() -> str:
    printed = CliRunner().invoke(app, ["trainers", "--path"])
    assert printed.exit_code == 0
    return printed.stdout.removesuffix("\n")


def test_every_trainer_that_is_listed_is_found_by_its_name(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", folder)
    listed = CliRunner().invoke(app, ["trainers"]).stdout.splitlines()
    names = [line.split()[0] for line in listed[:-1]]
    assert listed[-1] == f"export nnUNet_extTrainer={folder}"
    homes = (distill_trainers, region_trainers)
    ours = {name: each for home in homes for name, each in vars(home).items() if _is_of(home, each)}
    assert sorted(names) == sorted(ours)
    for name in names:
        assert recursive_find_trainer_class_by_name(name) is ours[name]


def _is_of(module: ModuleType, what: object) -> bool:
    return isinstance(what, type) and what.__module__ == module.__name__


def test_a_trainer_of_ones_own_lies_in_a_folder_of_its_own(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_trainers.py").write_text(OF_ONES_OWN)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join((str(tmp_path), folder)))
    found = recursive_find_trainer_class_by_name("nnUNetTrainerMineLabelmap")
    assert issubclass(found, RegionLabelmapMixin)
    assert found.__mro__[1] is RegionLabelmapMixin


def test_an_installation_without_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(added_trainers, "_PACKAGE", "no_such_package_anywhere")
    failed = CliRunner().invoke(app, ["trainers", "--path"])
    assert failed.exit_code == 1
    assert "is not installed" in failed.stderr
