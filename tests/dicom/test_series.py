"""A series is a volume where it lies, whatever it is packed in; highdicom and SimpleITK read the same files."""

from __future__ import annotations

import io
import itertools
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
from pydicom.uid import ImplicitVRLittleEndian

from nnunet_torchserve import codecs
from nnunet_torchserve.codecs import DicomSource
from nnunet_torchserve.errors import ServingError
from nnunet_torchserve.limits import Limits
from support.dicom_files import (
    ACQUISITIONS,
    SEVERAL_FRAMES,
    change,
    enhanced,
    file_of,
    files_of,
    series,
    tarred,
    zip_of,
    zipped,
)

Matrix = npt.NDArray[np.float64]

SHAPE = (5, 6, 7)
"""z, y, x."""

VOXELS = np.random.default_rng(3).integers(0, 3000, SHAPE).astype(np.int16)
AFFINE = ACQUISITIONS["oblique"].affine((0.7, 0.9, 2.5))


def open_series(body: bytes | tuple[bytes, ...], **more: Any) -> DicomSource:
    source = codecs.open_image(body, Limits(), "SimpleITKIO", **more)
    assert isinstance(source, DicomSource)
    return source


def check(source: DicomSource, affine: Matrix = AFFINE, voxels: npt.NDArray[Any] = VOXELS) -> None:
    np.testing.assert_allclose(source.geometry.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(source.read()[0], voxels.astype(np.float64) - 1024)


PACKED: dict[str, Callable[[dict[str, bytes]], bytes | tuple[bytes, ...]]] = {
    "zip": zipped,
    "zip, deflated": lambda files: zipped(files, zipfile.ZIP_DEFLATED),
    "tar, pax": tarred,
    "tar, GNU": lambda files: tarred(files, tarfile.GNU_FORMAT),
    "tar, ustar": lambda files: tarred(files, tarfile.USTAR_FORMAT),
    "tar.gz": lambda files: tarred(files, packed=True),
    "fields": lambda files: tuple(files.values()),
    "fields of zips": lambda files: tuple(zipped({name: file}) for name, file in files.items()),
}


@pytest.mark.parametrize("packing", PACKED)
def test_a_series_is_read_from_whatever_it_is_packed_in(packing: str) -> None:
    check(open_series(PACKED[packing](files_of(series(VOXELS, AFFINE)))))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_folders_in_a_tar_are_no_files_and_a_link_is_one_that_is_left_out(
    form: int, tmp_path: Path
) -> None:
    folder = tmp_path / ("ä" * 40) / ("b" * 120)
    folder.mkdir(parents=True)
    for name, file in zip(itertools.count(), files_of(series(VOXELS, AFFINE)).values(), strict=False):
        (folder / f"{name}").write_bytes(file)
    (folder / "link").symlink_to("/etc/passwd")
    with tarfile.open(tmp_path / "all.tar", "w", format=form) as archive:
        archive.add(tmp_path / ("ä" * 40), "series")
    source = open_series((tmp_path / "all.tar").read_bytes())
    check(source)
    assert source.left_out == 1


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]])
def test_neither_names_nor_the_order_of_files_count(order: list[int]) -> None:
    images = series(VOXELS, AFFINE)
    check(open_series(zip_of([images[z] for z in order])))
    check(open_series(file_of(enhanced(VOXELS, AFFINE, order=order))))


@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_ct_mr_and_pet_are_read(modality: str) -> None:
    check(open_series(zip_of(series(VOXELS, AFFINE, modality))))


@pytest.mark.parametrize("modality", SEVERAL_FRAMES)
def test_enhanced_objects_are_read_raw_and_in_a_zip(modality: str) -> None:
    body = file_of(enhanced(VOXELS, AFFINE, modality, FrameOfReferenceUID=None))
    check(open_series(body))
    check(open_series(zipped({"a": body, "DICOMDIR": b"x"})))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, "1.2.840.10008.1.2.1"])
def test_files_without_a_preamble_are_read(syntax: str) -> None:
    files = {str(z): file_of(ds, syntax, preamble=False) for z, ds in enumerate(series(VOXELS, AFFINE))}
    check(open_series(zipped(files)))


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_highdicom_finds_the_same_values_in_the_same_places(name: str) -> None:
    """Its volume may have other axes: values are compared where they lie in the patient."""
    acquisition = ACQUISITIONS[name]
    images = series(VOXELS, acquisition.affine((0.7, 0.9, 2.5)), backwards=acquisition.backwards)
    written = [pydicom.dcmread(io.BytesIO(file_of(ds))) for ds in images]
    theirs = highdicom.get_volume_from_series(
        written, apply_real_world_transform=False, apply_presentation_lut=False, dtype=np.float64
    )
    check_places(theirs, open_series(zip_of(images)))


@pytest.mark.parametrize("modality", SEVERAL_FRAMES)
def test_highdicom_finds_the_same_in_an_enhanced_object(modality: str) -> None:
    slopes = [(1.0, -1024.0), (0.7324218, 13.5), (2.5, 0.0), (1e-3, -7.25), (3.0, 1.0)]
    body = file_of(enhanced(VOXELS, AFFINE, modality, order=[3, 1, 0, 4, 2], rescale=slopes.__getitem__))
    image = highdicom.Image.from_dataset(pydicom.dcmread(io.BytesIO(body)))
    theirs = image.get_volume(apply_real_world_transform=False, apply_presentation_lut=False, dtype=np.float64)
    check_places(theirs, open_series(body))


