"""Heads to train on and to test on: warps of one anatomy, the ICBM152 2009a template that nilearn carries.

A head is the template's T1 image, moved by a random affine map and a random smooth displacement, on a grid of about
2 mm, with a random contrast, bias field and Rician noise. Its labels are the likeliest of the template's tissue maps,
moved likewise. What such heads tell is how well a network does with other forms and noise, and not how well with
another person.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

Volume = npt.NDArray[np.float32]

TISSUES = ("fluid", "grey matter", "white matter")
"""What the labels 1, 2 and 3 are; 0 is all else."""

SPACINGS_MM = ((2.0, 2.0, 2.0), (2.0, 2.0, 2.0), (1.9, 2.1, 2.2))
"""Along x, y and z; heads have them in turn."""

_ROTATION = 0.14
"""Radian about each axis, at most."""

_STRETCH = 0.1
"""Of each axis, at most."""

_SHIFT_MM = 6.0
"""Along each axis, at most."""

_DISPLACEMENT_MM, _DISPLACEMENT_SMOOTHNESS_MM = (2.0, 4.0), 12.0
"""Root mean square, from to; standard deviation of the Gaussian that smooths it."""

_GAMMA, _GAIN, _NOISE = (0.8, 1.25), (300.0, 1200.0), (0.015, 0.035)
_BIAS, _BIAS_SMOOTHNESS_MM = 0.18, 30.0

_ANTIALIASING = 0.45
"""Standard deviation of the Gaussian, in voxels of the template, for each mm by which the grid is coarser."""


@dataclass(frozen=True, slots=True)
class Template:
    """The anatomy, at 1 mm.

    Attributes:
        channels: (5, x, y, z): T1 in 0 to 1, and in how far a voxel is background, fluid, grey and white matter.
        origin_mm: of the first voxel.
    """

    channels: Volume
    origin_mm: npt.NDArray[np.float64]


def load_template() -> Template:
    """The template of the installed nilearn."""
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    image = load_mni152_template(resolution=1)
    t1, grey, white = (
        np.asarray(each.dataobj, np.float32)
        for each in (image, load_mni152_gm_template(resolution=1), load_mni152_wm_template(resolution=1))
    )
    brain = (t1 > 0).astype(np.float32)
    fluid = (brain - grey - white).clip(0, 1)
    return Template(np.stack([t1, 1 - brain, fluid, grey, white]), image.affine[:3, 3])


def warped(template: Template, spacing_mm: Sequence[float], seed: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A head of another form, contrast and noise.

    Args:
        template: whose.
        spacing_mm: along x, y and z.
        seed: of all that is random.

    Returns:
        The T1 image, int16, and its labels, uint8.
    """
    generator, spacing = np.random.default_rng(seed), np.asarray(spacing_mm)
    shape = tuple(round(n / size) for n, size in zip(template.channels.shape[1:], spacing, strict=True))
    places = _places(generator, template.channels.shape[1:], shape, spacing)
    blur = _ANTIALIASING * (spacing - 1).clip(0)
    sampled = np.stack(
        [map_coordinates(gaussian_filter(each, blur), places, order=1, mode="nearest") for each in template.channels]
    )
    intensity = _scanned(generator, sampled[0], spacing)
    grid = np.diag([*spacing, 1.0])
    grid[:3, 3] = template.origin_mm
    labels = sampled[1:].argmax(0)
    return nib.Nifti1Image(intensity.astype(np.int16), grid), nib.Nifti1Image(labels.astype(np.uint8), grid)


def write_heads(images: Path, labels: Path, names: str, seeds: Iterable[int]) -> None:
    """Write heads in nnU-Net's naming.

    Args:
        images: folder for the images.
        labels: folder for the label maps.
        names: what a case's name begins with, before its number.
        seeds: of each.
    """
    template = load_template()
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        image, tissue = warped(template, SPACINGS_MM[number % len(SPACINGS_MM)], seed)
        nib.save(image, images / f"{names}_{number:03d}_0000.nii.gz")
        nib.save(tissue, labels / f"{names}_{number:03d}.nii.gz")


def _places(
    generator: np.random.Generator, template: Sequence[int], shape: Sequence[int], spacing: npt.NDArray[np.float64]
) -> Volume:
    """Where in the template each voxel of a head comes from, (3, x, y, z) in voxels of 1 mm."""
    middle = np.asarray(template) / 2
    turned = Rotation.from_rotvec(generator.uniform(-_ROTATION, _ROTATION, 3)).as_matrix()
    linear = turned * generator.uniform(1 - _STRETCH, 1 + _STRETCH, 3)
    shift = generator.uniform(-_SHIFT_MM, _SHIFT_MM, 3)
    from_middle = np.indices(shape, np.float32) * _along_axes(spacing) - _along_axes(middle)
    affine = np.einsum("ij,jxyz->ixyz", linear.astype(np.float32), from_middle) + _along_axes(middle + shift)
    displaced = np.stack([_smooth(generator, shape, _DISPLACEMENT_SMOOTHNESS_MM / spacing) for _ in range(3)])
    places: Volume = affine + np.float32(generator.uniform(*_DISPLACEMENT_MM)) * displaced
    return places


def _scanned(generator: np.random.Generator, anatomy: Volume, spacing: npt.NDArray[np.float64]) -> Volume:
    """The anatomy (x, y, z) in another contrast, under a bias field, with Rician noise."""
    contrast = (anatomy / anatomy.max()).clip(0, 1) ** generator.uniform(*_GAMMA)
    bias = np.exp(_BIAS * _smooth(generator, anatomy.shape, _BIAS_SMOOTHNESS_MM / spacing))
    real, imaginary = generator.uniform(*_NOISE) * generator.standard_normal((2, *anatomy.shape), np.float32)
    magnitude: Volume = generator.uniform(*_GAIN) * np.hypot(contrast * bias + real, imaginary)
    return magnitude


def _smooth(generator: np.random.Generator, shape: Sequence[int], sigma: npt.NDArray[np.float64]) -> Volume:
    """Smooth noise of standard deviation 1."""
    noise: Volume = gaussian_filter(generator.standard_normal(shape, np.float32), sigma)
    normalised: Volume = noise / noise.std()
    return normalised


def _along_axes(values: npt.NDArray[np.float64]) -> Volume:
    """A value for each axis, (3, 1, 1, 1)."""
    return values.astype(np.float32)[:, None, None, None]
