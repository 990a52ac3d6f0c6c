"""NIfTI in and out, against SimpleITK, which nnU-Net reads with."""

from __future__ import annotations

import bz2
import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.spatial.transform import Rotation

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs.inflate import SLACK_BYTES, ByteSource, Compression
from nnunet_torchserve.errors import (
    BadOption,
    BadSpacing,
    Malformed,
    ServingError,
    TooLarge,
    UnknownFormat,
    WrongChannels,
)
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat, ProbabilityFormat
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.volume import LabelArray, LabelMap, Placement
from support import volumes
from support.bad_requests import header as with_fields
from support.examples import thin

LIMITS = Limits(expanded_bytes=10_000_000, voxels=1_000_000)
RNG = np.random.default_rng(5)


def open_image(body: bytes, reader: str = "SimpleITKIO") -> codecs.ImageSource:
    return codecs.open_image(body, LIMITS, reader)


def encode(labels: LabelArray, image: codecs.ImageSource, output: str | None = None) -> codecs.EncodedFile:
    options = Options(output_format=None if output is None else OutputFormat(output))
    form = codecs.answer_form(options, image.native_format, image.geometry)
    return codecs.encode(LabelMap(labels, image.geometry), form, codecs.About([image], Painting({})))


def some(shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
    values = RNG.integers(0, 100, shape)
    return values.astype(dtype) if np.dtype(dtype).kind != "f" else (values / 7).astype(dtype)


DTYPES = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
@pytest.mark.parametrize("dtype", DTYPES)
def test_voxels_and_spacing_are_those_of_nnunets_reader(dtype: str, reader: type, tmp_path: Path) -> None:
    content = volumes.nifti_gz(some((7, 6, 5), dtype), volumes.oblique((0.7, 1.3, 2.9)))
    expected, properties = reader().read_images([str(volumes.write(tmp_path, "a.nii.gz", content))])
    image = open_image(content, reader.__name__)
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    assert list(image.geometry.spacing_zyx) == list(properties["spacing"])


@pytest.mark.parametrize("unit", [0, 1, 2, 3])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_length_units_are_read_as_nnunets_reader_reads_them(reader: type, unit: int, tmp_path: Path) -> None:
    content = with_fields(volumes.nifti(some((4, 5, 6), "int16"), np.diag([2.0, 3.0, 4.0, 1.0])), xyzt_units=unit)
    _, properties = reader().read_images([str(volumes.write(tmp_path, "a.nii", content))])
    np.testing.assert_allclose(open_image(content, reader.__name__).geometry.spacing_zyx, properties["spacing"])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize(("slope", "intercept"), [(2.5, -1024), (0.1, -1024.3), (1.7, 0.5), (1, 7), (-3, 2), (0, 0)])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_scaled_voxels_are_those_of_nnunets_reader(
    dtype: str, reader: type, slope: float, intercept: float, tmp_path: Path
) -> None:
    if np.dtype(dtype).kind == "f":
        array = (RNG.standard_normal((30, 30, 30)) * 3000).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        array = RNG.integers(limits.min, limits.max, (30, 30, 30), dtype)
    content = with_fields(volumes.nifti(array), scl_slope=slope, scl_inter=intercept)
    expected, _ = reader().read_images([str(volumes.write(tmp_path, "a.nii", content))])
    np.testing.assert_array_equal(open_image(content, reader.__name__).read(), expected)


@pytest.mark.parametrize(
    ("slope", "intercept"),
    [(0, -1024), (np.nan, -1024), (1e-20, 5), (1e-20, 0), (2, np.nan), (np.inf, 0), (2, np.inf), (np.nan, 7)],
)
def test_a_scaling_that_readers_disagree_on_is_refused(slope: float, intercept: float) -> None:
    with pytest.raises(Malformed, match="scaling"):
        open_image(with_fields(PLAIN, scl_slope=slope, scl_inter=intercept))


@pytest.mark.parametrize("intent", [1004, 1005, 1006])
def test_matrices_are_not_taken_for_volumes(intent: int) -> None:
    with pytest.raises(WrongChannels, match="matrices"):
        open_image(with_fields(PLAIN, intent_code=intent))


@pytest.mark.parametrize("sform", range(6))
@pytest.mark.parametrize("qform", range(6))
def test_of_two_forms_that_disagree_itks_is_taken(qform: int, sform: int, tmp_path: Path) -> None:
    image = nib.Nifti1Image(some((4, 5, 6), "int16"), np.eye(4))
    image.set_qform(volumes.oblique((1, 1.5, 2), 0.2, (1, 2, 3)), qform)
    image.set_sform(volumes.oblique((1, 1.5, 2), 0.5, (10, 20, 30)), sform)
    content = image.to_bytes()
    itk = sitk.ReadImage(str(volumes.write(tmp_path, "a.nii", content)))
    geometry = open_image(content).geometry
    np.testing.assert_allclose(geometry.origin, itk.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(geometry.direction.ravel(), itk.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(geometry.spacing, itk.GetSpacing())


def matrix(turn: Rotation, spacing: npt.NDArray[Any], origin: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn.as_matrix() * spacing, origin
    return affine.astype(np.float32)


def test_wherever_itk_reads_a_nifti_it_lies_where_itk_says(tmp_path: Path) -> None:
    """Random forms and codes; shears of about what ITK lets pass; turns of about half a circle."""
    random = np.random.default_rng(20)
    refused = 0
    for number in range(tries := thin(1500)):
        qform, sform = (int(code) for code in random.integers(0, 6, 2))
        spacing, near = random.uniform(0.5, 4, 3).astype(np.float32), random.random() < 0.5
        turn = Rotation.from_rotvec(random.normal(0, 10.0 ** random.uniform(-5, 0), 3))
        if near:  # LPS axes in RAS: where a quaternion's first number is nearly 0
            turn = turn * Rotation.from_rotvec([0, 0, np.pi])
        header = nib.Nifti1Header()
        header.set_data_shape((2, 3, 4))
        header.set_data_dtype(np.uint8)
        header.set_qform(matrix(turn, spacing, random.uniform(-200, 200, 3)), qform)
        sheared = matrix(Rotation.random(random_state=number), spacing, random.uniform(-200, 200, 3))
        sheared[:3, 1] += 10.0 ** random.uniform(-5, -2) * sheared[:3, 0]
        header.set_sform(sheared, sform)
        header["pixdim"][:4] = (random.choice([1, -1, 0, 2]), *spacing)
        content = with_fields(bytes(header.binaryblock) + bytes(4 + 24), vox_offset=352)
        try:
            itk = sitk.ReadImage(str(volumes.write(tmp_path, "a.nii", content)))
        except RuntimeError:
            refused += 1
            continue
        geometry = open_image(content).geometry
        np.testing.assert_allclose(geometry.origin, itk.GetOrigin(), atol=1e-4)
        corner = np.reshape(itk.GetDirection(), (3, 3)) @ (300, 300, 300)
        np.testing.assert_allclose(geometry.direction @ (300, 300, 300), corner, atol=0.05)
    assert refused < tries / 5, "ITK must read most of them"


@pytest.mark.parametrize("qfac", [0, 2, -1, 1, -2, np.nan])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_a_sign_of_the_third_axis_that_is_none_is_read_as_the_reader_reads_it(
    qfac: float, reader: type, tmp_path: Path
) -> None:
    image = nib.Nifti1Image(some((4, 5, 6), "int16"), np.eye(4))
    image.set_qform(volumes.oblique((1, 1.5, 2), 0.2, (1, 2, 3)), 1)
    image.set_sform(None, 0)
    content = with_fields(image.to_bytes(), pixdim={0: qfac})
    file = volumes.write(tmp_path, "a.nii", content)
    geometry = open_image(content, reader.__name__).geometry
    if reader is NibabelIO:
        np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ geometry.affine, nib.load(file).affine, atol=1e-5)
    else:
        np.testing.assert_allclose(geometry.direction.ravel(), sitk.ReadImage(str(file)).GetDirection(), atol=1e-5)


@pytest.mark.parametrize("field", [3, 4], ids=["name", "comment"])
def test_a_gzip_header_with_a_long_text_is_malformed_or_read(field: int) -> None:
    for length in (100, 70_000, 600_000):
        body = gzip.compress(PLAIN)
        body = body[:3] + bytes([2**field]) + body[4:10] + b"x" * length + b"\0" + body[10:]
        try:
            np.testing.assert_array_equal(open_image(body).read(), open_image(PLAIN).read())
        except Malformed:
            assert length > 500_000


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.npy"])
def test_other_formats_may_be_packed_by_gzip_as_a_whole(name: str, tmp_path: Path) -> None:
    array = some((6, 5, 4), "int16")
    if name == "a.npy":
        np.save(tmp_path / name, array)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name), useCompression=False)
    placement = Placement((1.0, 1.0, 1.0)) if name == "a.npy" else None
    body = gzip.compress((tmp_path / name).read_bytes())
    image = codecs.open_image(body, LIMITS, "SimpleITKIO", placement)
    np.testing.assert_array_equal(image.read()[0], array)


@pytest.mark.parametrize("sform", range(3))
@pytest.mark.parametrize("qform", range(3))
@pytest.mark.parametrize("shear", [0.0, 1e-5, 2e-3, 0.2])
def test_an_sform_that_is_no_turn_is_used_as_itk_uses_it(qform: int, sform: int, shear: float, tmp_path: Path) -> None:
    """ITK then takes the qform; without one it refuses the file, and we read the sform."""
    sheared = volumes.oblique((1, 1.5, 2), 0.5, (10, 20, 30)).astype(np.float64)
    sheared[:3, 1] += shear * 1.5 * sheared[:3, 0]
    image = nib.Nifti1Image(some((4, 5, 6), "int16"), np.eye(4))
    image.set_qform(volumes.oblique((1, 1.5, 2), 0.2, (1, 2, 3)), qform)
    image.set_sform(sheared, sform)
    image.header["pixdim"][1:4] = (1, 1.5, 2)
    content = image.to_bytes()
    geometry = open_image(content).geometry
    if sform and not qform and shear > 1e-4:
        np.testing.assert_allclose(geometry.affine, np.diag([-1, -1, 1, 1]) @ sheared, atol=0.05)
        return
    itk = sitk.ReadImage(str(volumes.write(tmp_path, "a.nii", content)))
    np.testing.assert_allclose(geometry.origin, itk.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(geometry.direction.ravel(), itk.GetDirection(), atol=1e-4)
    np.testing.assert_allclose(geometry.spacing, itk.GetSpacing())


@pytest.mark.parametrize("sform", range(3))
@pytest.mark.parametrize("qform", range(3))
def test_for_nibabels_readers_the_image_lies_where_nibabel_says(qform: int, sform: int) -> None:
    image = nib.Nifti1Image(some((4, 5, 6), "int16"), np.eye(4))
    image.set_qform(volumes.oblique((1, 1.5, 2), 0.2, (1, 2, 3)), qform)
    image.set_sform(volumes.oblique((1.1, 1.4, 2.2), 0.5, (10, 20, 30)), sform)
    image.header["pixdim"][1:4] = (1, 1.5, 2)
    content = image.to_bytes()
    loaded = nib.Nifti1Image.from_bytes(content)
    geometry = open_image(content, "NibabelIO").geometry
    np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ geometry.affine, loaded.affine, atol=1e-5)
    np.testing.assert_allclose(geometry.spacing_zyx[::-1], loaded.header.get_zooms())


def test_a_gap_before_the_voxels_is_skipped_and_not_kept() -> None:
    import tracemalloc

    gap = 64 * 2**20
    body = gzip.compress(with_fields(PLAIN, vox_offset=352.0 + gap)[:352] + bytes(gap) + PLAIN[352:], 1)
    image = codecs.open_image(body, Limits(), "SimpleITKIO")
    tracemalloc.start()
    voxels = image.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(voxels, open_image(PLAIN).read())
    assert peak < 2**20


def test_big_endian_and_nifti_2_are_read(tmp_path: Path) -> None:
    array = some((4, 5, 6), "int16")
    big = nib.Nifti1Image(array.astype(">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
    second = nib.Nifti2Image(array, np.eye(4))
    for image in (big, second):
        np.testing.assert_array_equal(open_image(image.to_bytes()).read()[0].T, array)


def test_origin_and_direction_are_itks(tmp_path: Path) -> None:
    content = volumes.nifti(some((4, 5, 6), "int16"), volumes.oblique((0.7, 1.3, 2.9)))
    itk = sitk.ReadImage(str(volumes.write(tmp_path, "a.nii", content)))
    geometry = open_image(content).geometry
    np.testing.assert_allclose(geometry.origin, itk.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(geometry.direction.ravel(), itk.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(geometry.spacing, itk.GetSpacing())


def test_two_dimensional_images_get_nnunets_spacing_between_slices(tmp_path: Path) -> None:
    content = bytes(nib.Nifti1Image(some((8, 9), "int16"), np.diag([0.5, 0.8, 1, 1])).to_bytes())
    expected, properties = SimpleITKIO().read_images([str(volumes.write(tmp_path, "a.nii", content))])
    image = open_image(content)
    np.testing.assert_array_equal(image.read(), expected, strict=True)
    np.testing.assert_allclose(image.geometry.spacing_zyx, properties["spacing"])
    body = encode(np.ones((1, 9, 8), np.uint8), image, "nii").body
    assert nib.Nifti1Image.from_bytes(body).shape == (8, 9)


def test_the_fourth_axis_is_the_channel() -> None:
    array = some((4, 5, 6, 3), "int16")
    image = open_image(volumes.nifti(array))
    assert image.channels == 3
    np.testing.assert_array_equal(image.read(), array.transpose(3, 2, 1, 0))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2), (0, 0)])
def test_labels_are_written_on_the_inputs_grid(
    kind: type, compressed: bool, codes: tuple[int, int], tmp_path: Path
) -> None:
    affine = volumes.oblique((0.7, 1.3, 2.9), angle=0.4)
    source = kind(some((7, 6, 5), "int16"), affine)
    source.set_qform(affine, codes[0])
    source.set_sform(affine, codes[1])
    source.header["descrip"] = b"NAME OF A PATIENT"
    content = source.to_bytes()
    image = open_image(gzip.compress(content) if compressed else content)
    labels = RNG.integers(0, 4, (5, 6, 7)).astype(np.uint8)
    file = encode(labels, image)

    name = "labels.nii.gz" if compressed else "labels.nii"
    written = kind.from_bytes(gzip.decompress(file.body) if compressed else file.body)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels.T)
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, kind.from_bytes(content).affine)  # type: ignore[attr-defined]
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
    assert b"PATIENT" not in bytes(written.header.binaryblock)

    if kind is nib.Nifti2Image:  # which ITK does not read
        return
    itk_in = sitk.ReadImage(str(volumes.write(tmp_path, "in.nii", content)))
    itk_out = sitk.ReadImage(str(volumes.write(tmp_path, name, file.body)))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk_out), labels)
    for itk in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
        assert getattr(itk_out, itk)() == getattr(itk_in, itk)()


