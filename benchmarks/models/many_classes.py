"""A trained model of 40 classes, for benchmarks of what grows with the number of classes.

Trained by nnU-Net itself in minutes on a CPU, and good at little, but its logits are a trained network's: confident
inside, ambiguous along every border, and rough where the labels are.

The labels are parcels, not anatomy. They are the voxels of fluid, grey matter and white matter of the ICBM152 2009a
template that are nearest to fixed seed points of their tissue, so that those of grey matter and fluid are thin and
folded. The two halves of the head share their parcels: the template is symmetric, and nnU-Net mirrors its training
images, so that no network could tell left from right. All images are warps of this one head.

Run ``python -m benchmarks.models.many_classes FOLDER`` to train the model there, if it is not there yet, and to see how
well it finds the parcels of a warp that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from scipy.cluster.vq import kmeans2
from scipy.spatial import KDTree

from benchmarks import ROOT
from benchmarks.harness.material import CONFIGURATION, FOLD, PLANS, TRAINER, resampled
from small_training import Recipe, run
from support import stock
from train_model import load_template

PARCELS = {"fluid": 5, "grey": 22, "white": 12}
"""Tissue -> its parcels; 39 in all, and the background is the fortieth class."""

CACHE = ROOT / ".nnunet-torchserve" / "many_classes"
"""Where the benchmarks keep the trained model."""

CASES = 10
SPACING_MM = 2.5
HELD_OUT_SPACING_MM = 2.0
RECIPE = Recipe(
    dataset="Dataset840_BrainParcels",
    configuration=CONFIGURATION,
    folds=(FOLD,),
    patch_size=(48, 64, 48),
    features=(8, 16, 32, 64, 96),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    epochs=25,
    iterations=20,
    learning_rate=1e-2,
    strip=True,
)

_SEED_CANDIDATE_EVERY = 7
"""Seed points are found among every so many voxels of a tissue."""

_KMEANS_ROUNDS = 10
"""Seed points begin far apart and end in the middle of parcels of about one size."""

_HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Head:
    """The template; arrays are (x, y, z) at 1 mm.

    Attributes:
        image: T1, float32 in 0 to 1, 0 outside the brain.
        parcels: uint8, 0 outside the brain.
        affine: voxels to mm.
    """

    image: npt.NDArray[np.float32]
    parcels: npt.NDArray[np.uint8]
    affine: npt.NDArray[np.float64]


def load_head() -> Head:
    """The template of the installed nilearn, and its parcels."""
    t1 = load_template("t1")
    image = np.asarray(t1.dataobj, np.float32)
    grey, white = (np.asarray(load_template(kind).dataobj, np.float32) / 255 for kind in ("gm", "wm"))
    brain = image > 0
    maps = dict(zip(PARCELS, (brain - grey - white, grey, white), strict=True))
    likeliest = np.argmax(list(maps.values()), axis=0)
    parcels = np.zeros(image.shape, np.uint8)
    for number, count in enumerate(PARCELS.values()):
        where = np.argwhere(brain & (likeliest == number))
        folded = where.astype(np.float64)
        folded[:, 0] = np.abs(folded[:, 0] - (image.shape[0] - 1) / 2)
        candidates = folded[::_SEED_CANDIDATE_EVERY]
        seeds, _ = kmeans2(candidates, _spread_out(candidates, count), iter=_KMEANS_ROUNDS, minit="matrix")
        _, nearest = KDTree(seeds).query(folded)
        parcels[tuple(where.T)] = parcels.max() + 1 + nearest
    return Head(image / image.max(), parcels, t1.affine)


def _spread_out(points: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """So many of ``points`` (n, 3), each the farthest from those before it; the first is the one nearest the middle."""
    chosen = [int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))]
    distance = np.full(len(points), np.inf)
    while len(chosen) < count:
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return points[chosen]


def warped(head: Head, spacing_mm: float, seed: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A head of another form, contrast and noise.

    Returns:
        The T1 image, int16 and 0 outside the brain, and its parcels, uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = [round(n / spacing_mm) for n in head.image.shape]
    affine = torch.eye(3, 4) + 0.06 * torch.randn((3, 4), generator=generator) * torch.tensor([1.0, 1, 1, 0.3])
    points = F.affine_grid(affine[None], [1, 1, *shape], align_corners=True)
    points = points + 0.02 * _smooth_noise(generator, 3, 7, shape).movedim(0, -1)[None]
    image, parcels = (
        F.grid_sample(torch.from_numpy(array).float()[None, None], points, mode=mode, align_corners=True)[0, 0]
        for array, mode in ((head.image, "bilinear"), (head.parcels, "nearest"))
    )
    gamma, gain = 0.85 + 0.3 * torch.rand(2, generator=generator)
    bias = torch.exp(0.1 * _smooth_noise(generator, 1, 4, shape)[0])
    noise = 0.015 * torch.randn(shape, generator=generator)
    intensity = (700 * gain * (image.clamp(0, 1) ** gamma * bias + noise)).clamp(1, None) * (parcels > 0)
    grid = head.affine @ np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    return (
        nib.Nifti1Image(intensity.numpy().astype(np.int16), grid),
        nib.Nifti1Image(parcels.numpy().astype(np.uint8), grid),
    )


def write_template(folder: Path, spacing_mm: float) -> Path:
    """Write the template's T1 image with cubic voxels of that size."""
    template = load_template("t1")
    file = folder / f"template_{spacing_mm:g}mm_0000.nii.gz"
    nib.save(template if spacing_mm == 1 else resampled(template, spacing_mm), file)
    return file


