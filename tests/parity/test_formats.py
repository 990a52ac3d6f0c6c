"""Whatever the file format and whatever nnU-Net reader the plan names: the labels are those of stock nnU-Net."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import tifffile
import torch
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage.io import imread, imsave

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support import stock, volumes

FAST = {"folds": [0], "use_mirroring": False}
OBLIQUE = volumes.oblique((1.3, 1.6, 1.9))
FLIPPED = np.diag([-1.4, 1.6, -1.7, 1.0])
SAGITTAL = OBLIQUE @ np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def with_reader(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Pipeline]]:
    """Model and nnU-Net reader -> that model's folder with the reader in its plans, and a pipeline of it."""

    @cache
    def make(model: str, reader: str, orientation: str | None = None) -> tuple[Path, Pipeline]:
        folder = tmp_path_factory.mktemp(reader) / models[model].name
        shutil.copytree(models[model], folder)
        plans = json.loads((folder / "plans.json").read_text())
        plans["image_reader_writer"] = reader
        (folder / "plans.json").write_text(json.dumps(plans))
        request = ArchiveRequest(folder, folder.parent / "store", name="m", folds=(0,), input_orientation=orientation)
        [archive] = make_archives(request)
        zipfile.ZipFile(archive).extractall(folder.parent / "model")
        bundle = ModelBundle(folder.parent / "model")
        return folder, Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)

    return make


def answer(pipeline: Pipeline, body: bytes, **options: object) -> npt.NDArray[np.uint8]:
    """The labels (Z, Y, X) of one request."""
    asked = json.dumps(FAST | {"output_format": "npz"} | options).encode()
    response = pipeline.answer(Request({"image": body, "options": asked}, {}))
    assert response.status == HTTPStatus.OK, response.body
    labels: npt.NDArray[np.uint8] = np.load(io.BytesIO(response.body))["labels"]
    assert len(np.unique(labels)) > 1, "a constant answer would prove nothing"
    return labels


@pytest.mark.parametrize("affine", [OBLIQUE, FLIPPED, SAGITTAL], ids=["oblique", "flipped", "sagittal"])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_each_of_nnunets_readers_gives_stocks_file(
    reader: str, affine: npt.NDArray[np.floating], with_reader: Callable[..., tuple[Path, Pipeline]], tmp_path: Path
) -> None:
    folder, pipeline = with_reader("five_folds", reader)
    image, _ = volumes.blobs((28, 30, 22), seed=5)
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(image.astype(np.int16), affine))
    predictor = stock.loaded(folder, folds=[0], use_mirroring=False)
    read = predictor.plans_manager.image_reader_writer_class()
    array, properties = read.read_images([str(file)])
    written = str(tmp_path / "stock.nii.gz")
    read.write_seg(predictor.predict_single_npy_array(array, properties), written, properties)

    options = json.dumps(FAST)
    response = pipeline.answer(Request({"body": file.read_bytes()}, {"X-Nnunet-Options": options}))
    assert response.status == HTTPStatus.OK, response.body
    ours = nib.Nifti1Image.from_bytes(volumes.gunzip(response.body))
    expected = nib.load(written)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_allclose(ours.affine, expected.affine, atol=1e-4)
    assert len(np.unique(np.asarray(ours.dataobj))) > 1


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.npy", "a.npz"])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_one_volume_gives_the_same_labels_in_every_format(
    name: str, dtype: str, pipeline: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    image, _ = volumes.blobs((28, 30, 22), seed=5)
    array = image.astype(dtype)
    itk = sitk.GetImageFromArray(array.T)
    itk.SetSpacing((1.3, 1.6, 1.9))
    itk.SetDirection((OBLIQUE[:3, :3] / (1.3, 1.6, 1.9)).ravel().astype(float).tolist())
    options: dict[str, object] = {}
    if name == "a.npy":
        np.save(tmp_path / name, array.T)
        options = {"spacing": [1.3, 1.6, 1.9]}
    elif name == "a.npz":
        np.savez(tmp_path / name, image=array.T, spacing=(1.3, 1.6, 1.9))
    else:
        sitk.WriteImage(itk, str(tmp_path / name), "z" in name or "d" in name)
    sitk.WriteImage(itk, str(tmp_path / "reference.nii.gz"), True)
    reference = answer(pipeline("five_folds"), (tmp_path / "reference.nii.gz").read_bytes())
    np.testing.assert_array_equal(answer(pipeline("five_folds"), (tmp_path / name).read_bytes(), **options), reference)