def test_npz_carries_itks_geometry(tmp_path: Path) -> None:
    content = volumes.nifti(some((4, 5, 6), "int16"), volumes.oblique((0.7, 1.3, 2.9)))
    image = open_image(content)
    labels = np.ones((6, 5, 4), np.uint8)
    loaded = np.load(io.BytesIO(encode(labels, image, "npz").body))
    itk = sitk.GetImageFromArray(loaded["labels"])
    itk.SetSpacing(loaded["spacing"].tolist())
    itk.SetOrigin(loaded["origin"].tolist())
    itk.SetDirection(loaded["direction"].ravel().tolist())
    source = sitk.ReadImage(str(volumes.write(tmp_path, "a.nii", content)))
    for what in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(itk, what)(), getattr(source, what)(), atol=1e-5)


OF_NO_SERIES = tuple(output for output in OutputFormat if output is not OutputFormat.DICOM_SEG)


@pytest.mark.parametrize("output", [*OF_NO_SERIES, OF_NO_SERIES])
@pytest.mark.parametrize("probabilities", [None, *ProbabilityFormat])
def test_the_same_answer_has_the_same_bytes(
    output: OutputFormat | tuple[OutputFormat, ...], probabilities: ProbabilityFormat | None
) -> None:
    image = open_image(volumes.nifti_gz(some((4, 5, 1), "int16")))
    labels = LabelMap(np.ones((1, 5, 4), np.uint8), image.geometry, np.zeros((2, 1, 5, 4), np.float32), (0, 1))
    options = Options(output_format=output)
    if probabilities:
        options = Options(output_format=output, save_probabilities=True, probability_format=probabilities)
    form = codecs.answer_form(options, image.native_format, image.geometry)
    written = [codecs.encode(labels, form, codecs.About([image], Painting({"all": (1,)}))) for _ in range(2)]
    assert written[0] == written[1]
    assert len(written[0].body) >= codecs.smallest_answer(image.geometry, form, 8 if probabilities else 0)


