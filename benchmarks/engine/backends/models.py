"""The trained models, with the images that their answers are compared on, and others that int8 is calibrated on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib

from benchmarks.engine.backends.archives import Trained
from benchmarks.harness.material import MATERIAL_VARIABLE, TRAINED, Material
from benchmarks.models import many_classes

_HELD_OUT_SEED = 1_000_001
_CALIBRATION_HEADS = 6
"""A head is eight patches."""

_SMALL = 60
"""Voxels along each axis of a trial's image."""


def tissue(material: Material) -> Trained:
    """The model that requests are sent to: 501 of the material, or the demo's."""
    if os.environ.get(MATERIAL_VARIABLE):
        images = material.coarse.parent
        return Trained(
            "501, 3d_fullres",
            material.model_folder,
            (material.coarse, material.fine),
            images / "labels",
            (images / "test_001_0000.nii.gz",),
        )
    return Trained("demo, 3d_fullres", material.model_folder, (material.coarse,), None, (material.fine,))


def small(model: Trained, folder: Path) -> Trained:
    """The same, compared on the middle of its first image: for a trial."""
    file = model.images[0]
    labels = None if model.labels is None else model.labels / file.name.replace("_0000", "")
    for source, target in ((file, folder / file.name), (labels, folder / "labels" / file.name.replace("_0000", ""))):
        if source is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            image = nib.load(source)
            starts = [max(0, (size - _SMALL) // 2) for size in image.shape]
            nib.save(image.slicer[tuple(slice(start, start + _SMALL) for start in starts)], target)
    return replace(model, images=(folder / file.name,), labels=None if labels is None else folder / "labels")


def all_of(material: Material) -> list[Trained]:
    """The same, and the other models of the material."""
    first = tissue(material)
    if not (named := os.environ.get(MATERIAL_VARIABLE)):
        return [first]
    models, images = Path(named) / "models", Path(named) / "images"
    flat = models / "Dataset501_BrainTissue" / "nnUNetTrainer__nnUNetPlans__2d"
    regions = images / "Dataset502_BrainRegions"
    return [
        first,
        Trained("501, 2d", flat, first.images, first.labels, first.calibration),
        Trained(
            "502, regions",
            models / "Dataset502_BrainRegions" / TRAINED,
            (regions / "test_000_0000.nii.gz",),
            regions / "labels",
            (regions / "test_001_0000.nii.gz",),
        ),
    ]


def forty_classes(scratch: Path) -> Trained:
    """The model of 40 classes, trained if it is not there yet; compared on a head that it was not trained on."""
    images, labels, others = (scratch / f"many_{name}" for name in ("images", "labels", "calibration"))
    for folder in (images, labels, others):
        folder.mkdir(parents=True)
    spacing_mm, head = many_classes.HELD_OUT_SPACING_MM, many_classes.load_head()
    image, parcels = many_classes.warped(head, spacing_mm, _HELD_OUT_SEED)
    nib.save(image, images / "held_out_0000.nii.gz")
    nib.save(parcels, labels / "held_out.nii.gz")
    for number in range(_CALIBRATION_HEADS):
        nib.save(
            many_classes.warped(head, spacing_mm, _HELD_OUT_SEED + 1 + number)[0],
            others / f"head_{number}_0000.nii.gz",
        )
    return Trained(
        "40 classes",
        many_classes.model_folder(many_classes.CACHE),
        (images / "held_out_0000.nii.gz",),
        labels,
        (others,),
    )
