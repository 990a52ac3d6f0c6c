"""A marker at a known place in the patient is found there again, whatever came in and whatever goes out.

The marker is an ellipsoid; each writer below is a library that knows nothing of this project, and so is each reader.
The network is replaced by a threshold, so that the right answer is known; everything else is what a request runs.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from itertools import product
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine

from nnunet_torchserve import codecs
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price, Settings
from nnunet_torchserve.engine.prediction import Keep, Prediction, Reservation, Watcher
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat, Priority, ProbabilityFormat, SegType
from nnunet_torchserve.orientation import turn_towards
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.volume import LabelMap, Placement
from support.dicom_files import ACQUISITIONS, Acquisition, series, zip_of
from support.examples import thin
from support.segmentations import by_dcmqi, by_highdicom, check_object
from support.tables import table
from support.volumes import rotation

Matrix = npt.NDArray[np.float64]

RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
TOLERANCE_MM = 1e-3
MARKER = 3
"""Intensity of the marker; everything else has 1."""


class Grid:
    """A grid of voxels in the patient: ``affine`` takes voxel (x, y, z) to LPS mm."""

    def __init__(self, affine: Matrix, shape: tuple[int, int, int]) -> None:
        self.affine, self.shape = affine, shape

    @property
    def spacing(self) -> Matrix:
        lengths: Matrix = np.linalg.norm(self.affine[:3, :3], axis=0)
        return lengths

    @property
    def direction(self) -> Matrix:
        return self.affine[:3, :3] / self.spacing

    @property
    def orthonormal(self) -> bool:
        return np.allclose(self.direction.T @ self.direction, np.eye(3), atol=1e-6)

    def positions(self) -> Matrix:
        """LPS mm of every voxel, (x, y, z, 3)."""
        places: Matrix = np.moveaxis(np.indices(self.shape), 0, -1) @ self.affine[:3, :3].T + self.affine[:3, 3]
        return places

    def marker(self) -> npt.NDArray[np.bool_]:
        """(x, y, z): an ellipsoid off the middle, longest along the patient's x, so that every mirroring moves it."""
        centre = np.array(self.shape) * (0.31, 0.42, 0.58) @ self.affine[:3, :3].T + self.affine[:3, 3]
        radii = self.spacing.max() * np.array([3.1, 2.2, 1.6])
        inside: npt.NDArray[np.bool_] = (((self.positions() - centre) / radii) ** 2).sum(-1) < 1
        return inside

    def centroid(self) -> Matrix:
        """LPS mm."""
        mean: Matrix = self.positions()[self.marker()].mean(0)
        return mean


def grid(
    axes: Sequence[int] = (0, 1, 2),
    signs: Sequence[int] = (1, 1, 1),
    angles: Sequence[float] = (0, 0, 0),
    spacing: Sequence[float] = (1.5, 1.5, 1.5),
    origin: Sequence[float] = (0, 0, 0),
    shear: float = 0,
) -> Grid:
    turn = rotation(angles)
    columns = turn @ (np.eye(3)[:, list(axes)] * signs)
    columns[:, 1] += shear * columns[:, 0]
    columns[:, 1] /= np.linalg.norm(columns[:, 1])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = columns * spacing, origin
    return Grid(affine, (14, 17, 12))


GRIDS = {
    "straight": grid(),
    "oblique": grid(angles=(0.3, -0.2, 0.5), origin=(-71.3, 20.9, 812.4)),
    "left-handed": grid(signs=(-1, 1, 1), angles=(0.1, 0.2, 0.3), origin=(30, -40, 5)),
    "flipped": grid(signs=(-1, -1, -1), origin=(90, 126, -72)),
    "axes swapped": grid(axes=(2, 0, 1), signs=(1, -1, 1), origin=(1, 2, 3)),
    "sagittal and oblique": grid(axes=(1, 2, 0), angles=(0.05, 0.6, -0.1), origin=(-5, 7, 11)),
    "anisotropic": grid(spacing=(0.7, 0.9, 5.0), angles=(0.2, 0, 0.1), origin=(10, 20, 30)),
    "not orthonormal": grid(shear=0.12, angles=(0.1, 0.2, 0.3), origin=(4, 5, 6)),
}
CUBIC = {name: each for name, each in GRIDS.items() if name != "anisotropic"}
"""The test model's spacing, so that nothing is resampled."""


