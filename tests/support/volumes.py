"""Small images for tests: deterministic, with structure, in any geometry."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

Array = npt.NDArray[np.float32]


def blobs(shape: tuple[int, int, int], seed: int) -> tuple[Array, npt.NDArray[np.uint8]]:
    """An image (x, y, z) and its labels 0-3: smooth blobs with one intensity a label, and noise."""
    generator = np.random.default_rng(seed)
    field = gaussian_filter(generator.standard_normal(shape), [n / 12 for n in shape])
    field = (field - field.mean()) / field.std()
    labels = np.digitize(field, [-0.2, 0.5, 1.1]).astype(np.uint8)
    image = 100 + 80 * labels + 25 * generator.standard_normal(shape)
    return image.astype(np.float32), labels


def oblique(spacing: tuple[float, float, float], angle: float = 0.2, origin: tuple[float, ...] = (-20, 11, 7)) -> Array:
    """An affine turned about z and x, so that no axis is a patient axis."""
    c, s = np.cos(angle), np.sin(angle)
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine.astype(np.float32)


def rotation(angles: Sequence[float]) -> npt.NDArray[np.float64]:
    """The matrix (3, 3) that turns about x, y and z by so many radians, about z first."""
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = np.cos(angle), np.sin(angle)
        about = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        about[first, first], about[first, second], about[second, first], about[second, second] = c, -s, s, c
        turn = turn @ about
    return turn


def nifti(array: npt.NDArray[np.generic], affine: npt.NDArray[np.floating] | None = None) -> bytes:
    """``array`` (x, y, z[, c]) as the bytes of a .nii file."""
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    content: bytes = image.to_bytes()
    return content


def nifti_gz(array: npt.NDArray[np.generic], affine: npt.NDArray[np.floating] | None = None) -> bytes:
    """``array`` (x, y, z[, c]) as the bytes of a .nii.gz file."""
    return gzipped(nifti(array, affine))


def gzipped(content: bytes) -> bytes:
    """``content``, packed quickly."""
    return gzip.compress(content, 1, mtime=0)


def write(folder: Path, name: str, content: bytes) -> Path:
    """Write ``content`` to ``folder/name``."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def gunzip(content: bytes) -> bytes:
    """``gzip.decompress``."""
    return gzip.decompress(content)
