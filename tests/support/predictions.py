"""What two predictors gave, compared: arrays, files and what lies beside them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from skimage.io import imread

from . import volumes


def write_heads(folder: Path) -> Path:
    """A folder with two cases of one channel, one of them with a name as people give them."""
    for seed, name in enumerate(("Kopf groß 1", "b")):
        image, _ = volumes.blobs((30, 28, 24), seed)
        content = volumes.nifti_gz(image.astype(np.int16), volumes.oblique((1.5, 1.4, 1.6)))
        volumes.write(folder, f"{name}_0000.nii.gz", content)
    return folder


def read(path: Path) -> tuple[Any, ...]:
    """Voxels, and where they lie."""
    if path.name.endswith((".png", ".bmp", ".tif")):
        picture = imread(path)
        return picture.dtype, picture.shape, picture.tobytes()
    image = sitk.ReadImage(str(path))
    place = [*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()]
    voxels = sitk.GetArrayFromImage(image)
    return voxels.dtype, voxels.shape, voxels.tobytes(), np.round(place, 5).tolist()


def assert_same_files(one: Path, other: Path, atol: float = 0.0) -> None:
    """Names, label maps, probabilities (to ``atol``), properties and their types, side files."""
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir())
    for name in names:
        first, second = one / name, other / name
        if name == "predict_from_raw_data_args.json":
            arguments, ours = json.loads(first.read_text()), json.loads(second.read_text())
            assert arguments.keys() <= ours.keys()
            differing = {each for each in arguments if arguments[each] != ours[each]}
            assert differing <= {"output_folder_or_list_of_truncated_output_files"}
        elif name.endswith(".json"):
            assert first.read_bytes() == second.read_bytes(), name
        elif name.endswith(".npz"):
            loaded, ours_ = np.load(first), np.load(second)
            assert loaded.files == ours_.files
            assert_same(loaded["probabilities"], ours_["probabilities"], atol)
        elif name.endswith(".pkl"):
            assert_same(pickle.loads(first.read_bytes()), pickle.loads(second.read_bytes()))  # noqa: S301 (our own)
        else:
            assert read(first) == read(second), name


def assert_same(one: Any, other: Any, atol: float = 0.0) -> None:
    """Equal values of the same types, all the way down; those of float32 arrays to ``atol``."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other) or (one.dtype == np.float32 and np.allclose(one, other, rtol=0, atol=atol))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name], atol)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second, atol)
    else:
        assert one == other
