"""What a message says fits what was sent: nobody who sends a picture is told about the spacing in its header."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import tifffile
from PIL import Image

from nnunet_torchserve import codecs
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import affordable, price, settings_for
from nnunet_torchserve.codecs.source import ImageSource
from nnunet_torchserve.errors import ServingError, TooLarge, TooThin, WrongChannels
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.options import Options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.preprocess import preprocess
from nnunet_torchserve.request import Request
from nnunet_torchserve.volume import Geometry, Placement, Volume

MM = Placement((1.0, 1.0, 1.0))
PICTURES = "NaturalImage2DIO"
STACKS = "Tiff3DIO"


def nifti(*shape: int) -> bytes:
    """x, y, z, …"""
    return bytes(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)).to_bytes())


def npy(*shape: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.int16))
    return file.getvalue()


def png(mode: str, size: tuple[int, int] = (30, 20)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def tiff(*shape: int) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros(shape, np.uint8), photometric="minisblack")
    return file.getvalue()


def by_itk(image: Any, name: str, folder: Path) -> bytes:
    sitk.WriteImage(image, str(folder / name))
    return (folder / name).read_bytes()


def opened(body: bytes, reader: str = "SimpleITKIO", placement: Placement | None = None) -> ImageSource:
    return codecs.open_image(body, Limits(), reader, placement)


def refusal(images: list[ImageSource], names: list[str]) -> str:
    with pytest.raises(WrongChannels) as refused:
        codecs.check_channels(images, names)
    return str(refused.value)


ONE, TWO, THREE = ["CT"], ["T1", "T2"], ["R", "G", "B"]


def test_a_time_series_is_told_about_its_fourth_axis_in_every_format(tmp_path: Path) -> None:
    series = sitk.JoinSeries([sitk.Image(6, 5, 4, sitk.sitkInt16) for _ in range(7)])
    for name in ("s.nii.gz", "s.nii", "s.nrrd", "s.mha"):
        said = refusal([opened(by_itk(series, name, tmp_path))], ONE)
        assert said.startswith("the case has 7 channels, the model takes 1 (CT); ")
        assert "fourth axis" in said
        assert "of a time series send one volume" in said


def test_a_long_time_series_is_told_about_its_fourth_axis_too(tmp_path: Path) -> None:
    series = sitk.JoinSeries([sitk.Image(3, 2, 2, sitk.sitkUInt8) for _ in range(100)])
    for name in ("s.nii", "s.nrrd", "s.mha"):
        with pytest.raises(TooLarge, match=r"100 channels.* fourth axis .* send one volume"):
            opened(by_itk(series, name, tmp_path))


@pytest.mark.parametrize("name", ["v.nii", "v.nrrd", "v.mha"])
def test_vectors_are_told_about_the_numbers_of_a_voxel(name: str, tmp_path: Path) -> None:
    vectors = sitk.Image([6, 5, 4], sitk.sitkVectorFloat32, 3)
    said = refusal([opened(by_itk(vectors, name, tmp_path))], ONE)
    assert "the 3 numbers of each voxel" in said
    assert "fourth axis" not in said


@pytest.mark.parametrize(
    ("shape", "names", "said"),
    [
        ((30, 40, 50, 2), TWO, "(30, 40, 50, 2): if its channels come last, send numpy.moveaxis(array, -1, 0)"),
        ((30, 40, 50, 1), ONE, "numpy.moveaxis(array, -1, 0)"),
        ((30, 40, 50, 3), ONE, "numpy.moveaxis(array, -1, 0)"),
        ((30, 40, 50, 6), list("abcdef"), "numpy.moveaxis(array, -1, 0)"),
        ((40, 50, 3), THREE, "numpy.moveaxis(array, -1, 0)[:, None], which is (channel, 1, y, x)"),
        ((3, 40, 50), THREE, "if it is (channel, y, x), send array[:, None]"),
        ((9, 30, 40, 50), ONE, "of a time series send one volume"),
        ((30, 40, 50), TWO, "send (channel, z, y, x), or a file for each channel"),
    ],
)
def test_arrays_are_told_where_their_channels_were_looked_for(
    shape: tuple[int, ...], names: list[str], said: str
) -> None:
    assert said in refusal([opened(npy(*shape), placement=MM)], names)


def test_the_array_that_is_advised_is_taken() -> None:
    array = np.zeros((40, 50, 3), np.uint8)
    file = io.BytesIO()
    np.save(file, np.moveaxis(array, -1, 0)[:, None])
    image = opened(file.getvalue(), placement=Placement((1.0, 1.0)))
    codecs.check_channels([image], THREE)
    assert image.geometry.shape == (1, 40, 50)


def test_a_large_array_with_channels_last_is_told_so() -> None:
    with pytest.raises(TooLarge, match=r"100 channels.*numpy\.moveaxis\(array, -1, 0\)$"):
        opened(npy(100, 30, 30, 2), placement=MM)


def test_a_plane_with_channels_last_is_told_so_where_its_spacing_is_one_of_a_plane() -> None:
    with pytest.raises(ServingError, match=r"spacing has 2 numbers.*\(channel, 1, y, x\)"):
        opened(npy(40, 50, 3), placement=Placement((1.0, 1.0)))


@pytest.mark.parametrize(
    ("picture", "names", "said"),
    [
        (png("RGB"), ONE, "send it in grey"),
        (png("RGBA"), THREE, "send RGB without it"),
        (png("L"), THREE, "send it in RGB"),
        (tiff(3, 20, 30), ONE, "the 3 pages of the TIFF are its channels"),
        (png("L"), TWO, "a file for each channel"),
    ],
)
def test_pictures_are_told_about_their_colours(picture: bytes, names: list[str], said: str) -> None:
    text = refusal([opened(picture, PICTURES)], names)
    assert said in text
    assert "axis" not in text


def test_several_files_are_told_how_many_they_should_be() -> None:
    three = [opened(nifti(6, 5, 4)) for _ in range(3)]
    assert refusal(three, TWO).endswith(
        "in 3 files, the model takes 2 (T1, T2); send as many files: image_0000 to image_0001"
    )
    assert refusal(three, ONE).endswith("send one file, as field image")
    assert "image_0001 has 5: the fourth axis" in refusal([three[0], opened(nifti(6, 5, 4, 5))], TWO)


def geometry_of(body: bytes, reader: str, placement: Placement | None = None) -> Geometry:
    return opened(body, reader, placement).geometry


def stretched(member: Member, spacing: float) -> Member:
    """The same member, as if it were trained at another spacing."""
    other = Member(member.folder.parents[1], member.description)
    other.configuration.configuration["spacing"] = [spacing] * len(member.configuration.spacing)
    return other


ANY: dict[str, tuple[bytes, str, Placement | None]] = {
    "a NIfTI": (nifti(20, 20, 20), "SimpleITKIO", None),
    "a 2-D NIfTI": (nifti(20, 20), "SimpleITKIO", None),
    "an array": (npy(20, 20, 20), "SimpleITKIO", MM),
    "a picture": (png("L", (20, 20)), PICTURES, None),
    "a picture with a size": (png("L", (20, 20)), PICTURES, Placement((1.0, 1.0))),
    "a stack": (tiff(20, 20, 20), STACKS, None),
}

RIGHT = {
    "a NIfTI": ("the voxel spacing in the header", "is the spacing in mm?"),
    "a 2-D NIfTI": ("the voxel spacing in the header", "is the spacing in mm?"),
    "an array": ("the voxel spacing that was sent with it", "is the spacing in mm?"),
    "a picture": ("its pixels are taken for 1 mm", "send a larger one"),
    "a picture with a size": ("the voxel spacing that was sent with it", "is the spacing in mm?"),
    "a stack": ("its pixels are taken for 1 mm", "send a larger one"),
}


@pytest.mark.parametrize("kind", ANY)
def test_too_large_and_too_thin_speak_of_what_was_sent(kind: str, unpacked: Callable[[str], Path]) -> None:
    member = ModelBundle(unpacked("flat")).lead
    geometry = geometry_of(*ANY[kind])
    settings, options = settings_for(member, Options()), Options()
    large, thin = RIGHT[kind]
    others = {text for texts in RIGHT.values() for text in texts} - {large, thin}
    said = []
    with pytest.raises(TooLarge) as refused:
        price(stretched(member, 1e-4), geometry, 1, settings, options)
    said.append(str(refused.value))
    with pytest.raises(TooLarge) as refused:
        affordable(price(member, geometry, 1, settings, options), Limits(grid_voxels=1), geometry)
    said.append(str(refused.value))
    assert all(large in text for text in said)
    with pytest.raises(TooThin) as too_thin:
        price(stretched(member, 1e4), geometry, 1, settings, options)
    with pytest.raises(TooThin) as cropped:
        preprocess(stretched(member, 1e4), Volume(np.ones((1, *geometry.shape), np.float32), geometry))
    said += [str(too_thin.value), str(cropped.value)]
    assert all(thin in text for text in said[2:])
    assert not [text for text in said for other in others if other in text]
    assert "999" not in "".join(said)
    assert "1e+" not in "".join(said)


def test_an_array_that_is_too_thin_is_asked_for_its_axes(unpacked: Callable[[str], Path]) -> None:
    member = ModelBundle(unpacked("five_folds")).lead
    geometry = geometry_of(npy(40, 40, 1), "SimpleITKIO", Placement((0.2, 1.0, 1.0)))
    with pytest.raises(TooThin, match=r"is it \(z, y, x\)\? If its last axis holds channels"):
        price(member, geometry, 1, settings_for(member, Options()), Options())


def test_a_case_of_one_pass_a_patch_is_not_told_to_use_fewer_folds(unpacked: Callable[[str], Path]) -> None:
    member = ModelBundle(unpacked("five_folds")).lead
    geometry = geometry_of(nifti(60, 60, 60), "SimpleITKIO")
    for options in (Options(), Options.model_validate({"folds": [0], "use_mirroring": False})):
        cost = price(member, geometry, 1, settings_for(member, options), options)
        with pytest.raises(TooLarge) as refused:
            affordable(cost, Limits(passes=1), geometry)
        assert ("fewer folds" in str(refused.value)) == (cost.passes > cost.patches)


def detail(pipeline: Pipeline, parts: dict[str, bytes], **options: object) -> str:
    response = pipeline.answer(Request({**parts, "options": json.dumps(options).encode()}, {}))
    said: str = json.loads(response.body)["detail"]
    return said


def test_channels_that_disagree_are_described_as_they_are(pipeline: Callable[[str], Pipeline]) -> None:
    model = pipeline("regions")
    said = detail(model, {"image_0000": nifti(20, 20, 20), "image_0001": nifti(20, 20, 21)})
    assert said.endswith("mm (z, y, x); resample them to one grid")
    said = detail(model, {"image_0000": nifti(20, 20), "image_0001": nifti(20, 21)})
    assert "shape (21, 20) and spacing (1.0, 1.0) mm (y, x)" in said
    bundle = ModelBundle(model.bundle.folder)
    bundle.lead.plans.plans["image_reader_writer"] = PICTURES
    said = detail(replace(model, bundle=bundle), {"image_0000": png("L"), "image_0001": png("L", (30, 21))})
    assert said.endswith(
        "channel 1 has (21, 30) pixels (y, x), channel 0 has (20, 30) pixels (y, x); send pictures of one size"
    )


def zipped(*files: tuple[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in files:
            target.writestr(name, content)
    return archive.getvalue()


DICOM = bytes(128) + b"DICM" + bytes(1000)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (DICOM, "none of 1 DICOM files is an image"),
        (gzip.compress(DICOM), "a DICOM file packed by gzip"),
        (zipped(("series/", b""), ("series/IM0001", DICOM)), "none of 1 DICOM files is an image"),
        (zipped(("head.nii", nifti(4, 4, 4))), "unpack the archive and send the image"),
        (zipped(*((f"IM{k}", b"") for k in range(300))), "no DICOM file among the 300 that came"),
        (gzip.compress(png("L")), "a PNG packed by gzip"),
        (gzip.compress(b"BM" + bytes(100)), "a BMP packed by gzip"),
        (gzip.compress(tiff(20, 30)), "a TIFF packed by gzip"),
        (gzip.compress(zipped(("image.npy", npy(4, 4)))), "a zip or npz packed by gzip"),
        (gzip.compress(gzip.compress(nifti(4, 4, 4))), "packed by gzip twice"),
        (gzip.compress(b""), "an empty file in gzip"),
        (b"", "an empty body"),
        (bytes(257) + b"ustar\0" + bytes(300), "the tar is damaged or cut off"),
        (b"BZh91AY", "packed by bzip2"),
        (gzip.compress(b"\0\0\0\x01" + bytes(600)), "FreeSurfer"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
        (b"\x80\x04\x95" + bytes(600), "a pickle, which is never opened"),
        (b'{"image": "aGVsbG8="}', "a JSON document"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(body: bytes, said: str) -> None:
    with pytest.raises(ServingError) as refused:
        opened(body)
    assert said in str(refused.value)


def test_a_stack_for_a_model_of_pictures_is_not_told_of_a_plane() -> None:
    with pytest.raises(WrongChannels, match="the model takes single pictures"):
        opened(tiff(7, 20, 30), PICTURES)
