"""The same segmentation as stock nnU-Net, voxel for voxel, and the same probabilities, bit for bit."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support import stock, volumes
from support.server import LiveServer

STRAIGHT = np.diag([1.5, 1.5, 1.5, 1.0])
OBLIQUE_THICK = volumes.oblique((1.2, 1.1, 2.6))
FLIPPED = np.diag([-1.3, 1.7, -2.0, 1.0])
THICK_X = np.diag([5.0, 1.0, 1.0, 1.0])
THIN_SLICES = volumes.oblique((1.3, 0.8, 0.9))

FIVE = [0, 1, 2, 3, 4]
ONE_WAY = {"use_mirroring": False}
"""Without mirroring."""

CASES: dict[str, tuple[str, tuple[int, int, int], npt.NDArray[np.floating], dict[str, object]]] = {
    "3d, one fold, no mirroring": ("five_folds", (46, 41, 39), STRAIGHT, {"folds": [0], "use_mirroring": False}),
    "3d, one fold, mirroring": ("five_folds", (30, 34, 26), STRAIGHT, {"folds": [3]}),
    "3d, five folds": ("five_folds", (38, 40, 36), STRAIGHT, {"folds": FIVE, "use_mirroring": False}),
    "3d, five folds, mirroring, oblique and thick": ("five_folds", (34, 30, 12), OBLIQUE_THICK, {}),
    "3d, two folds in another order": ("five_folds", (38, 40, 36), STRAIGHT, {"folds": [4, 1], "use_mirroring": False}),
    "3d, tile step 0.75": ("five_folds", (60, 50, 45), STRAIGHT, {"folds": [1], "tile_step_size": 0.75} | ONE_WAY),
    "3d, no Gaussian": ("five_folds", (46, 41, 39), FLIPPED, {"folds": [2], "use_gaussian": False} | ONE_WAY),
    "3d, smaller than the patch": ("five_folds", (20, 18, 16), STRAIGHT, {"folds": [0, 1]}),
    "2d": ("flat", (44, 47, 9), STRAIGHT, {"use_mirroring": False}),
    "2d, mirroring, oblique": ("flat", (40, 38, 8), OBLIQUE_THICK, {"tile_step_size": 0.75}),
    "regions of two channels": ("regions", (30, 34, 26), STRAIGHT, {}),
    "regions, oblique": ("regions", (38, 35, 22), OBLIQUE_THICK, {"use_mirroring": False}),
    "anisotropic, transposed": ("anisotropic", (14, 52, 46), THICK_X, {"use_mirroring": False}),
    "anisotropic, two folds, thin slices": ("anisotropic", (50, 44, 41), THIN_SLICES, {"use_mirroring": False}),
}


def images(name: str, shape: tuple[int, int, int], affine: npt.NDArray[np.floating], folder: Path) -> list[Path]:
    """The files of a case: a head in an empty frame, so that cropping has something to do."""
    image, _ = volumes.blobs(shape, seed=77)
    image[:2], image[:, -3:] = 0, 0
    channels = [image, image.max() - image] if name == "regions" else [image]
    channels = [np.where(image > 0, channel, 0) for channel in channels]
    return [
        volumes.write(folder, f"case_{k:04d}.nii.gz", volumes.nifti_gz(channel.astype(np.int16), affine))
        for k, channel in enumerate(channels)
    ]


def stock_options(options: dict[str, object]) -> dict[str, object]:
    """Our options as arguments of stock's predictor."""
    return {"use_mirroring": True} | options


@pytest.mark.parametrize("case", CASES)
def test_same_labels_and_same_probabilities_as_stock(
    case: str, models: dict[str, Path], pipeline: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    name, shape, affine, options = CASES[case]
    files = images(name, shape, affine, tmp_path)
    expected = stock.predict(models[name], files, **stock_options(options))  # type: ignore[arg-type]

    parts = {f"image_{k:04d}": file.read_bytes() for k, file in enumerate(files)}
    asked = options | {"save_probabilities": True, "output_format": "npz"}
    response = pipeline(name).answer(Request(parts | {"options": json.dumps(asked).encode()}, {}))

    assert response.status == HTTPStatus.OK, response.body
    answer = np.load(io.BytesIO(response.body))
    assert len(np.unique(expected.labels)) > 1, "a constant answer would prove nothing"
    assert np.count_nonzero(answer["labels"] != expected.labels) == 0
    np.testing.assert_array_equal(answer["probabilities"], expected.probabilities, strict=True)


@pytest.mark.serve
@pytest.mark.parametrize(("name", "affine"), [("five_folds", OBLIQUE_THICK), ("flat", FLIPPED), ("regions", STRAIGHT)])
def test_the_live_answer_is_stocks_file(
    name: str, affine: npt.NDArray[np.floating], models: dict[str, Path], server: LiveServer, tmp_path: Path
) -> None:
    files = images(name, (34, 30, 12), affine, tmp_path)
    predictor = stock.loaded(models[name])
    reader = predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(file) for file in files])
    written = tmp_path / "stock.nii.gz"
    reader.write_seg(predictor.predict_single_npy_array(array, properties), str(written), properties)

    response = server.predict(name, files={f"image_{k:04d}": file.read_bytes() for k, file in enumerate(files)})
    assert response.status_code == HTTPStatus.OK, response.text
    ours = volumes.write(tmp_path, "ours.nii.gz", response.content)

    expected, got = sitk.ReadImage(str(written)), sitk.ReadImage(str(ours))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(expected))
    assert got.GetPixelID() == expected.GetPixelID()
    assert got.GetSpacing() == expected.GetSpacing()
    np.testing.assert_allclose(got.GetOrigin(), expected.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(got.GetDirection(), expected.GetDirection(), atol=1e-5)


@pytest.mark.threads
def test_the_demo_model_gives_stocks_answer_for_a_real_image(tmp_path: Path) -> None:
    """Every second voxel of the template that ``make demo`` segments."""
    from train_model import RECIPE, load_template

    folder = Path(__file__).parents[2] / "demo" / "model" / RECIPE.dataset / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    template = load_template("t1")
    affine = template.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    content = volumes.nifti_gz(np.asarray(template.dataobj)[::2, ::2, ::2], affine)
    image = volumes.write(tmp_path, "template.nii.gz", content)
    expected = stock.predict(folder, [image], use_mirroring=False)

    [archive] = make_archives(ArchiveRequest(folder, tmp_path / "store"))
    zipfile.ZipFile(archive).extractall(tmp_path / "model")
    bundle = ModelBundle(tmp_path / "model")
    pipeline = Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)
    options = json.dumps({"use_mirroring": False, "save_probabilities": True, "output_format": "npz"})
    response = pipeline.answer(Request({"body": content}, {"X-Nnunet-Options": options}))

    assert response.status == HTTPStatus.OK, response.body
    answer = np.load(io.BytesIO(response.body))
    assert list(np.unique(expected.labels)) == [0, 1, 2, 3]
    assert np.count_nonzero(answer["labels"] != expected.labels) == 0
    np.testing.assert_array_equal(answer["probabilities"], expected.probabilities, strict=True)


