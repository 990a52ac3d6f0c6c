"""The models that the repository carries are what their recipes give."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.models import CARRIED, RECIPES, carried, folder_in, served_files, train_all


def plans_of(folder: Path) -> dict[str, Any]:
    plans: dict[str, Any] = json.loads((folder / "plans.json").read_text())
    return plans


def checkpoint_of(file: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return checkpoint


def test_each_recipe_has_its_folder_and_nothing_else_is_carried() -> None:
    expected = {folder / file for folder in carried().values() for file in served_files(folder)}
    assert {file for file in CARRIED.glob("Dataset*/**/*") if file.is_file()} == expected


@pytest.mark.parametrize("name", RECIPES)
def test_the_carried_plans_and_folds_are_the_recipes(name: str) -> None:
    recipe, folder = RECIPES[name], carried()[name]
    configuration = plans_of(folder)["configurations"][recipe.configuration]
    architecture = configuration["architecture"]["arch_kwargs"]
    assert tuple(configuration["patch_size"]) == recipe.patch_size
    assert configuration["batch_size"] == recipe.batch_size
    assert tuple(architecture["features_per_stage"]) == recipe.features
    assert tuple(map(tuple, architecture["strides"])) == recipe.strides
    files = {file.parent.name for file in served_files(folder) if file.suffix == ".pth"}
    assert files == {f"fold_{fold}" for fold in recipe.folds}
    for fold in recipe.folds:
        checkpoint = checkpoint_of(folder / f"fold_{fold}" / "checkpoint_final.pth")
        assert checkpoint["current_epoch"] == recipe.epochs
        assert (checkpoint["optimizer_state"] is None) == recipe.strip


@pytest.mark.long
def test_trained_again_the_recipes_give_the_same_folders(tmp_path: Path) -> None:
    """Weights are not compared by value: another processor rounds otherwise, and a training amplifies that. So few
    steps are enough."""
    trained = train_all(tmp_path, {name: replace(recipe, iterations=2) for name, recipe in RECIPES.items()})
    for name, folder in trained.items():
        kept = carried()[name]
        assert folder == folder_in(tmp_path / "results", RECIPES[name])
        assert served_files(folder) == served_files(kept)
        assert json.loads((folder / "dataset.json").read_text()) == json.loads((kept / "dataset.json").read_text())
        assert plans_of(folder) == plans_of(kept)
        for file in served_files(folder):
            if file.suffix != ".pth":
                continue
            fresh, old = checkpoint_of(folder / file), checkpoint_of(kept / file)
            assert fresh.keys() == old.keys()
            weights, kept_weights = fresh["network_weights"], old["network_weights"]
            assert {key: each.shape for key, each in weights.items()} == {
                key: each.shape for key, each in kept_weights.items()
            }
        assert make_archives(ArchiveRequest(folder, tmp_path / "store", name=name))  # whose trial it stands
