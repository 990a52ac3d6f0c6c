"""One image, one behaviour: whatever format ITK writes it in, it has the same channels, voxels and place, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs.nifti_headers import encode_nifti
from nnunet_torchserve.errors import ServingError
from nnunet_torchserve.limits import Limits

FORMATS = ["nii", "nii.gz", "nrrd", "mha"]
RNG = np.random.default_rng(11)
COS, SIN = np.cos(0.3), np.sin(0.3)


def volume(components: int = 1) -> sitk.Image:
    """A turned volume with so many numbers a voxel."""
    shape = (4, 5, 6) if components == 1 else (4, 5, 6, components)
    image = sitk.GetImageFromArray(RNG.normal(size=shape).astype(np.float32), isVector=components > 1)
    image.SetSpacing((1.25, 1.5, 2.0))
    image.SetOrigin((1, 2, 3))
    image.SetDirection((COS, -SIN, 0, SIN, COS, 0, 0, 0, 1))
    return image


def thick_slice(components: int = 3, kind: str = "float32", direction: tuple[float, ...] | None = None) -> sitk.Image:
    """A volume of one coronal slice 5 mm thick, or one that lies otherwise."""
    voxels = (RNG.random((1, 5, 6, components)) * 255).astype(kind)
    image = sitk.GetImageFromArray(voxels if components > 1 else voxels[..., 0], isVector=components > 1)
    image.SetSpacing((1.25, 1.5, 5.0))
    image.SetOrigin((1, 2, 3))
    image.SetDirection(direction or (1, 0, 0, 0, 0, 1, 0, -1, 0))
    return image


def plane(components: int = 1, kind: str = "float32") -> sitk.Image:
    shape = (5, 6) if components == 1 else (5, 6, components)
    image = sitk.GetImageFromArray((RNG.random(shape) * 255).astype(kind), isVector=components > 1)
    image.SetSpacing((1.25, 1.5))
    return image


def turned(image: sitk.Image) -> sitk.Image:
    image.SetDirection((COS, -SIN, SIN, COS))
    return image


def joined(*images: sitk.Image, start: float = 0.0, step: float = 1.0) -> sitk.Image:
    return sitk.JoinSeries(list(images), start, step)


IMAGES: dict[str, tuple[Callable[[], sitk.Image], int | None]] = {
    "3-D": (volume, 1),
    "series": (lambda: joined(volume(), volume()), 2),
    "series of five, with times": (lambda: joined(*(volume() for _ in range(5)), start=7.0, step=2.5), 5),
    "series of one": (lambda: joined(volume()), 1),
    "vectors of 2": (lambda: volume(2), 2),
    "vectors of 3": (lambda: volume(3), 3),
    "vectors of 6": (lambda: volume(6), 6),
    "series of vectors": (lambda: joined(volume(2), volume(2)), None),
    "2-D": (plane, 1),
    "planes joined": (lambda: joined(plane(), plane()), 1),
    "one plane joined": (lambda: joined(plane()), 1),
    "2-D vectors": (lambda: plane(2), 2),
    "a slice 5 mm thick": (lambda: thick_slice(1), 1),
    "a slice of vectors 5 mm thick": (thick_slice, 3),
    "a slice of vectors across the patient": (lambda: thick_slice(2, direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)), 2),
    "a slice of colours 5 mm thick": (lambda: thick_slice(3, "uint8"), 3),
    "2-D vectors, turned": (lambda: turned(plane(2)), 2),
    "RGB": (lambda: plane(3, "uint8"), 3),
    "RGBA": (lambda: plane(4, "uint8"), 4),
}
"""Images and how many channels they have; ``None``: they are refused."""


@pytest.mark.parametrize("name", IMAGES)
def test_every_format_gives_one_answer(name: str, tmp_path: Path) -> None:
    make, channels = IMAGES[name]
    image = make()
    grid = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        grid = np.moveaxis(grid, -1, 0)
    for ending in FORMATS:
        file = tmp_path / f"case_0000.{ending}"
        sitk.WriteImage(image, str(file))
        if channels is None:
            with pytest.raises(ServingError) as refusal:
                codecs.open_image(file.read_bytes(), Limits(), "SimpleITKIO")
            assert refusal.value.code == "wrong_channels"
            continue
        source = codecs.open_image(file.read_bytes(), Limits(), "SimpleITKIO")
        voxels, geometry = source.read(), source.geometry
        assert source.channels == channels
        np.testing.assert_array_equal(voxels, grid.reshape(voxels.shape).astype(np.float32))
        dimensions = min(image.GetDimension(), 3)
        assert geometry.ndim == dimensions
        np.testing.assert_allclose(geometry.spacing[:dimensions], image.GetSpacing()[:dimensions], rtol=1e-6)
        np.testing.assert_allclose(geometry.origin[:dimensions], image.GetOrigin()[:dimensions], atol=1e-5)
        if dimensions == 3 == image.GetDimension():
            np.testing.assert_allclose(geometry.direction.ravel(), image.GetDirection(), atol=1e-6)
        if (
            image.GetNumberOfComponentsPerPixel() == 1
        ):  # of vectors nnU-Net's reader takes another axis for the channels
            expected, properties = SimpleITKIO().read_images([str(file)])
            np.testing.assert_array_equal(voxels, expected)
            np.testing.assert_allclose(geometry.spacing_zyx, properties["spacing"], rtol=1e-6)


SERIES = (
    "NRRD0005\ntype: uchar\ndimension: 4\n{space}\nsizes: 2 3 4 2\nspace directions: {directions}\nkinds: {kinds}\n"
)
STRAIGHT = "(0.5,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,0,1)"


@pytest.mark.parametrize("kinds", ["domain domain domain domain", "space space space time"])
@pytest.mark.parametrize(
    "space", ["space dimension: 4", "space: left-posterior-superior-time", "space: scanner-xyz-time", "space: LPST"]
)
def test_a_space_with_a_fourth_axis_is_read_as_itk_reads_it(space: str, kinds: str, tmp_path: Path) -> None:
    file = tmp_path / "series.nrrd"
    header = SERIES.format(space=space, directions=STRAIGHT, kinds=kinds) + "encoding: raw\nspace origin: (5,6,7,9)\n\n"
    file.write_bytes(header.encode() + bytes(range(48)))
    source = codecs.open_image(file.read_bytes(), Limits(), "SimpleITKIO")
    expected, properties = SimpleITKIO().read_images([str(file)])
    np.testing.assert_array_equal(source.read(), expected)
    assert list(source.geometry.spacing_zyx) == list(properties["spacing"])
    assert source.geometry.origin == (5, 6, 7)


@pytest.mark.parametrize(
    ("directions", "kinds", "code"),
    [
        ("(0.5,0,0,1) (0,2,0,0) (0,0,3,0) (0,0,0,1)", "domain domain domain domain", "malformed"),
        ("(0.5,0,0,0) (0,2,0,0) (0,0,3,0) (1,0,0,1)", "domain domain domain domain", "malformed"),
        (STRAIGHT, "list domain domain domain", "wrong_channels"),
        ("none (0,2,0,0) (0,0,3,0) (0,0,0,1)", "domain domain domain domain", "wrong_channels"),
    ],
)
def test_a_fourth_axis_that_lies_in_space_is_refused(directions: str, kinds: str, code: str) -> None:
    header = SERIES.format(space="space dimension: 4", directions=directions, kinds=kinds) + "encoding: raw\n\n"
    with pytest.raises(ServingError) as refusal:
        codecs.open_image(header.encode() + bytes(48), Limits(), "SimpleITKIO")
    assert refusal.value.code == code


@pytest.mark.parametrize("lean", [1e-17, -1e-9])
def test_what_rounding_leaves_of_a_zero_does_not_mix_the_channels_with_space(lean: float, tmp_path: Path) -> None:
    image = joined(volume(), volume())
    affine = np.eye(4)
    affine[0, 3], affine[3, 1] = lean, -lean
    image.SetDirection(tuple((np.reshape(image.GetDirection(), (4, 4)) + affine - np.eye(4)).ravel()))
    for ending in FORMATS:
        file = tmp_path / f"case_0000.{ending}"
        sitk.WriteImage(image, str(file))
        source = codecs.open_image(file.read_bytes(), Limits(), "SimpleITKIO")
        expected, properties = SimpleITKIO().read_images([str(file)])
        np.testing.assert_array_equal(source.read(), expected)
        np.testing.assert_allclose(source.geometry.spacing_zyx, properties["spacing"], rtol=1e-6)
        np.testing.assert_allclose(source.geometry.direction[2], (0, 0, 1), atol=1e-6)


@pytest.mark.parametrize("lean", [1e-3, 0.5])
def test_channels_that_lean_into_space_are_refused_in_mha_too(lean: float, tmp_path: Path) -> None:
    image, file = joined(volume(), volume()), tmp_path / "case_0000.mha"
    sitk.WriteImage(image, str(file))
    matrix = np.reshape(image.GetDirection(), (4, 4)).T
    matrix[3, 0] = lean
    lines = file.read_bytes().split(b"\n")
    number = next(n for n, line in enumerate(lines) if line.startswith(b"TransformMatrix"))
    lines[number] = b"TransformMatrix = " + " ".join(str(value) for value in matrix.ravel()).encode()
    with pytest.raises(ServingError, match="mixes the axis of channels"):
        codecs.open_image(b"\n".join(lines), Limits(), "SimpleITKIO")


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 5, 6, 1), (4, 5, 1, 3), (4, 5, 6), (4, 5, 6, 1, 1), (4, 5)])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_vectors_by_name_only_are_read_as_what_they_are(shape: tuple[int, ...], reader: str, tmp_path: Path) -> None:
    image = nib.Nifti1Image(RNG.normal(size=shape).astype(np.float32), np.diag([1, 2, 3, 1]))
    image.header.set_intent("vector")
    file = tmp_path / "case_0000.nii"
    image.to_filename(file)
    source = codecs.open_image(file.read_bytes(), Limits(), reader)
    expected, properties = SimpleITKIO().read_images([str(file)])
    np.testing.assert_array_equal(source.read(), expected)
    assert list(source.geometry.spacing_zyx) == list(properties["spacing"])


@pytest.mark.parametrize("shape", [(4, 5, 6, 2, 3), (4, 5, 6, 1, 3, 2)])
def test_vectors_of_a_series_are_told_what_would_be_right(shape: tuple[int, ...]) -> None:
    image = nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4))
    image.header.set_intent("vector")
    with pytest.raises(ServingError, match="4-D with the channels last") as refusal:
        codecs.open_image(image.to_bytes(), Limits(), "SimpleITKIO")
    assert refusal.value.code == "wrong_channels"


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_an_answer_to_a_slice_of_vectors_keeps_its_thickness_and_place(reader: str) -> None:
    place = np.array([[1.5, 0, 0, 10], [0, 0, 5, 20], [0, 1.5, 0, 30], [0, 0, 0, 1]])
    image = nib.Nifti1Image(RNG.normal(size=(4, 6, 1, 1, 3)).astype(np.float32), place)
    image.header.set_intent("vector")
    source = codecs.open_image(image.to_bytes(), Limits(), reader)
    labels = np.zeros(source.geometry.shape, np.uint8)
    for template in (source.nifti_header, None):
        answer = nib.Nifti1Image.from_bytes(encode_nifti(labels, source.geometry, template))
        assert answer.shape == (4, 6, 1)
        np.testing.assert_allclose(answer.header.get_zooms(), (1.5, 1.5, 5.0))
        np.testing.assert_allclose(answer.affine, place, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "components"), [("RGB-color", 3), ("RGBA-color", 4), ("3-vector", 3), ("2-vector", 2)]
)
def test_colours_and_vectors_of_other_writers_are_channels_too(kind: str, components: int) -> None:
    header = (
        f"NRRD0005\ntype: uchar\ndimension: 3\nspace dimension: 2\nsizes: {components} 2 3\n"
        f"space directions: none (1,0) (0,1)\nkinds: {kind} domain domain\nencoding: raw\n\n"
    )
    voxels = np.arange(6 * components, dtype=np.uint8)
    source = codecs.open_image(header.encode() + voxels.tobytes(), Limits(), "SimpleITKIO")
    expected = np.moveaxis(voxels.reshape(1, 3, 2, components), -1, 0)
    np.testing.assert_array_equal(source.read(), expected)


@pytest.mark.parametrize("names", ["RGB", "RGBA"])
def test_colours_of_nifti_are_channels_as_itk_reads_them(names: str, tmp_path: Path) -> None:
    kind = np.dtype([(name, "u1") for name in names])
    voxels = RNG.integers(0, 256, (4, 5, 6, len(names)), np.uint8)
    file = tmp_path / "colours.nii"
    nib.Nifti1Image(voxels.view(kind)[..., 0], np.eye(4)).to_filename(file)
    source = codecs.open_image(file.read_bytes(), Limits(), "SimpleITKIO")
    itk = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    np.testing.assert_array_equal(source.read(), np.moveaxis(itk, -1, 0))
    assert source.channels == len(names)