def image_of(where: Grid, dtype: str = "int16") -> npt.NDArray[np.generic]:
    """(x, y, z)"""
    return np.where(where.marker(), MARKER, 1).astype(dtype)


# --- writers: what a client sends ------------------------------------------------------------------------------------


def as_nifti(where: Grid, dtype: str = "int16", codes: tuple[int, int] = (1, 1)) -> bytes:
    image = nib.Nifti1Image(image_of(where, dtype), RAS @ where.affine)
    image.set_sform(RAS @ where.affine, codes[1])
    image.set_qform(RAS @ where.affine, codes[0] if where.orthonormal else 0)
    image.header["pixdim"][1:4] = where.spacing
    content: bytes = image.to_bytes()
    return content


def as_scaled_nifti(where: Grid) -> bytes:
    """Stored 0 and 4 mean 1 and 3."""
    image = nib.Nifti1Image.from_bytes(as_nifti(where, "uint8"))
    stored = ((np.asarray(image.dataobj) - 1) * 2).astype(np.uint8)
    header = image.header.copy()
    header.set_slope_inter(0.5, 1.0)
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + bytes(4) + stored.tobytes(order="F")


def as_nifti_2(where: Grid) -> bytes:
    image = nib.Nifti2Image(image_of(where, "uint16"), RAS @ where.affine)
    image.set_sform(RAS @ where.affine, 1)
    content: bytes = image.to_bytes()
    return content


def as_nifti_of_one_volume_in_4d(where: Grid) -> bytes:
    image = nib.Nifti1Image(image_of(where)[..., None], RAS @ where.affine)
    image.set_sform(RAS @ where.affine, 1)
    content: bytes = image.to_bytes()
    return content


def sitk_image(where: Grid) -> sitk.Image:
    image = sitk.GetImageFromArray(image_of(where).T)
    image.SetSpacing(where.spacing.tolist())
    image.SetOrigin(where.affine[:3, 3].tolist())
    image.SetDirection(where.direction.ravel().tolist())
    return image


def by_simpleitk(where: Grid, name: str, folder: Path, *, compress: bool) -> bytes:
    sitk.WriteImage(sitk_image(where), str(folder / name), compress)
    return (folder / name).read_bytes()


def as_pynrrd(where: Grid, folder: Path) -> bytes:
    """In RAS, as 3D Slicer does not write it but may."""
    affine = RAS @ where.affine
    header = {
        "space": "right-anterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "encoding": "gzip",
    }
    nrrd.write(str(folder / "a.nrrd"), image_of(where, "uint16"), header)
    return (folder / "a.nrrd").read_bytes()


def as_npz(where: Grid) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(
        file,
        image=image_of(where).T,
        spacing=where.spacing,
        origin=where.affine[:3, 3],
        direction=where.direction,
    )
    return file.getvalue()


def as_npy(where: Grid) -> bytes:
    file = io.BytesIO()
    np.save(file, image_of(where, "float32").T)
    return file.getvalue()


def placement(where: Grid) -> dict[str, object]:
    return {
        "spacing": where.spacing.tolist(),
        "origin": where.affine[:3, 3].tolist(),
        "direction": where.direction.ravel().tolist(),
    }


WRITERS: dict[str, Callable[[Grid, Path], bytes]] = {
    "nii": lambda where, _: as_nifti(where),
    "nii.gz by SimpleITK": lambda where, folder: by_simpleitk(where, "a.nii.gz", folder, compress=True),
    "nii, sform only": lambda where, _: as_nifti(where, codes=(0, 2)),
    "nii, scaled": lambda where, _: as_scaled_nifti(where),
    "nii, float64": lambda where, _: as_nifti(where, "float64"),
    "nii, 4-D": lambda where, _: as_nifti_of_one_volume_in_4d(where),
    "NIfTI-2": lambda where, _: as_nifti_2(where),
    "nrrd by SimpleITK": lambda where, folder: by_simpleitk(where, "a.nrrd", folder, compress=True),
    "nrrd by pynrrd, RAS": as_pynrrd,
    "mha": lambda where, folder: by_simpleitk(where, "a.mha", folder, compress=False),
    "mha, compressed": lambda where, folder: by_simpleitk(where, "a.mha", folder, compress=True),
    "npz": lambda where, _: as_npz(where),
    "npy": lambda where, _: as_npy(where),
}
ONLY_ORTHONORMAL = {"nii.gz by SimpleITK"}
"""Writers that cannot say anything else."""


