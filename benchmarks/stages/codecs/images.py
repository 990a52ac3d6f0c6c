"""Images to be read and label maps to be written: a real T1 head, and a made volume that compresses like a CT.

SimpleITK and NumPy write the images in each format, as their users would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)
from scipy.ndimage import gaussian_filter

Labels = npt.NDArray[np.uint8]

SEED = 20261123
CT_SHAPE, QUICK_CT_SHAPE = (300, 512, 512), (150, 256, 256)
CT_SPACING_MM = (0.75, 0.75, 1.0)
"""Along x, y, z."""

_NOISE_HU = 10
_BANDS = (9, 13)
"""Of two smooth fields; each pair of bands is one of 117 labels."""


class Kind(StrEnum):
    """A way to store an image; the end of its file's name."""

    NIFTI_GZ = "nii.gz"
    NIFTI = "nii"
    NRRD = "nrrd"
    MHA = "mha"
    MHA_PLAIN = "plain.mha"
    NPY = "npy"
    NPZ = "npz"
    NIFTI_SCALED = "scaled.nii"
    NIFTI_FLOAT = "float32.nii"

    @property
    def in_words(self) -> str:
        """For people."""
        return _TITLES.get(self, self.value)

    @property
    def is_array(self) -> bool:
        """Whether it has no geometry of its own."""
        return self in (Kind.NPY, Kind.NPZ)


_TITLES = {
    Kind.NRRD: "nrrd, gzip",
    Kind.MHA: "mha, compressed",
    Kind.MHA_PLAIN: "mha, plain",
    Kind.NPZ: "npz, deflated",
    Kind.NIFTI_SCALED: "nii with a slope and an intercept",
    Kind.NIFTI_FLOAT: "nii of float32",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One image and the label maps to be encoded on its grid.

    Attributes:
        title: for people.
        image: with its geometry.
        labels: by what they are, each (Z, Y, X).
    """

    title: str
    image: sitk.Image
    labels: Mapping[str, Labels]


def head(file: Path) -> Case:
    """The real one; the labels are four bands of its smoothed intensity."""
    image = sitk.ReadImage(str(file))
    for key in image.GetMetaDataKeys():  # NIfTI's fields, which ITK warns of in other formats
        image.EraseMetaData(key)
    smooth = gaussian_filter(sitk.GetArrayFromImage(image).astype(np.float32), 1.5)
    bands = np.quantile(smooth[smooth > 0.1 * smooth.max()], [0.05, 0.3, 0.6, 0.85])
    labels: Labels = np.digitize(smooth, bands).astype(np.uint8)
    return Case("a T1 head", image, {"4 labels": labels})


def ct_like(shape: tuple[int, int, int]) -> Case:
    """A made volume, int16 HU (Z, Y, X), with 4 and with 117 labels.

    An elliptic cylinder in air (-1000) with a rim of fat (-100). Within, a field of normal numbers on a coarse grid,
    interpolated linearly, decides what is lung (-850), fat (-90), soft tissue (about 50, with a second such field of
    20 HU) and bone (600). White noise of 10 HU lies over all, and nothing is below -1024, which stands outside of the
    largest circle in a slice, too. The 4 labels are those tissues; the 117 are the pairs of 9 bands of one field and
    13 of another.
    """
    generator = torch.Generator().manual_seed(SEED)
    depth, height, width = shape
    tissue, tint, other = (smooth_field(shape, coarse, generator) for coarse in ((8, 12, 12), (20, 40, 40), (6, 9, 9)))
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    radius = torch.sqrt((y / 0.75) ** 2 + (x / 0.95) ** 2)
    inside = radius < 0.92

    kinds = torch.bucketize(tissue, torch.tensor([-0.6, -0.1, 0.9]), out_int32=True)
    hounsfield = torch.tensor([-850.0, -90.0, 50.0, 600.0])[kinds] + 20 * tint * (kinds == 2)
    hounsfield = torch.where(inside, hounsfield, torch.where(radius < 1, -100.0, -1000.0))
    hounsfield += _NOISE_HU * torch.randn(shape, generator=generator)
    hounsfield = torch.where(x**2 + y**2 < 1, hounsfield, -1024.0)
    voxels = hounsfield.round_().clamp_(-1024, 3071).to(torch.int16)

    few = ((kinds + 1) * inside).to(torch.uint8)
    one, two = (
        torch.bucketize(field, torch.linspace(-1, 1, bands - 1), out_int32=True)
        for field, bands in zip((tissue, other), _BANDS, strict=True)
    )
    many = ((one * _BANDS[1] + two + 1) * inside).to(torch.uint8)
    image = sitk.GetImageFromArray(voxels.numpy())
    image.SetSpacing(CT_SPACING_MM)
    image.SetOrigin((-0.75 * width / 2, -0.75 * height / 2, -float(depth)))
    return Case("made like a CT", image, {"4 labels": few.numpy(), "117 labels": many.numpy()})


def smooth_field(shape: tuple[int, ...], coarse: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers on a coarse grid (z, y, x), interpolated linearly to ``shape``."""
    grid = torch.randn((1, 1, *coarse), generator=generator)
    return F.interpolate(grid, size=shape, mode="trilinear", align_corners=True)[0, 0]


def image_file(folder: Path, name: str, kind: Kind) -> Path:
    """Where an image is kept in one format.

    Each has a name of its own: ITK takes the voxels of a ``.nii`` for those of the ``.nii.gz`` that lies beside it.
    """
    return folder / f"{name}-{kind.name.lower()}.{kind}"


def write_image(case: Case, kind: Kind, file: Path) -> None:
    """Store a case's image as SimpleITK, or NumPy, does by default."""
    voxels = sitk.GetArrayViewFromImage(case.image)
    if kind is Kind.NPY:
        np.save(file, voxels)
    elif kind is Kind.NPZ:
        np.savez_compressed(file, image=voxels)
    elif kind is Kind.NIFTI_FLOAT:
        sitk.WriteImage(sitk.Cast(case.image, sitk.sitkFloat32), str(file))
    elif kind is Kind.NIFTI_SCALED:
        sitk.WriteImage(case.image, str(file))
        with file.open("r+b") as stored:
            stored.seek(112)  # scl_slope and scl_inter (nifti1.h)
            stored.write(np.array([0.5, -100], "<f4").tobytes())
    else:
        sitk.WriteImage(case.image, str(file), kind is not Kind.MHA_PLAIN)
