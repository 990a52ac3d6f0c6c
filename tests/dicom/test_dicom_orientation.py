"""The same body as DICOM and as NIfTI gets the same labels, voxel for voxel, by patient position.

The converters are SimpleITK and dcm2niix, with which training sets are made; they store rows in different orders.
The network is a real one, and sees left from right: :func:`test_the_wrong_orientation_gives_other_labels`.
"""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import dcm2niix
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import Response
from support.dicom_files import ACQUISITIONS, SECRET, file_of, files_of, series, zip_of, zipped
from support.volumes import blobs

Matrix = npt.NDArray[np.float64]

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (20, 24, 18)
"""x, y, z."""

ASKED = {"folds": [0], "use_mirroring": False, "output_format": "nii.gz"}


def body() -> npt.NDArray[np.int16]:
    """(z, y, x), no two sides of it alike, with a bright marker in the first corner."""
    image, _ = blobs(SHAPE, 5)
    image[:4, :3, :5] = 600
    return np.rint(image.T).astype(np.int16)


def by_simpleitk(folder: Path) -> bytes:
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    sitk.WriteImage(reader.Execute(), str(folder / "itk.nii.gz"))
    return (folder / "itk.nii.gz").read_bytes()


def by_dcm2niix(folder: Path) -> bytes:
    command = [dcm2niix.bin, "-b", "n", "-z", "n", "-f", "dcm2niix", "-o", str(folder), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "dcm2niix.nii").read_bytes()


CONVERTERS: dict[str, Callable[[Path], bytes]] = {"SimpleITK": by_simpleitk, "dcm2niix": by_dcm2niix}


@pytest.fixture(scope="module")
def ask(pipeline: Callable[[str], Pipeline]) -> Callable[..., Response]:
    """Sends an image to a model that was trained in an orientation, or whose archive does not say."""
    model = pipeline("five_folds")

    def answer(image: bytes, letters: str | None, **options: object) -> Response:
        bundle = ModelBundle(model.bundle.folder)
        bundle.lead.description = bundle.lead.description.model_copy(update={"input_orientation": letters})
        served = Pipeline(bundle, model.engine, Limits(), 600.0)
        return served.answer(Request({"image": image, "options": json.dumps(ASKED | options).encode()}, {}))

    return answer


def labels_of(response: Response) -> tuple[npt.NDArray[np.uint8], Matrix]:
    """(x, y, z), and voxel to RAS mm, by nibabel."""
    assert response.status == HTTPStatus.OK, response.body
    image = nib.Nifti1Image.from_bytes(gzip.decompress(response.body))
    return np.asarray(image.dataobj), image.affine


def at(labels: npt.NDArray[np.uint8], affine: Matrix, places: Matrix) -> npt.NDArray[np.uint8]:
    """The labels at places in the patient (n, 3), which must be the centres of voxels."""
    index = (places - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    np.testing.assert_allclose(index, np.rint(index), atol=1e-3)
    found: npt.NDArray[np.uint8] = labels[tuple(np.rint(index).astype(int).T)]
    return found


@pytest.mark.parametrize("converter", CONVERTERS)
@pytest.mark.parametrize("name", ACQUISITIONS)
def test_dicom_and_nifti_of_one_body_get_the_same_labels(
    name: str, converter: str, ask: Callable[..., Response], tmp_path: Path
) -> None:
    acquisition = ACQUISITIONS[name]
    images = series(body(), acquisition.affine(), backwards=acquisition.backwards)
    for number, image in enumerate(images):
        (tmp_path / f"{number:03}.dcm").write_bytes(file_of(image))
    nifti = CONVERTERS[converter](tmp_path)
    stored = nib.load(next(tmp_path.glob("*.nii*"))).affine
    letters = "".join(nib.aff2axcodes(stored))

    expected, theirs = labels_of(ask(nifti, None))  # as stock nnU-Net takes it: as it is stored
    found, ours = labels_of(ask(zip_of(images), letters))
    np.testing.assert_allclose(RAS @ ours, acquisition.affine(), atol=1e-4)  # the series' own grid, rows as stored
    assert found.shape == SHAPE
    assert len(np.unique(found)) >= 3
    places = np.argwhere(np.ones(SHAPE, bool)) @ ours[:3, :3].T + ours[:3, 3]
    np.testing.assert_array_equal(at(expected, theirs, places), found.ravel())


def test_the_wrong_orientation_gives_other_labels(ask: Callable[..., Response]) -> None:
    image = zip_of(series(body(), ACQUISITIONS["axial"].affine()))
    right, _ = labels_of(ask(image, "LPS"))
    for letters in ("RPS", "LAS", "LPI", "PLS"):
        wrong, _ = labels_of(ask(image, letters))
        assert np.count_nonzero(wrong != right) > 100, letters


def test_a_model_that_does_not_say_its_orientation_takes_no_dicom(ask: Callable[..., Response]) -> None:
    response = ask(zip_of(series(body(), ACQUISITIONS["axial"].affine())), None)
    problem = json.loads(response.body)
    assert (response.status, problem["code"]) == (HTTPStatus.UNPROCESSABLE_ENTITY, "orientation_unknown")
    assert "archive MODEL_FOLDER --input-orientation" in problem["detail"]
    assert "nnunet-torchserve orientation" in problem["detail"]


def test_a_reorienting_reader_in_the_plans_is_an_orientation(
    ask: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_torchserve.member import Member

    image = zip_of(series(body(), ACQUISITIONS["sagittal"].affine()))
    expected, _ = labels_of(ask(image, "RAS"))
    monkeypatch.setattr(Member, "reader", property(lambda _: "SimpleITKIOWithReorient"))
    found, _ = labels_of(ask(image, None))
    np.testing.assert_array_equal(found, expected)


def test_a_marker_in_a_corner_is_where_the_patient_has_it(ask: Callable[..., Response]) -> None:
    """In words of the patient: brightest at the right, anterior, inferior corner of an axial series."""
    from nnunet_torchserve import codecs

    affine = ACQUISITIONS["axial"].affine()
    source = codecs.open_image(zip_of(series(body(), affine)), Limits(), "SimpleITKIO")
    bright = np.argwhere(source.read()[0].transpose(2, 1, 0) > 500 - 1024).mean(0)
    place = source.geometry.affine[:3, :3] @ bright + source.geometry.affine[:3, 3]
    middle = affine[:3, :3] @ (np.array(SHAPE) / 2) + affine[:3, 3]
    assert (place < middle - 5).all()  # LPS: smaller is right, anterior, inferior


def test_files_beside_the_images_are_ignored_and_told(ask: Callable[..., Response]) -> None:
    files = files_of(series(body(), ACQUISITIONS["axial"].affine()))
    junk = {"README.TXT": SECRET.encode(), "VIEWER.EXE": b"MZ" * 100, "EMPTY": b""}
    plain, _ = labels_of(ask(zipped(files), "LPS"))
    response = ask(zipped(junk | files), "LPS")
    np.testing.assert_array_equal(labels_of(response)[0], plain)
    assert response.headers["X-Nnunet-Warning"] == "dicom_files_ignored"