# --- readers: what a client finds in the answer ----------------------------------------------------------------------


def found_by_nibabel(body: bytes, folder: Path) -> Matrix:
    """Names differ in their stem, because ITK takes ``x.nii`` for ``x.nii.gz`` where both lie side by side."""
    name = "packed.nii.gz" if body.startswith(b"\x1f\x8b") else "answer.nii"
    (folder / name).write_bytes(body)
    image = nib.load(folder / name)
    return centre_of(np.asarray(image.dataobj), RAS @ image.affine)


def found_by_simpleitk(name: str) -> Callable[[bytes, Path], Matrix]:
    def find(body: bytes, folder: Path) -> Matrix:
        (folder / name).write_bytes(body)
        image = sitk.ReadImage(str(folder / name))
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        return centre_of(sitk.GetArrayFromImage(image).T, affine)

    return find


def found_by_pynrrd(body: bytes, folder: Path) -> Matrix:
    (folder / "answer.nrrd").write_bytes(body)
    labels, header = nrrd.read(str(folder / "answer.nrrd"))
    assert header["space"] == "left-posterior-superior"
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
    return centre_of(labels, affine)


def found_in_npz(body: bytes, _: Path) -> Matrix:
    content = np.load(io.BytesIO(body), allow_pickle=False)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = content["direction"] * content["spacing"], content["origin"]
    return centre_of(content["labels"].T, affine)


def found_in_probabilities(body: bytes, folder: Path) -> Matrix:
    """Where class 1 is the likeliest."""
    (folder / "probabilities.nii.gz").write_bytes(body)
    image = nib.load(folder / "probabilities.nii.gz")
    likeliest = np.asarray(image.dataobj).argmax(-1)
    return centre_of((likeliest == 1).astype(np.uint8), RAS @ image.affine)


def found_in_report(body: bytes, _: Path) -> Matrix:
    report = json.loads(body)
    [structure] = [each for each in report["structures"] if each["labels"] == [1]]
    assert report["coordinates"].startswith("LPS")
    return np.array(structure["centroid_mm"])


def centre_of(labels: npt.NDArray[np.generic], affine: Matrix) -> Matrix:
    """LPS mm of the mean of label 1's voxels (x, y, z)."""
    assert labels.dtype == np.uint8
    mean: Matrix = affine[:3, :3] @ np.argwhere(labels == 1).mean(0) + affine[:3, 3]
    return mean


READERS: dict[str, list[Callable[[bytes, Path], Matrix]]] = {
    "labels.nii": [found_by_nibabel, found_by_simpleitk("answer.nii")],
    "labels.nii.gz": [found_by_nibabel, found_by_simpleitk("packed.nii.gz")],
    "labels.nrrd": [found_by_simpleitk("answer.nrrd"), found_by_pynrrd],
    "labels.mha": [found_by_simpleitk("answer.mha")],
    "labels.npz": [found_in_npz],
    "report.json": [found_in_report],
    "probabilities.nii.gz": [found_in_probabilities],
}
PROBABILITIES = {"save_probabilities": True, "probability_format": "nii.gz"}
ALL_OUTPUTS = ("nii", "nii.gz", "nrrd", "mha", "npz", "json")


def check(body: bytes, where: Grid, folder: Path, *, itk_reads_nifti: bool) -> None:
    """Every file of a zip, by every reader that can: the marker is where it was put.

    ITK reads neither NIfTI-2, which answers a NIfTI-2 image, nor a NIfTI whose axes are not at right angles.
    """
    parts = zipfile.ZipFile(io.BytesIO(body))
    assert sorted(parts.namelist()) == sorted(READERS)
    for name, readers in READERS.items():
        for reader in readers:
            if reader.__qualname__.startswith("found_by_simpleitk") and ".nii" in name and not itk_reads_nifti:
                continue
            place = reader(parts.read(name), folder)
            np.testing.assert_allclose(place, where.centroid(), atol=TOLERANCE_MM, err_msg=f"{name} by {reader}")


# --- the claims ------------------------------------------------------------------------------------------------------