def test_several_files_come_in_one_zip() -> None:
    image = open_image(volumes.nifti_gz(some((4, 5, 1), "int16")))
    labels = LabelMap(np.ones((1, 5, 4), np.uint8), image.geometry, np.zeros((2, 1, 5, 4), np.float32), (0, 1))
    options = Options(
        output_format=OF_NO_SERIES, save_probabilities=True, probability_format=ProbabilityFormat.NIFTI_GZ
    )
    form = codecs.answer_form(options, image.native_format, image.geometry)
    file = codecs.encode(labels, form, codecs.About([image], Painting({"all": (1,)})))
    assert file.content_type == "application/zip"
    assert zipfile.ZipFile(io.BytesIO(file.body)).namelist() == [
        "labels.nii.gz", "labels.nii", "labels.nrrd", "labels.mha", "labels.npz", "labels.png",
        "labels.tif", "labels.bmp", "report.json",
        "probabilities.nii.gz",
    ]  # fmt: skip


def test_probabilities_as_nifti_have_the_channels_last(tmp_path: Path) -> None:
    content = volumes.nifti_gz(some((4, 5, 6), "int16"), volumes.oblique((0.7, 1.3, 2.9)))
    image = open_image(content)
    probabilities = RNG.random((3, 6, 5, 4), np.float32)
    labels = LabelMap(np.ones((6, 5, 4), np.uint8), image.geometry, probabilities, (0, 1, 2))
    options = Options(save_probabilities=True, probability_format=ProbabilityFormat.NIFTI)
    form = codecs.answer_form(options, image.native_format, image.geometry)
    parts = zipfile.ZipFile(io.BytesIO(codecs.encode(labels, form, codecs.About([image], Painting({}))).body))
    assert parts.namelist() == ["labels.nii.gz", "probabilities.nii"]
    written = nib.Nifti1Image.from_bytes(parts.read("probabilities.nii"))
    np.testing.assert_array_equal(np.asarray(written.dataobj), probabilities.T, strict=True)
    np.testing.assert_array_equal(written.affine, nib.Nifti1Image.from_bytes(gzip.decompress(content)).affine)


