"""Trained models for the tests, made by nnU-Net's own planner and trainer in a few steps.

The repository carries them in ``tests/models``, so that no test waits for a training. After a change of a recipe, make
them anew: ``PYTHONPATH=demo:tests .venv/bin/python -m support.models``. A long test trains them again and compares.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from small_training import Recipe, run

from . import volumes

LABELS: dict[str, object] = {"background": 0, "low": 1, "middle": 2, "high": 3}
REGIONS: dict[str, object] = {"background": 0, "all": [1, 2, 3], "core": [2, 3], "centre": [3]}
CASES = 5
"""nnU-Net splits into five folds."""

FIVE_FOLDS = Recipe(
    dataset="Dataset901_Blobs",
    configuration="3d_fullres",
    folds=(0, 1, 2, 3, 4),
    patch_size=(24, 32, 24),
    features=(2, 4, 8),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    epochs=4,
    iterations=50,
    learning_rate=1e-2,
    strip=True,
    convolutions=1,
)
"""So small that a forward pass is 3 times cheaper on one core than that of twice the features and convolutions."""
FLAT = replace(
    FIVE_FOLDS,
    dataset="Dataset902_BlobsFlat",
    configuration="2d",
    folds=(0,),
    patch_size=(32, 28),
    strides=((1, 1), (2, 2), (2, 2)),
    batch_size=8,
    strip=False,  # one checkpoint as the trainer writes it, with the optimizer's state and the log
)
REGION_BASED = replace(FIVE_FOLDS, dataset="Dataset903_BlobRegions", folds=(0,))
ANISOTROPIC = replace(
    FIVE_FOLDS,
    dataset="Dataset904_BlobsThick",
    folds=(0, 1),
    patch_size=(8, 32, 28),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
)

_SHAPES = {
    "Dataset901_Blobs": ((40, 44, 36), (1.5, 1.5, 1.5)),
    "Dataset902_BlobsFlat": ((40, 44, 12), (1.5, 1.5, 3.0)),
    "Dataset903_BlobRegions": ((40, 44, 36), (1.5, 1.5, 1.5)),
    "Dataset904_BlobsThick": ((14, 48, 44), (5.0, 1.0, 1.0)),
}
"""(x, y, z) voxels and mm of the training images. The thick axis of the last is x, so that nnU-Net transposes."""

RECIPES = {"five_folds": FIVE_FOLDS, "flat": FLAT, "regions": REGION_BASED, "anisotropic": ANISOTROPIC}


CARRIED = Path(__file__).parents[1] / "models"
"""Where the repository has them."""


def folder_in(home: Path, recipe: Recipe) -> Path:
    """The trained model folder of a recipe below nnU-Net's results folder ``home``."""
    return home / recipe.dataset / f"nnUNetTrainer__nnUNetPlans__{recipe.configuration}"


def carried() -> dict[str, Path]:
    """Name -> trained model folder in the repository. Tests copy what they change."""
    return {name: folder_in(CARRIED, recipe) for name, recipe in RECIPES.items()}


def train_all(workdir: Path, recipes: Mapping[str, Recipe]) -> dict[str, Path]:
    """Train models in ``workdir``; returns name -> trained model folder."""
    for recipe in recipes.values():
        _write_dataset(workdir / "raw" / recipe.dataset, recipe.dataset)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(recipes, pool.map(lambda recipe: run(workdir, recipe), recipes.values()), strict=True))


def served_files(folder: Path) -> list[Path]:
    """What an archive is made of, relative to a trained model folder; the only files that are carried."""
    files = [folder / "dataset.json", folder / "plans.json", *folder.glob("fold_*/checkpoint_final.pth")]
    return sorted(file.relative_to(folder) for file in files)


def _write_dataset(folder: Path, name: str) -> None:
    shape, spacing = _SHAPES[name]
    regions = name == REGION_BASED.dataset
    affine = volumes.oblique(spacing, angle=0)
    for case in range(CASES):
        image, labels = volumes.blobs(shape, seed=case)
        channels = [image, image.max() - image] if regions else [image]
        for number, channel in enumerate(channels):
            volumes.write(folder / "imagesTr", f"case_{case}_{number:04d}.nii.gz", volumes.nifti_gz(channel, affine))
        volumes.write(folder / "labelsTr", f"case_{case}.nii.gz", volumes.nifti_gz(labels, affine))
    description: dict[str, object] = {
        "channel_names": {"0": "first", "1": "second"} if regions else {"0": "first"},
        "labels": REGIONS if regions else LABELS,
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    if regions:
        description["regions_class_order"] = [1, 2, 3]
    (folder / "dataset.json").write_text(json.dumps(description))


def _carry() -> None:
    """Train every model, and put it where the repository has it."""
    for old in CARRIED.glob("Dataset*"):
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory() as scratch:
        for name, trained in train_all(Path(scratch), RECIPES).items():
            for file in served_files(trained):
                target = folder_in(CARRIED, RECIPES[name]) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(trained / file, target)


if __name__ == "__main__":
    _carry()