class Threshold:
    """An engine whose segmentation is known: label 1 where the image is bright."""

    backend = Backend.EAGER

    @contextmanager
    def reserve(
        self,
        price: Price,
        deadline: float | None,
        *,
        guaranteed: bool = False,
        watcher: Watcher | None = None,
        answer_key: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Iterator[Reservation]:
        yield Reservation(0.0)

    def predict(
        self,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None,
        watcher: Watcher | None = None,
        keep: Keep | None = None,
        passes_after: int = 0,
    ) -> Prediction:
        bright = (data[0] > (data.min() + data.max()) / 2).to(torch.float16)
        logits = torch.stack([1 - bright, bright, *[torch.zeros_like(bright) - 1] * 2])
        return Prediction(logits, queue_s=0.0, network_s=0.0, backend=Backend.EAGER)


@pytest.fixture(scope="module")
def finder(pipeline: Callable[[str], Pipeline]) -> Callable[..., bytes]:
    """Sends an image through a whole request; returns the zip of every output format."""
    model = pipeline("five_folds")
    bundles = {letters: replace_orientation(model, letters) for letters in (None, "RAS", "LPS", "PIR")}

    def find(body: bytes, options: dict[str, object], orientation: str | None = None) -> bytes:
        asked = json.dumps({"folds": [0], "output_format": ALL_OUTPUTS} | PROBABILITIES | options).encode()
        response = bundles[orientation].answer(Request({"image": body, "options": asked}, {}))
        assert response.status == HTTPStatus.OK, response.body
        return response.body

    return find


def replace_orientation(model: Pipeline, letters: str | None) -> Pipeline:
    bundle = ModelBundle(model.bundle.folder)
    bundle.lead.description = bundle.lead.description.model_copy(update={"input_orientation": letters})
    return Pipeline(bundle, Threshold(), Limits(), 600.0)


@pytest.mark.parametrize(("name", "writer", "orientation"), table(CUBIC, WRITERS, [None, "RAS", "PIR"]))
def test_a_marker_stays_where_it_is_in_the_patient(
    name: str, writer: str, orientation: str | None, finder: Callable[..., bytes], tmp_path: Path
) -> None:
    where = GRIDS[name]
    if writer in ONLY_ORTHONORMAL and not where.orthonormal:
        pytest.skip("this writer cannot write it")
    options = placement(where) if writer == "npy" else {}
    body = finder(WRITERS[writer](where, tmp_path), options, orientation)
    check(body, where, tmp_path, itk_reads_nifti=where.orthonormal and writer != "NIfTI-2")


angle = st.floats(-1.2, 1.2)
millimetres = st.floats(0.2, 8)
offset = st.floats(-1500, 1500)


@settings(max_examples=thin(150), suppress_health_check=list(HealthCheck))
@given(
    axes=st.permutations((0, 1, 2)),
    signs=st.tuples(*[st.sampled_from((-1, 1))] * 3),
    angles=st.tuples(angle, angle, angle),
    spacing=st.tuples(millimetres, millimetres, millimetres),
    origin=st.tuples(offset, offset, offset),
    shear=st.sampled_from((0.0, 0.0, 0.1, -0.3)),
    writer=st.sampled_from(sorted(WRITERS)),
    orientation=st.sampled_from((None, "RAS", "LPS", "SAL")),
    reader=st.sampled_from(("SimpleITKIO", "NibabelIO")),
)
def test_any_geometry_survives_any_format(
    axes: Sequence[int],
    signs: Sequence[int],
    angles: Sequence[float],
    spacing: Sequence[float],
    origin: Sequence[float],
    shear: float,
    writer: str,
    orientation: str | None,
    reader: str,
    tmp_path: Path,
) -> None:
    """Without resampling: the labels are the marker on the grid that the codecs give."""
    where = grid(axes, signs, angles, spacing, origin, shear)
    if writer in ONLY_ORTHONORMAL and not where.orthonormal:
        return
    placed = Options.model_validate_json(json.dumps(placement(where))).placement if writer == "npy" else None
    image = codecs.open_image(WRITERS[writer](where, tmp_path), Limits(), reader, placed)
    turn = turn_towards(image.geometry, orientation)
    labels = (turn.turn(image.read())[0] > 2).astype(np.uint8)
    probabilities = np.stack([1 - labels, labels]).astype(np.float32)
    answer = turn.turn_back(LabelMap(labels, turn.after, probabilities, (0, 1)))
    options = Options(
        output_format=tuple(OutputFormat(name) for name in ALL_OUTPUTS),
        save_probabilities=True,
        probability_format=ProbabilityFormat.NIFTI_GZ,
    )
    form = codecs.answer_form(options, image.native_format, image.geometry)
    body = codecs.encode(answer, form, codecs.About([image], Painting({"marker": (1,)}))).body
    check(body, where, tmp_path, itk_reads_nifti=where.orthonormal and writer != "NIfTI-2")


def test_left_stays_left(finder: Callable[..., bytes], tmp_path: Path) -> None:
    """The plainest case, in numbers: a marker on the patient's left has a positive x in LPS and a negative in RAS."""
    where = grid(origin=(-10.0, -12.0, -9.0))
    left = np.argwhere(where.positions()[..., 0] > 0)
    array = np.ones(where.shape, np.int16)
    array[tuple(left.T)] = MARKER
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing(where.spacing.tolist())
    image.SetOrigin(where.affine[:3, 3].tolist())
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    parts = zipfile.ZipFile(io.BytesIO(finder((tmp_path / "a.nrrd").read_bytes(), {})))
    assert found_in_report(parts.read("report.json"), tmp_path)[0] > 3
    answer = nib.Nifti1Image.from_bytes(parts.read("labels.nii"))
    voxels = np.argwhere(np.asarray(answer.dataobj) == 1)
    assert (apply_affine(answer.affine, voxels)[:, 0] < 0).all()


@pytest.mark.parametrize("taken", ["sform", "qform"])
def test_where_sform_and_qform_disagree_every_answer_says_the_same(
    taken: str, finder: Callable[..., bytes], tmp_path: Path
) -> None:
    """ITK takes the sform if its code is 1, else the qform; a NIfTI answer keeps both."""
    where, other = GRIDS["oblique"], GRIDS["left-handed"]
    sform, qform = (where, GRIDS["flipped"]) if taken == "sform" else (other, where)
    image = nib.Nifti1Image(image_of(where), RAS @ sform.affine)
    image.set_sform(RAS @ sform.affine, 1 if taken == "sform" else 2)
    image.set_qform(RAS @ qform.affine, 1)
    (tmp_path / "in.nii").write_bytes(image.to_bytes())
    body = finder(image.to_bytes(), {})
    parts = zipfile.ZipFile(io.BytesIO(body))
    for name, readers in READERS.items():
        for reader in readers:
            if reader not in {found_by_nibabel, found_in_probabilities}:  # nibabel always takes the sform
                np.testing.assert_allclose(
                    reader(parts.read(name), tmp_path), where.centroid(), atol=TOLERANCE_MM, err_msg=name
                )
    written = nib.Nifti1Image.from_bytes(parts.read("labels.nii"))
    np.testing.assert_array_equal(written.get_sform(), image.get_sform())
    np.testing.assert_array_equal(written.get_qform(), image.get_qform())


# --- slices ----------------------------------------------------------------------------------------------------------


def flat_image(angle: float) -> tuple[sitk.Image, Matrix]:
    """A 2-D image, turned in its plane, and where its marker's centroid lies, (x, y) mm."""
    c, s = np.cos(angle), np.sin(angle)
    array = np.ones((23, 31), np.uint8)
    array[4:9, 17:29] = MARKER
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.8, 1.7))
    image.SetOrigin((-40.5, 12.25))
    image.SetDirection((c, -s, s, c))
    y, x = np.argwhere(array == MARKER).mean(0)
    return image, np.array(image.TransformContinuousIndexToPhysicalPoint((x, y)))