@pytest.mark.parametrize("orientation", ["RAS", "LPI"])
def test_with_an_input_orientation_every_order_of_the_axes_gives_the_same_labels(
    orientation: str, with_reader: Callable[..., tuple[Path, Pipeline]]
) -> None:
    """One head, stored along other axes: turned back, the answers are equal voxel for voxel."""
    _, pipeline = with_reader("five_folds", "SimpleITKIO", orientation)
    image, _ = volumes.blobs((28, 30, 22), seed=5)
    first = nib.Nifti1Image(image.astype(np.int16), np.diag([1.4, 1.6, 1.8, 1.0]))
    reference = answer(pipeline, first.to_bytes()).T
    for letters in ("LPS", "SRA", "PIR", "ILA"):
        to = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(letters)
        )
        turned = first.as_reoriented(to)
        labels = answer(pipeline, turned.to_bytes()).T
        np.testing.assert_array_equal(labels, nib.orientations.apply_orientation(reference, to), err_msg=letters)


def test_without_an_input_orientation_the_order_of_the_axes_matters_as_in_stock(
    pipeline: Callable[[str], Pipeline],
) -> None:
    """Or the test above would prove nothing."""
    image, _ = volumes.blobs((28, 30, 22), seed=5)
    first = nib.Nifti1Image(image.astype(np.int16), np.diag([1.4, 1.6, 1.8, 1.0]))
    to = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("PIR"))
    reference = answer(pipeline("five_folds"), first.to_bytes()).T
    labels = answer(pipeline("five_folds"), first.as_reoriented(to).to_bytes()).T
    assert np.any(labels != nib.orientations.apply_orientation(reference, to))