@pytest.mark.parametrize("output", [OutputFormat.PNG, OutputFormat.BMP])
def test_a_volume_is_no_picture(output: OutputFormat) -> None:
    image = open_image(PLAIN)
    with pytest.raises(BadOption, match=f"{output} holds one slice"):
        codecs.answer_form(Options(output_format=output), image.native_format, image.geometry)


PLAIN = volumes.nifti(some((9, 8, 7), "int16"))
MALFORMED = {
    "cut gzip": gzip.compress(PLAIN)[:-20],
    "gzip cut in its header": gzip.compress(PLAIN)[:5],
    "wrong checksum": gzip.compress(PLAIN)[:-8] + struct.pack("<II", 1, len(PLAIN)),
    "damaged deflate stream": gzip.compress(PLAIN)[:60] + b"\xff" * 40 + gzip.compress(PLAIN)[100:],
    "garbage after the gzip stream": gzip.compress(PLAIN) + b"garbage",
    "cut voxels": PLAIN[:-1],
    "header only": PLAIN[:352],
    "unknown voxel type": with_fields(PLAIN, datatype=77),
    "no dimensions": with_fields(PLAIN, dim={0: 0}),
    "eight dimensions": with_fields(PLAIN, dim={0: 8}),
    "dimension of zero": with_fields(PLAIN, dim={2: 0}),
    "negative dimension": with_fields(PLAIN, dim={3: -7}),
    "voxels inside the header": with_fields(PLAIN, vox_offset=200.0),
    "voxels at 0": with_fields(PLAIN, vox_offset=0.0),
    "voxels at 348": with_fields(PLAIN, vox_offset=348.0),
    "voxels at NaN": with_fields(PLAIN, vox_offset=np.nan),
    "voxels before the file": with_fields(PLAIN, vox_offset=-352.0),
    "zero sform": with_fields(PLAIN, srow_x=0, srow_y=0, srow_z=0),
    "NaN in the sform": with_fields(PLAIN, srow_y={1: np.nan}),
    "impossible quaternion": with_fields(PLAIN, sform_code=0, quatern_b=5.0, quatern_c=5.0),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_bytes_that_break_their_format_are_malformed(name: str) -> None:
    with pytest.raises(Malformed):
        open_image(MALFORMED[name]).read()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x1f\x8b",
        b"not an image",
        b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(1000),
        bytes(5000),
        gzip.compress(bytes(5000)),
        with_fields(PLAIN, magic=b"ni1"),
        with_fields(PLAIN, magic=b"xxx"),
        with_fields(PLAIN, datatype=32, bitpix=64),
    ],
    ids=["empty", "two bytes", "text", "jpeg", "zeros", "zeros in gzip", "pair header", "no magic", "complex"],
)
def test_other_formats_are_named_as_unknown(body: bytes) -> None:
    with pytest.raises(ServingError) as refused:
        open_image(body).read()
    assert isinstance(refused.value, UnknownFormat) or body == b"\x1f\x8b"