@pytest.mark.parametrize("angle", [0.0, 0.4, -2.0])
@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.npy", "a.npz", "a.png"])
def test_a_marker_on_a_slice_stays_where_it_is(name: str, angle: float, tmp_path: Path) -> None:
    image, place = flat_image(angle)
    array = sitk.GetArrayFromImage(image)
    given = Placement(image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    if name == "a.npy":
        np.save(tmp_path / name, array)
    elif name == "a.npz":
        direction = np.reshape(image.GetDirection(), (2, 2))
        np.savez(tmp_path / name, a=array, spacing=image.GetSpacing(), origin=image.GetOrigin(), direction=direction)
    else:
        sitk.WriteImage(image, str(tmp_path / name))
    placement = given if name in {"a.npy", "a.png"} else None
    source = codecs.open_image((tmp_path / name).read_bytes(), Limits(), "SimpleITKIO", placement)
    assert (source.geometry.shape, source.geometry.ndim) == ((1, 23, 31), 2)
    labels = (source.read()[0] == MARKER).astype(np.uint8)
    outputs = tuple(OutputFormat(each) for each in (*ALL_OUTPUTS, "png"))
    form = codecs.answer_form(Options(output_format=outputs), source.native_format, source.geometry)
    about = codecs.About([source], Painting({"marker": (1,)}))
    body = codecs.encode(LabelMap(labels, source.geometry), form, about).body
    zipfile.ZipFile(io.BytesIO(body)).extractall(tmp_path)

    for flat in ("labels.nrrd", "labels.mha"):
        answer = sitk.ReadImage(str(tmp_path / flat))
        y, x = np.argwhere(sitk.GetArrayFromImage(answer) == 1).mean(0)
        np.testing.assert_allclose(answer.TransformContinuousIndexToPhysicalPoint((x, y)), place, atol=TOLERANCE_MM)
    content = np.load(tmp_path / "labels.npz")
    y, x = np.argwhere(content["labels"][0] == 1).mean(0)
    found = content["direction"] @ (content["spacing"] * (x, y)) + content["origin"]
    np.testing.assert_allclose(found, place, atol=TOLERANCE_MM)
    nifti = nib.load(tmp_path / "labels.nii.gz")
    x, y = np.argwhere(np.asarray(nifti.dataobj) == 1).mean(0)
    np.testing.assert_allclose((RAS @ nifti.affine @ (x, y, 0, 1))[:2], place, atol=TOLERANCE_MM)
    report = json.loads((tmp_path / "report.json").read_bytes())
    np.testing.assert_allclose(report["structures"][0]["centroid_mm"], [*place, 0], atol=TOLERANCE_MM)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "labels.png"))), labels[0])


