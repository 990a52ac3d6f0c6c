"""What is segmented: a trained model, one head at two resolutions, and images cut from it.

Fold 0 answers, without mirroring, unless a benchmark says otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import zoom

from benchmarks import ROOT

MATERIAL_VARIABLE = "NNUNET_TORCHSERVE_MATERIAL"
FOLD = 0
TRAINER, PLANS, CONFIGURATION = "nnUNetTrainer", "nnUNetPlans", "3d_fullres"
TRAINED = f"{TRAINER}__{PLANS}__{CONFIGURATION}"

USUAL_OPTIONS = {"folds": [FOLD], "use_mirroring": False}
"""Of a request, unless a benchmark says otherwise."""


@dataclass(frozen=True, slots=True)
class Material:
    """A trained model and one head at two resolutions.

    Attributes:
        source: what was used, for the result file.
        model_folder: nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder.
        fine, coarse: T1 images (.nii.gz) at 1 mm and 2 mm.
    """

    source: str
    model_folder: Path
    fine: Path
    coarse: Path


def find_material(scratch: Path) -> Material:
    """The material folder that the environment names, else the demo model and nilearn's template."""
    if folder := os.environ.get(MATERIAL_VARIABLE):
        dataset = "Dataset501_BrainTissue"
        images = Path(folder) / "images" / dataset
        return Material(
            source=f"material folder: {dataset} {CONFIGURATION}, test_000 (2 mm) and test_002 (1 mm)",
            model_folder=Path(folder) / "models" / dataset / TRAINED,
            fine=images / "test_002_0000.nii.gz",
            coarse=images / "test_000_0000.nii.gz",
        )
    from train_model import load_template

    template = load_template("t1")
    fine, coarse = scratch / "template_1mm.nii.gz", scratch / "template_2mm.nii.gz"
    nib.save(template, fine)
    nib.save(resampled(template, 2.0), coarse)
    return Material(
        source="demo model, and the ICBM152 template of the installed nilearn (1 mm), resampled to 2 mm",
        model_folder=ROOT / "demo" / "model" / "Dataset811_BrainTissueDemo" / TRAINED,
        fine=fine,
        coarse=coarse,
    )


def resampled(image: nib.Nifti1Image, spacing: float) -> nib.Nifti1Image:
    """``image`` (x, y, z) as int16 with cubic voxels of ``spacing`` mm, interpolated linearly."""
    old = image.header.get_zooms()[:3]
    voxels = zoom(np.asarray(image.dataobj, np.float32), [size / spacing for size in old], order=1)
    return nib.Nifti1Image(voxels.astype(np.int16), image.affine @ np.diag([*(spacing / size for size in old), 1.0]))


def crop_at_random(image: nib.Nifti1Image, shape: Sequence[int], generator: np.random.Generator) -> nib.Nifti1Image:
    """A part of ``image`` (x, y, z) of that many voxels, at most the whole, from anywhere within it."""
    sizes = [min(size, whole) for size, whole in zip(shape, image.shape, strict=True)]
    starts = [int(generator.integers(whole - size + 1)) for size, whole in zip(sizes, image.shape, strict=True)]
    return image.slicer[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def small_shape(material: Material, patches: float) -> tuple[int, ...]:
    """Voxels (x, y, z) of ``material.coarse`` whose grid is ``patches`` times the network's patch along each axis."""
    plans = json.loads((material.model_folder / "plans.json").read_text())
    network = plans["configurations"][CONFIGURATION]
    inverse = plans["transpose_backward"]
    spacing_mm = [float(size) for size in nib.load(material.coarse).header.get_zooms()[:3]]
    extent_mm = [patches * n * size for n, size in zip(network["patch_size"], network["spacing"], strict=True)]
    return tuple(round(extent_mm[inverse[2 - axis]] / spacing_mm[axis]) for axis in range(3))


def describe_image(file: Path) -> dict[str, object]:
    """Shape (x, y, z), spacing (mm), type and size of an image file."""
    image = nib.load(file)
    return {
        "shape": list(image.shape),
        "spacing_mm": [round(float(size), 4) for size in image.header.get_zooms()],
        "voxel_type": str(image.get_data_dtype()),
        "file_type": ".nii.gz" if file.suffix == ".gz" else file.suffix,
        "file_bytes": file.stat().st_size,
    }
