"""Trained models for the tests, made by nnU-Net's own planner and trainer in a few steps."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import small_training
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
    features=(4, 8, 16),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    epochs=2,
    iterations=12,
    learning_rate=1e-2,
)
FLAT = replace(
    FIVE_FOLDS,
    dataset="Dataset902_BlobsFlat",
    configuration="2d",
    folds=(0,),
    patch_size=(32, 28),
    strides=((1, 1), (2, 2), (2, 2)),
    batch_size=8,
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


def cache_key() -> str:
    """Changes when anything that the models depend on changes."""
    sources = [Path(small_training.__file__), Path(__file__), Path(volumes.__file__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(json.dumps([asdict(recipe) for recipe in RECIPES.values()]).encode())
    return digest.hexdigest()[:16]


def train_all(workdir: Path) -> dict[str, Path]:
    """Train every model that ``workdir`` does not hold yet; returns name -> trained model folder."""
    folders = {
        name: workdir / "results" / recipe.dataset / f"nnUNetTrainer__nnUNetPlans__{recipe.configuration}"
        for name, recipe in RECIPES.items()
    }
    done = workdir / "done"
    if not done.exists():
        for recipe in RECIPES.values():
            _write_dataset(workdir / "raw" / recipe.dataset, recipe.dataset)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for training in [pool.submit(run, workdir, recipe) for recipe in RECIPES.values()]:
                training.result()
        done.touch()
    return folders


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