def check_places(theirs: Any, source: DicomSource) -> None:
    """highdicom's volume has our values where they lie in the patient."""
    ours = source.read()[0]
    index = np.argwhere(np.ones(SHAPE, bool))
    places = index[:, ::-1] @ source.geometry.affine[:3, :3].T + source.geometry.affine[:3, 3]
    there = (places - theirs.affine[:3, 3]) @ np.linalg.inv(theirs.affine[:3, :3]).T
    np.testing.assert_allclose(there, np.rint(there), atol=1e-4)
    np.testing.assert_array_equal(theirs.array[tuple(np.rint(there).astype(int).T)].astype(np.float32), ours.ravel())


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_simpleitk_has_the_same_array_and_geometry(name: str, tmp_path: Path) -> None:
    acquisition = ACQUISITIONS[name]
    images = series(VOXELS, acquisition.affine((0.7, 0.9, 2.5)), backwards=acquisition.backwards)
    for number, ds in enumerate(images):
        (tmp_path / f"{number}.dcm").write_bytes(file_of(ds))
    theirs = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path)))
    source = open_series(zip_of(images))
    np.testing.assert_array_equal(source.read()[0], sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(source.geometry.origin, theirs.GetOrigin(), atol=1e-6)
    np.testing.assert_allclose(source.geometry.spacing, theirs.GetSpacing(), atol=1e-6)
    np.testing.assert_allclose(source.geometry.direction.ravel(), theirs.GetDirection(), atol=1e-6)


def test_other_files_are_left_out_and_counted() -> None:
    images = series(VOXELS, AFFINE)
    report = series(VOXELS[:1], AFFINE, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", PixelData=None)[0]
    capture = series(VOXELS[:1], AFFINE, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")[0]
    broken = file_of(report)[:-20]
    directory = file_of(report).replace(b"1.2.840.10008.5.1.4.1.1.88.11\0", b"1.2.840.10008.1.3.10".ljust(30, b"\0"))
    beside = {"a.txt": b"no image", "empty": b"", "sr": file_of(report), "sc": file_of(capture), "cut": broken}
    inner = {"inner.zip": zip_of(images), "DICOMDIR": directory[:-20]}
    source = open_series(zipped(beside | files_of(images) | inner))
    check(source)
    assert source.left_out == 7


def test_series_uid_chooses_among_several_series() -> None:
    first, second = series(VOXELS, AFFINE, seed="a"), series(VOXELS[::-1].copy(), AFFINE, seed="b")
    body = zip_of(first + second)
    check(open_series(body, series_uid=first[0].SeriesInstanceUID))
    source = open_series(body, series_uid=second[0].SeriesInstanceUID)
    check(source, voxels=VOXELS[::-1])
    assert source.left_out == len(first)


def test_series_uid_makes_nothing_of_other_series_matter() -> None:
    """Broken images, of no class, of no object, of other patients; a damaged one that says whose it is."""
    chosen, other = series(VOXELS, AFFINE, seed="a"), series(VOXELS, AFFINE, seed="b", PatientID="OTHER")
    broken: list[dict[str, Any]] = [{"SOPClassUID": None}, {"SOPInstanceUID": None}, {"Rows": None}]
    for image, changes in zip(other, [*broken, dict[str, Any](NumberOfFrames=10**8)], strict=False):
        change(image, **changes)
    files = files_of(chosen + other)
    last = list(files)[-1]
    files[last] = files[last].replace(b"\x28\x00\x10\x00US", b"\xfe\xff\x00\xe0US")
    nameless = file_of(change(series(VOXELS[:1], AFFINE, seed="c")[0], SeriesInstanceUID=None))
    uid = chosen[0].SeriesInstanceUID
    source = open_series(zipped(files | {"nameless": nameless}), series_uid=uid)
    check(source)
    assert source.left_out == len(other) + 1
    for changes in broken:
        bad = [change(series(VOXELS, AFFINE, seed="a")[2], **changes)]
        with pytest.raises(ServingError):
            open_series(zip_of(chosen[:2] + bad + chosen[3:] + other[:1]), series_uid=uid)


def test_a_copy_of_a_file_is_dropped() -> None:
    images = series(VOXELS, AFFINE)
    check(open_series(zip_of([*images, images[2]])))


def test_jitter_of_orientations_and_positions_below_the_tolerance_is_rounding() -> None:
    images = series(VOXELS, AFFINE)
    random = np.random.default_rng(0)
    for ds in images:
        ds.ImageOrientationPatient = [f"{x + random.uniform(-1e-5, 1e-5):.8f}" for x in ds.ImageOrientationPatient]
        ds.ImagePositionPatient = [f"{x + random.uniform(-5e-3, 5e-3):.6f}" for x in ds.ImagePositionPatient]
    source = open_series(zip_of(images))
    np.testing.assert_allclose(source.geometry.affine, AFFINE, atol=2e-2)
    np.testing.assert_array_equal(source.read()[0], VOXELS - 1024.0)


@pytest.mark.parametrize("thickness", ["", "3", None])
def test_slice_thickness_is_not_looked_at(thickness: str | None) -> None:
    check(open_series(zip_of(series(VOXELS, AFFINE, SliceThickness=thickness, SpacingBetweenSlices="99"))))


def test_the_headers_of_the_chosen_series_stay_at_hand() -> None:
    """For whoever writes an answer that refers to the images."""
    images = series(VOXELS, AFFINE)
    source = open_series(zip_of(images[::-1]))
    in_order = [source.series.images[number].sop_instance for number in source.stack.order]
    assert in_order == [ds.SOPInstanceUID for ds in images]


def test_reading_takes_little_more_than_the_volume() -> None:
    """Beside the body: the volume and a frame; nothing of the archive is unpacked as a whole."""
    import tracemalloc

    voxels = np.zeros((60, 256, 256), np.int16)
    body = tarred(files_of(series(voxels, AFFINE)), packed=True)
    open_series(body).read()
    source = open_series(body)
    tracemalloc.start()
    found = source.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.25 * found.nbytes, (peak, found.nbytes)
