"""The properties of a case are those that stock's reader and preprocessor make of the same file, to the last bit."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import tifffile
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage.io import imsave

from nnunet_torchserve import codecs
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.intake import _turn
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.preprocess import preprocess
from nnunet_torchserve.properties import properties_document
from nnunet_torchserve.request import Request
from nnunet_torchserve.volume import Volume
from support import volumes

OBLIQUE = volumes.oblique((1.3, 1.6, 1.9))
SAGITTAL = OBLIQUE @ np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
FLIPPED = np.diag([-1.4, 1.6, -1.7, 1.0])
AFFINES = {"oblique": OBLIQUE, "sagittal": SAGITTAL, "flipped": FLIPPED}

IMAGE = np.zeros((22, 24, 20), np.int16)
IMAGE[3:18, 2:23, 5:19] = volumes.blobs((15, 21, 14), seed=5)[0]
"""(x, y, z), with another border at each side."""


class Made(Member):
    """A member whose plans name another reader and another order of the axes."""

    reader_name = "SimpleITKIO"
    order: tuple[int, ...] = (0, 1, 2)
    asked_orientation: str | None = None

    @cached_property
    def plans(self) -> PlansManager:
        plans = deepcopy(self._json("plans.json"))
        plans |= {
            "image_reader_writer": self.reader_name,
            "transpose_forward": list(self.order),
            "transpose_backward": np.argsort(self.order).tolist(),
        }
        return PlansManager(plans)

    @property
    def input_orientation(self) -> str | None:
        return self.asked_orientation or super().input_orientation


@pytest.fixture
def made(unpacked: Callable[[str], Path]) -> Callable[..., Made]:
    def make(
        reader: str, *, model: str = "five_folds", order: tuple[int, ...] = (2, 0, 1), orientation: str | None = None
    ) -> Made:
        bundle = ModelBundle(unpacked(model))
        member = Made(bundle.folder, bundle.lead.description)
        member.reader_name, member.order, member.asked_orientation = reader, order, orientation
        return member

    return make


def ours(member: Made, body: bytes) -> dict[str, Any]:
    image = codecs.open_image(body, Limits(), member.reader)
    turn = _turn(member, image)
    case = preprocess(member, Volume(turn.turn(image.read()), turn.after))
    document: dict[str, Any] = json.loads(properties_document(member, image, turn, case.properties))
    assert document["reader"] == member.reader
    return document


def stocks(member: Made, file: Path) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """What stock reads, and the properties that it pickles, as JSON has them."""
    data, properties = recursive_find_reader_writer_by_name(member.reader)().read_images([str(file)])
    preprocessor = DefaultPreprocessor(verbose=False)
    _, _, properties = preprocessor.run_case_npy(
        data, None, properties, member.plans, member.configuration, member.dataset
    )
    return data, json.loads(json.dumps(properties, default=lambda value: value.tolist()))


def nifti(affine: npt.NDArray[np.floating], qform: int, sform: int, version: type = nib.Nifti1Image) -> bytes:
    image = version(IMAGE, affine, dtype=np.int16)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    content: bytes = image.to_bytes()
    return content


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("forms", [(1, 1), (1, 0), (0, 1), (1, 2), (0, 0)], ids=str)
def test_of_a_nifti_as_each_reader_has_it(
    reader: str, affine: str, forms: tuple[int, int], made: Callable[..., Made], tmp_path: Path
) -> None:
    member = made(reader)
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.gzipped(nifti(AFFINES[affine], *forms)))
    read, expected = stocks(member, file)
    document = ours(member, file.read_bytes())
    assert document["properties"] == expected
    assert list(document["properties"]) == list(expected)
    own = IMAGE.T
    if document["turn"] is not None:
        own = np.flip(own.transpose(document["turn"]["axes"]), document["turn"]["flip"])
    np.testing.assert_array_equal(read[0], own)


def test_of_a_nifti_2_and_of_a_slice(made: Callable[..., Made], tmp_path: Path) -> None:
    file = volumes.write(tmp_path, "case_0000.nii", nifti(SAGITTAL, 1, 0, nib.Nifti2Image))
    assert ours(made("NibabelIO"), file.read_bytes())["properties"] == stocks(made("NibabelIO"), file)[1]
    one = volumes.write(tmp_path, "one_0000.nii", nifti(SAGITTAL, 1, 0))  # ITK reads no other
    assert ours(made("SimpleITKIO"), file.read_bytes())["properties"] == stocks(made("SimpleITKIO"), one)[1]
    flat = made("SimpleITKIO", model="flat", order=(0, 1, 2))
    for name in ("slice.nii.gz", "slice.mha", "slice.nrrd"):
        plane = sitk.GetImageFromArray(IMAGE[..., 10].T)
        plane.SetSpacing((1.3, 0.7))
        plane.SetOrigin((0, 0) if "nii" in name else (3.3, -4.4))
        sitk.WriteImage(plane, str(tmp_path / name))
        document = ours(flat, (tmp_path / name).read_bytes())
        assert document["properties"] == stocks(flat, tmp_path / name)[1], name


@pytest.mark.parametrize("name", ["case.nrrd", "case.mha"])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient"])
def test_of_a_file_that_itk_alone_reads(name: str, reader: str, made: Callable[..., Made], tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(IMAGE.T)
    image.SetSpacing((1.3, 1 / 3, 1.9))
    image.SetOrigin((-20.1, 1e-3, 7))
    image.SetDirection((SAGITTAL[:3, :3] / np.linalg.norm(SAGITTAL[:3, :3], axis=0)).ravel().astype(float).tolist())
    sitk.WriteImage(image, str(tmp_path / name), True)
    member = made(reader)
    assert ours(member, (tmp_path / name).read_bytes())["properties"] == stocks(member, tmp_path / name)[1]


def test_of_pictures(made: Callable[..., Made], tmp_path: Path) -> None:
    flat = made("NaturalImage2DIO", model="flat", order=(0, 1, 2))
    for name in ("picture.png", "picture.tif"):
        imsave(tmp_path / name, IMAGE[..., 10].T.astype(np.uint8), check_contrast=False)
        assert ours(flat, (tmp_path / name).read_bytes())["properties"] == stocks(flat, tmp_path / name)[1], name
    stack = made("Tiff3DIO")
    tifffile.imwrite(tmp_path / "case_0000.tif", IMAGE.T)
    assert (
        ours(stack, (tmp_path / "case_0000.tif").read_bytes())["properties"]
        == (stocks(stack, tmp_path / "case_0000.tif")[1])
    )


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAL"])
def test_an_archives_own_orientation_leaves_the_images_properties(
    orientation: str, made: Callable[..., Made], tmp_path: Path
) -> None:
    """Stock knows no such thing: the answer, and the box in it, lie as the image was sent."""
    file = volumes.write(tmp_path, "case_0000.nii", nifti(SAGITTAL, 1, 1))
    document = ours(made("SimpleITKIO", orientation=orientation), file.read_bytes())
    assert document == {"reader": "SimpleITKIO", "properties": stocks(made("SimpleITKIO"), file)[1], "turn": None}


def test_they_come_in_a_zip_beside_what_was_asked_for(pipeline: Callable[[str], Pipeline], tmp_path: Path) -> None:
    model = pipeline("five_folds")
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.gzipped(nifti(OBLIQUE, 1, 1)))
    asked = {"folds": 0, "use_mirroring": False, "tile_step_size": 1}

    def answer(**options: object) -> tuple[str, bytes]:
        text = json.dumps(asked | options)
        response = model.answer(Request({"body": file.read_bytes()}, {"X-Nnunet-Options": text}))
        assert response.status is HTTPStatus.OK, response.body
        return response.content_type, response.body

    plain_type, plain = answer()
    assert plain_type == "application/gzip"
    kind, body = answer(properties=True)
    assert kind == "application/zip"
    files = zipfile.ZipFile(io.BytesIO(body))
    assert files.namelist() == ["labels.nii.gz", "properties.json"]
    assert files.read("labels.nii.gz") == plain
    properties = json.loads(files.read("properties.json"))["properties"]
    assert properties["bbox_used_for_cropping"] == [[5, 19], [2, 23], [3, 18]]
    _, body = answer(properties=True, save_probabilities=True, output_format="npz")
    assert zipfile.ZipFile(io.BytesIO(body)).namelist() == ["labels.npz", "probabilities.npz", "properties.json"]