# --- DICOM -----------------------------------------------------------------------------------------------------------


def as_series(acquisition: Acquisition) -> tuple[bytes, Grid]:
    """A zip of a series with the marker, and where it lies."""
    where = Grid(acquisition.affine(), (14, 17, 12))
    images = series(image_of(where).T, where.affine, backwards=acquisition.backwards)
    return zip_of(images), where


def check_segmentation(body: bytes, where: Grid, folder: Path) -> None:
    """highdicom and dcmqi find the marker as segment 1, and dciodvfy no error."""
    check_object(body, folder)
    for found in (by_highdicom(body), by_dcmqi(body, folder)):
        mask, affine = found[1]
        place = affine[:3, :3] @ np.argwhere(mask).mean(0) + affine[:3, 3]
        np.testing.assert_allclose(place, where.centroid(), atol=TOLERANCE_MM)
        assert np.count_nonzero(mask) == np.count_nonzero(where.marker())


WAYS = list(product(SegType, ("RAS", "LPS", "PIR")))
SERIES = [
    pytest.param(name, *way, marks=() if number % len(WAYS) == chosen else pytest.mark.long)
    for number, name in enumerate(ACQUISITIONS)
    for chosen, way in enumerate(WAYS)
]
"""Each acquisition in one way, and each way with one; every combination in ``make test-long``."""


@pytest.mark.parametrize(("name", "kind", "orientation"), SERIES)
def test_a_marker_in_a_series_is_there_in_every_answer(
    name: str, kind: SegType, orientation: str, finder: Callable[..., bytes], tmp_path: Path
) -> None:
    """However the patient lay and the slices were cut, and however the model's training images lay."""
    image, where = as_series(ACQUISITIONS[name])
    options = {"output_format": [*ALL_OUTPUTS, "dicom-seg"], "seg_type": kind}
    parts = zipfile.ZipFile(io.BytesIO(finder(image, options, orientation)))
    assert sorted(parts.namelist()) == sorted([*READERS, "labels.dcm"])
    check_segmentation(parts.read("labels.dcm"), where, tmp_path)
    for file, readers in READERS.items():
        for reader in readers:
            place = reader(parts.read(file), tmp_path)
            np.testing.assert_allclose(place, where.centroid(), atol=TOLERANCE_MM, err_msg=f"{file} by {reader}")
