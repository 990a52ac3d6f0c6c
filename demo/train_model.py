"""Make the demo model: brain tissue from a T1 image, two folds, trained by nnU-Net in minutes on a CPU.

Training images are random deformations of one image, the ICBM152 2009a template (an average of many heads) that the
nilearn package carries (T1 image, grey and white matter maps), with a random contrast, bias field and noise. The
network therefore knows one anatomy; it shows that serving works and is no medical device.

Run ``python demo/train_model.py OUTPUT`` to make it again; the committed copy came from there.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from small_training import Recipe, run

CASES = 12
LABELS = {"background": 0, "cerebrospinal_fluid": 1, "grey_matter": 2, "white_matter": 3}
RECIPE = Recipe(
    dataset="Dataset811_BrainTissueDemo",
    configuration="3d_fullres",
    folds=(0, 1),
    patch_size=(56, 64, 56),
    features=(8, 16, 32, 64),
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    epochs=20,
    iterations=20,
    strip=True,
)


def template_folder() -> Path:
    """Where the installed nilearn package keeps the template."""
    import nilearn

    return Path(nilearn.__file__).parent / "datasets" / "data"


def load_template(kind: str) -> nib.Nifti1Image:
    """The 1 mm ICBM152 template (x, y, z); ``kind`` is ``t1``, ``gm`` or ``wm``."""
    return nib.load(template_folder() / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")


def _smooth_noise(generator: torch.Generator, channels: int, coarse: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Noise drawn on a coarse grid and interpolated: (channels, *shape), about unit range."""
    grid = torch.randn((1, channels, coarse, coarse, coarse), generator=generator)
    return F.interpolate(grid, size=shape, mode="trilinear", align_corners=True)[0]


def make_case(head: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One deformed head.

    Args:
        head: (5, x, y, z) float32: T1, then background, fluid, grey and white matter maps.
        shape: the output grid.
        generator: the source of every random choice.

    Returns:
        T1 image int16 and label map uint8, both of ``shape``.
    """
    affine = torch.eye(3, 4) + 0.08 * torch.randn((3, 4), generator=generator) * torch.tensor([1.0, 1, 1, 0.5])
    points = F.affine_grid(affine[None], [1, 1, *shape], align_corners=True)
    points = points + 0.02 * _smooth_noise(generator, 3, 7, shape).movedim(0, -1)[None]
    outside = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])[:, None, None, None]
    warped = F.grid_sample((head - outside)[None], points, align_corners=True)[0] + outside
    labels = warped[1:].argmax(0)
    gamma, gain = 0.8 + 0.45 * torch.rand(2, generator=generator)
    bias = torch.exp(0.15 * _smooth_noise(generator, 1, 4, shape)[0])
    sigma = 0.01 + 0.02 * torch.rand(1, generator=generator)
    signal = (warped[0] / warped[0].max()).clamp(0, 1) ** gamma * bias
    noise = sigma * torch.randn((2, *shape), generator=generator)
    image = 700 * gain * torch.sqrt((signal + noise[0]) ** 2 + noise[1] ** 2)
    return image.numpy().astype(np.int16), labels.numpy().astype(np.uint8)


def write_dataset(folder: Path) -> None:
    """Write the raw dataset in nnU-Net's layout at 2 mm."""
    t1 = load_template("t1")
    image = torch.from_numpy(np.asarray(t1.dataobj, np.float32))
    grey, white = (torch.from_numpy(np.asarray(load_template(k).dataobj, np.float32)) / 255 for k in ("gm", "wm"))
    brain = (image > 0).float()
    head = torch.stack([image, 1 - brain, (brain - grey - white).clamp(0, 1), grey, white])
    shape = tuple(round(n / 2) for n in image.shape)
    affine = t1.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for case in range(CASES):
        volume, labels = make_case(head, shape, torch.Generator().manual_seed(case))
        nib.save(nib.Nifti1Image(volume, affine), folder / "imagesTr" / f"head_{case:03d}_0000.nii.gz")
        nib.save(nib.Nifti1Image(labels, affine), folder / "labelsTr" / f"head_{case:03d}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": LABELS,
        "numTraining": CASES,
        "file_ending": ".nii.gz",
        "name": "BrainTissueDemo",
        "description": "random deformations of the ICBM152 2009a template; for demonstration only",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def main(output: Path) -> None:
    """Train and copy what inference needs to ``output``."""
    with tempfile.TemporaryDirectory() as workdir:
        write_dataset(Path(workdir) / "raw" / RECIPE.dataset)
        trained = run(Path(workdir), RECIPE)
        target = output / RECIPE.dataset / trained.name
        for file in ("plans.json", "dataset.json", *(f"fold_{k}/checkpoint_final.pth" for k in RECIPE.folds)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(trained / file, target / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
