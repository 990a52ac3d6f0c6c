"""DICOM segmentations, read and judged by others: highdicom, dcmqi, and David Clunie's dciodvfy and dcentvfy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_BIN = Path(sys.executable).parent
OFF = 1e-3
"""Of a voxel: the grid is a mean of what slices say, each rounded by itself."""


def check_object(body: bytes, folder: Path) -> None:
    """``dciodvfy`` finds no error in an object."""
    file = folder / "checked.dcm"
    file.write_bytes(body)
    found = subprocess.run([_BIN / "dciodvfy", file], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "Error" not in found.stderr, found.stderr


def check_set(bodies: Sequence[bytes], folder: Path) -> None:
    """``dcentvfy`` finds patient, study, series and frame of reference said alike by all objects."""
    files = []
    for number, body in enumerate(bodies):
        (folder / f"{number}.dcm").write_bytes(body)
        files.append(folder / f"{number}.dcm")
    found = subprocess.run([_BIN / "dcentvfy", *files], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "Error" not in found.stderr, found.stderr


def by_pydicom(body: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(body))


def by_highdicom(body: bytes, numbers: Iterable[int] | None = None) -> dict[int, tuple[Mask, Matrix]]:
    """Segment number -> mask (slice, row, column), and (slice, row, column) to LPS mm; slices without frames lack.

    Args:
        body: a file.
        numbers: of the segments that are wanted; default: all.
    """
    found = highdicom.seg.segread(io.BytesIO(body))
    wanted = list(found.segment_numbers if numbers is None else numbers)
    if found.segmentation_type.value == "LABELMAP":
        volume = found.get_volume(combine_segments=True, relabel=False)
        return {int(number): (volume.array == number, volume.affine) for number in wanted}
    masks = {}
    for number in wanted:
        volume = found.get_volume(segment_numbers=[number])
        masks[int(number)] = (volume.array[..., 0] > 0, volume.affine)
    return masks


def by_dcmqi(body: bytes, folder: Path) -> dict[int, tuple[Mask, Matrix]]:
    """The same by ``segimage2itkimage``; (x, y, z)."""
    (folder / "in.dcm").write_bytes(body)
    out = folder / "dcmqi"
    out.mkdir(exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    reader = _BIN / "segimage2itkimage"
    command: list[str | Path] = [reader, "--inputDICOM", folder / "in.dcm", "--outputDirectory", out, "-t", "nrrd"]
    subprocess.run(command, check=True, capture_output=True)
    said = json.loads(next(out.glob("*meta.json")).read_text())["segmentAttributes"]
    masks = {}
    images = {int(file.stem.split("-")[-1]): sitk.ReadImage(str(file)) for file in out.glob("*.nrrd")}
    for number, group in enumerate(said, start=1):
        image = images[number]
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        labels = sitk.GetArrayFromImage(image).T
        for segment in group:
            masks[int(segment["labelID"])] = (labels == segment["labelID"], affine)
    return masks


def voxels(mask: Mask, affine: Matrix, grid: Matrix) -> set[tuple[int, ...]]:
    """The voxels (x, y, z) of a grid on which a mask's voxels lie in the patient, and lie exactly.

    Args:
        mask: on a grid of its own.
        affine: of that, index to LPS mm.
        grid: affine of the other.
    """
    return voxels_at(np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3], grid)


def voxels_of(mask: npt.NDArray[Any]) -> set[tuple[int, ...]]:
    """The voxels (x, y, z) of a mask (z, y, x)."""
    return set(map(tuple, np.argwhere(mask.transpose(2, 1, 0)).tolist()))


def voxels_at(places: Matrix, grid: Matrix) -> set[tuple[int, ...]]:
    """The voxels (x, y, z) of a grid whose centres these places (n, 3) are, exactly; LPS mm."""
    index = (places - grid[:3, 3]) @ np.linalg.inv(grid[:3, :3]).T
    np.testing.assert_allclose(index, np.rint(index), atol=OFF)
    return set(map(tuple, np.rint(index).astype(int).tolist()))