def test_five_dimensions_are_more_channels_than_a_model_has() -> None:
    with pytest.raises(WrongChannels):
        open_image(volumes.nifti(some((3, 3, 3, 1, 2), "int16")))


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 1e30, 1e-30])
def test_spacing_must_be_positive(value: float) -> None:
    with pytest.raises(BadSpacing):
        open_image(with_fields(PLAIN, pixdim={2: value}))


def test_a_header_that_claims_a_trillion_voxels_is_refused_at_once() -> None:
    with pytest.raises(TooLarge):
        open_image(with_fields(PLAIN, dim={1: 10_000, 2: 10_000, 3: 10_000}))


def test_expanded_bytes_are_bounded_by_the_header() -> None:
    with pytest.raises(TooLarge):
        codecs.open_image(PLAIN, Limits(expanded_bytes=len(PLAIN) - 1), "SimpleITKIO")


def test_a_gzip_bomb_is_not_inflated() -> None:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = compressor.compress(PLAIN) + b"".join(compressor.compress(bytes(2**20)) for _ in range(64))
    bomb += compressor.flush()
    assert len(bomb) < 200_000
    image = open_image(bomb)
    with pytest.raises(TooLarge):
        image.read()


def test_a_little_padding_after_the_voxels_is_taken() -> None:
    padded = gzip.compress(PLAIN + bytes(SLACK_BYTES))
    np.testing.assert_array_equal(open_image(padded).read(), open_image(PLAIN).read())


