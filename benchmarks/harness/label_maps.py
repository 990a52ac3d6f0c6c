"""Label maps of two sides, compared voxel by voxel."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt


def different_voxels(one: Path, other: Path) -> int:
    """Voxels in which two label maps differ.

    Raises:
        ValueError: they have different shapes.
    """
    first, second = (np.asarray(nib.load(file).dataobj) for file in (one, other))
    if first.shape != second.shape:
        msg = f"label maps of {first.shape} and {second.shape} cannot be compared"
        raise ValueError(msg)
    return int(np.count_nonzero(first != second))


def labels_of(answer: bytes) -> npt.NDArray[np.generic]:
    """The voxels (x, y, z) of a .nii.gz label map."""
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(answer)).dataobj)


def digest_of(labels: npt.NDArray[np.generic]) -> str:
    """The sha256 of a label map's voxels, as bytes in the order (x, y, z)."""
    return hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest()