def _smooth_noise(generator: torch.Generator, channels: int, coarse: int, shape: list[int]) -> torch.Tensor:
    """Noise drawn on a coarse grid and interpolated: (channels, *shape), about unit range."""
    grid = torch.randn((1, channels, coarse, coarse, coarse), generator=generator)
    return F.interpolate(grid, size=shape, mode="trilinear", align_corners=True)[0]


def model_folder(cache: Path) -> Path:
    """nnU-Net's trained model folder; trained in some minutes if ``cache`` does not hold it yet."""
    home = cache / _cache_key()
    trained = home / "results" / RECIPE.dataset / f"{TRAINER}__{PLANS}__{RECIPE.configuration}"
    done = home / "done"
    if not done.exists():
        _write_dataset(home / "raw" / RECIPE.dataset)
        run(home, RECIPE)
        for folder in ("raw", "preprocessed"):
            shutil.rmtree(home / folder)
        done.touch()
    return trained


def _cache_key() -> str:
    """Changes when anything that the model depends on changes."""
    sources = (Path(__file__), ROOT / "demo" / "small_training.py", ROOT / "demo" / "train_model.py")
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(json.dumps(asdict(RECIPE)).encode())
    return digest.hexdigest()[:16]


def _write_dataset(folder: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    head = load_head()
    for case in range(CASES):
        image, parcels = warped(head, SPACING_MM, case)
        nib.save(image, folder / "imagesTr" / f"head_{case:03d}_0000.nii.gz")
        nib.save(parcels, folder / "labelsTr" / f"head_{case:03d}.nii.gz")
    names = [f"{tissue}_{number}" for tissue, count in PARCELS.items() for number in range(1, count + 1)]
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0} | {name: label for label, name in enumerate(names, start=1)},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
        "name": "BrainParcels",
        "description": "random deformations of the ICBM152 2009a template; parcels, not anatomy; for benchmarks only",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def dice(truth: npt.NDArray[np.integer[Any]], found: npt.NDArray[np.integer[Any]]) -> list[float]:
    """The Dice coefficient of each foreground class that ``truth`` has."""
    classes = 1 + int(max(truth.max(), found.max()))
    true, positive, both = (
        np.bincount(labels.ravel(), minlength=classes) for labels in (truth, found, truth[truth == found])
    )
    return [float(2 * both[n] / (true[n] + positive[n])) for n in range(1, classes) if true[n]]


def main(cache: Path) -> None:
    """Train, and say how well it finds the parcels of a held-out warp."""
    started = time.monotonic()
    model = model_folder(cache)
    print(f"{model}\n  trained in {time.monotonic() - started:.0f} s (0 if it was there)")
    image, parcels = warped(load_head(), HELD_OUT_SPACING_MM, _HELD_OUT_SEED)
    truth = np.asarray(parcels.dataobj)
    with tempfile.TemporaryDirectory(prefix="many-classes-") as folder:
        file = Path(folder) / "held_out_0000.nii.gz"
        nib.save(image, file)
        predictor = stock.loaded(model, folds=(FOLD,), use_mirroring=False)
        started = time.monotonic()
        labels = stock.run(predictor, [file], probabilities=False).labels
    print(f"  stock predicted a held-out warp of {HELD_OUT_SPACING_MM:g} mm in {time.monotonic() - started:.1f} s")
    found = labels.transpose(2, 1, 0)
    shuffled = np.random.default_rng(0).permutation(truth[truth > 0])
    chance = truth.copy()
    chance[truth > 0] = shuffled
    print(
        f"  mean Dice of the foreground {statistics.fmean(dice(truth, found)):.3f} (parcels shuffled within the brain: "
        f"{statistics.fmean(dice(truth, chance)):.3f}); {len(np.unique(found))} of {len(np.unique(truth))} classes"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