def test_gzip_members_in_a_row_are_one_stream() -> None:
    source = ByteSource(gzip.compress(b"abc") + gzip.compress(b"def"))
    assert source.read(10) + source.read(10) == b"abcdef"


@pytest.mark.parametrize("content", [b"\0", b"ab", bytes(range(256))])
def test_zlib_streams_of_every_length_are_unpacked_whole(content: bytes) -> None:
    """isal may swallow its input before it has given its output."""
    for length in [0, 1, 1000, *range(65_000, 66_100, 37), 129_000, 131_072, 1_000_003]:
        plain = (content * (length // len(content) + 1))[:length]
        for level in (0, 1, 9):
            source = ByteSource(zlib.compress(plain, level), Compression.ZLIB)
            assert source.read_exactly(length).tobytes() == plain
            source.finish()


@pytest.mark.parametrize("compression", [Compression.ZLIB, Compression.GZIP, Compression.BZIP2])
def test_a_cut_stream_is_malformed_at_every_byte(compression: Compression) -> None:
    plain = bytes(range(256)) * 4
    packed = {
        Compression.ZLIB: zlib.compress(plain),
        Compression.GZIP: gzip.compress(plain),
        Compression.BZIP2: bz2.compress(plain),
    }[compression]

    def unpack(body: bytes) -> None:
        source = ByteSource(body, compression)
        assert source.read_exactly(len(plain)).tobytes() == plain
        source.finish()

    unpack(packed)
    for end in range(len(packed)):
        with pytest.raises(Malformed):
            unpack(packed[:end])