def test_channels_stored_along_other_axes_are_brought_together(
    with_reader: Callable[..., tuple[Path, Pipeline]], tmp_path: Path
) -> None:
    folder, pipeline = with_reader("regions", "NibabelIOWithReorient")
    image, _ = volumes.blobs((28, 30, 22), seed=5)
    affine = np.diag([1.4, 1.6, 1.8, 1.0])
    channels = [
        nib.Nifti1Image(image.astype(np.int16), affine),
        nib.Nifti1Image((image.max() - image).astype(np.int16), affine).as_reoriented(
            np.array([[2, -1], [0, 1], [1, 1]])
        ),
    ]
    files = [volumes.write(tmp_path, f"case_{k:04d}.nii", each.to_bytes()) for k, each in enumerate(channels)]
    expected = stock.predict(folder, files, folds=[0], use_mirroring=False).labels
    parts = {f"image_{k:04d}": file.read_bytes() for k, file in enumerate(files)}
    asked = json.dumps(FAST | {"output_format": "npz"}).encode()
    response = pipeline.answer(Request(parts | {"options": asked}, {}))
    assert response.status == HTTPStatus.OK, response.body
    assert "X-Nnunet-Warning" not in response.headers
    labels = np.load(io.BytesIO(response.body))["labels"]
    np.testing.assert_array_equal(labels, expected)  # channel 0 is in RAS already
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("name", ["picture.png", "picture.tif"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pictures_give_stocks_labels(
    name: str, dtype: str, with_reader: Callable[..., tuple[Path, Pipeline]], tmp_path: Path
) -> None:
    folder, pipeline = with_reader("flat", "NaturalImage2DIO")
    image, _ = volumes.blobs((61, 74, 4), seed=5)
    picture = np.clip(image[..., 1], 0, 255).astype(dtype) * (1 if dtype == "uint8" else 100)
    imsave(tmp_path / name, picture, check_contrast=False)
    expected = stock.predict(folder, [tmp_path / name], folds=[0], use_mirroring=False).labels
    assert len(np.unique(expected)) > 1
    options = {"X-Nnunet-Options": json.dumps(FAST)}
    response = pipeline.answer(Request({"body": (tmp_path / name).read_bytes()}, options))
    assert (response.status, response.content_type) == (HTTPStatus.OK, "image/png"), response.body
    assert response.headers["X-Nnunet-Warning"] == "spacing_assumed"
    written = volumes.write(tmp_path, "answer.png", response.body)
    np.testing.assert_array_equal(imread(written), expected[0])
    for output in ("tif", "bmp"):
        options = {"X-Nnunet-Options": json.dumps(FAST | {"output_format": output})}
        response = pipeline.answer(Request({"body": (tmp_path / name).read_bytes()}, options))
        written = volumes.write(tmp_path, f"answer.{output}", response.body)
        np.testing.assert_array_equal(NaturalImage2DIO().read_seg(str(written))[0][0], expected)


def test_a_stack_of_pictures_gives_stocks_labels(
    with_reader: Callable[..., tuple[Path, Pipeline]], tmp_path: Path
) -> None:
    folder, pipeline = with_reader("five_folds", "Tiff3DIO")
    image, _ = volumes.blobs((28, 30, 22), seed=5)
    tifffile.imwrite(tmp_path / "case_0000.tif", image.T.astype(np.int16), compression="zlib")
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [1.9, 1.6, 1.3]}))
    expected = stock.predict(folder, [tmp_path / "case_0000.tif"], folds=[0], use_mirroring=False).labels
    body = (tmp_path / "case_0000.tif").read_bytes()
    np.testing.assert_array_equal(answer(pipeline, body, spacing=[1.3, 1.6, 1.9]), expected)
    Tiff3DIO().write_seg(expected, str(tmp_path / "stock.tif"), {"spacing": [1.9, 1.6, 1.3]})
    asked = json.dumps(FAST | {"output_format": "tif", "spacing": [1.3, 1.6, 1.9]})
    response = pipeline.answer(Request({"body": body}, {"X-Nnunet-Options": asked}))
    assert (response.status, response.content_type) == (HTTPStatus.OK, "image/tiff"), response.body
    ours = tifffile.imread(io.BytesIO(response.body))
    np.testing.assert_array_equal(ours, tifffile.imread(tmp_path / "stock.tif"), strict=True)


def test_a_volume_is_no_bmp(pipeline: Callable[[str], Pipeline]) -> None:
    asked = json.dumps(FAST | {"output_format": ["nii", "bmp"]})
    body = volumes.nifti_gz(volumes.blobs((28, 30, 22), seed=5)[0], OBLIQUE)
    response = pipeline("five_folds").answer(Request({"body": body}, {"X-Nnunet-Options": asked}))
    assert (response.status, json.loads(response.body)["code"]) == (HTTPStatus.BAD_REQUEST, "bad_option")


def test_a_slice_for_a_model_of_volumes_is_answered_as_stock_does_with_a_warning(
    models: dict[str, Path], pipeline: Callable[[str], Pipeline], tmp_path: Path
) -> None:
    image, _ = volumes.blobs((22, 30, 4), seed=5)  # nnU-Net takes it for 999 mm thick: 666 slices of the network's
    flat = sitk.GetImageFromArray(image[..., 1].T.astype(np.int16))
    flat.SetSpacing((1.5, 1.5))
    file = tmp_path / "case_0000.nrrd"
    sitk.WriteImage(flat, str(file))
    expected = stock.predict(models["five_folds"], [file], folds=[0], use_mirroring=False).labels
    asked = json.dumps(FAST | {"output_format": "npz"})
    response = pipeline("five_folds").answer(Request({"body": file.read_bytes()}, {"X-Nnunet-Options": asked}))
    assert response.headers["X-Nnunet-Warning"] == "single_slice"
    np.testing.assert_array_equal(np.load(io.BytesIO(response.body))["labels"], expected)