MATERIAL_CASES = [
    pytest.param(
        "Dataset501_BrainTissue",
        "3d_fullres",
        "test_001",
        {"folds": [3, 1], "tile_step_size": 1} | ONE_WAY,
        marks=pytest.mark.threads,
    ),
    pytest.param(
        "Dataset501_BrainTissue", "2d", "test_000", {"tile_step_size": 1} | ONE_WAY, marks=pytest.mark.threads
    ),
    pytest.param(
        "Dataset502_BrainRegions", "3d_fullres", "test_001", {"tile_step_size": 1} | ONE_WAY, marks=pytest.mark.threads
    ),
    # more tiles, and mirroring: the small models above have them too
    pytest.param("Dataset501_BrainTissue", "3d_fullres", "test_000", {"folds": [0]} | ONE_WAY, marks=pytest.mark.long),
    pytest.param("Dataset502_BrainRegions", "3d_fullres", "test_001", ONE_WAY, marks=pytest.mark.long),
    pytest.param("Dataset501_BrainTissue", "3d_fullres", "test_001", {"folds": FIVE} | ONE_WAY, marks=pytest.mark.long),
    pytest.param("Dataset501_BrainTissue", "3d_fullres", "test_001", {"folds": [0]}, marks=pytest.mark.long),
    pytest.param("Dataset501_BrainTissue", "2d", "test_000", ONE_WAY, marks=pytest.mark.long),
]


@pytest.mark.material
@pytest.mark.parametrize(("dataset", "configuration", "case", "options"), MATERIAL_CASES)
def test_real_models_and_images_give_stocks_answer(
    dataset: str,
    configuration: str,
    case: str,
    options: dict[str, object],
    material: Path,
    material_pipeline: Callable[[str, str], Pipeline],
) -> None:
    folder = material / "models" / dataset / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    files = sorted((material / "images" / dataset).glob(f"{case}_*.nii.gz"))
    expected = stock.predict(folder, files, **stock_options(options))  # type: ignore[arg-type]

    parts = {f"image_{k:04d}": file.read_bytes() for k, file in enumerate(files)}
    asked = json.dumps(options | {"save_probabilities": True, "output_format": "npz"}).encode()
    response = material_pipeline(dataset, configuration).answer(Request(parts | {"options": asked}, {}))

    assert response.status == HTTPStatus.OK, response.body
    answer = np.load(io.BytesIO(response.body))
    assert np.count_nonzero(answer["labels"] != expected.labels) == 0
    np.testing.assert_array_equal(answer["probabilities"], expected.probabilities, strict=True)


@pytest.mark.threads
@pytest.mark.material
def test_recorded_answers_of_the_stock_command_are_met(
    material: Path, material_pipeline: Callable[[str, str], Pipeline]
) -> None:
    """Recorded on another machine, where kernels may round otherwise: Dice, not bits."""
    pipeline = material_pipeline("Dataset501_BrainTissue", "3d_fullres")
    body = (material / "images" / "Dataset501_BrainTissue" / "test_000_0000.nii.gz").read_bytes()
    options = json.dumps({"folds": [0], "use_mirroring": False})
    response = pipeline.answer(Request({"body": body}, {"X-Nnunet-Options": options}))
    recorded = nib.load(material / "references" / "bt3d_f0_notta_t0" / "test_000.nii.gz")

    ours = np.asarray(nib.Nifti1Image.from_bytes(volumes.gunzip(response.body)).dataobj)
    theirs = np.asarray(recorded.dataobj)
    for label in (1, 2, 3):
        overlap = np.count_nonzero((ours == label) & (theirs == label))
        assert 2 * overlap / (np.count_nonzero(ours == label) + np.count_nonzero(theirs == label)) >= 0.9999
