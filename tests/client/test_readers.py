"""Every reader of nnU-Net: the same calls through its predictor and ours, on the core that a server runs.

With ``preprocess="stock"``, so that probabilities are stock's to the bit (docs/parity.md).
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)
import tifffile
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from skimage.io import imsave

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve_client import RemotePredictor, errors
from nnunet_torchserve_tools import predict
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support import core_peer, stock, volumes
from support.predictions import assert_same, assert_same_files

LAST_BITS = 1e-3
"""How far probabilities may be from stock's where the server preprocesses in its own way (docs/parity.md)."""

SHAPE = (20, 24, 18)
TURNED = volumes.oblique((1.3, 1.6, 1.9)) @ np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])


@dataclass(frozen=True)
class Kind:
    """A model with one of nnU-Net's readers, and a case of its.

    Attributes:
        model: of the tests.
        reader: that its plans name.
        ending: of its files.
        atol: of probabilities. The array of ``NibabelIOWithReorient`` does not lie in memory in the order of its axes,
            so that NumPy sums it in another order, and mean and deviation differ in their last bits.
    """

    model: str
    reader: str
    ending: str = ".nii.gz"
    atol: float = 0.0

    def write_case(self, folder: Path) -> Path:
        """The file of a case."""
        file = folder / f"case_0000{self.ending}"
        image, _ = volumes.blobs(SHAPE, seed=5)
        if self.reader == "NaturalImage2DIO":
            imsave(file, (image[:, :, 9] / 4).clip(0, 255).astype(np.uint8), check_contrast=False)
        elif self.reader == "Tiff3DIO":
            tifffile.imwrite(file, image.astype(np.int16).T)
            (folder / "case.json").write_text('{"spacing": [1.9, 1.6, 1.3]}')
        elif self.model == "flat":
            picture = sitk.GetImageFromArray(image[:, :, 9].astype(np.int16))
            picture.SetSpacing((1.4, 1.6))
            picture.SetOrigin((-20.0, 7.0))
            sitk.WriteImage(picture, file)
        else:
            file.write_bytes(volumes.nifti_gz(image.astype(np.int16), TURNED))
        return file


KINDS = [
    Kind("five_folds", "SimpleITKIOWithReorient"),
    Kind("five_folds", "Tiff3DIO", ".tif"),
]
MORE_KINDS = [  # tests/parity compares the files of each reader too
    Kind("five_folds", "NibabelIOWithReorient", atol=1e-3),
    Kind("five_folds", "NibabelIO"),
    Kind("flat", "SimpleITKIO"),
    Kind("flat", "NaturalImage2DIO", ".png"),
    Kind("flat", "NaturalImage2DIO", ".bmp"),
]
Predictors = tuple[nnUNetPredictor, RemotePredictor]


@pytest.fixture(
    scope="module",
    params=[*KINDS, *(pytest.param(each, marks=pytest.mark.long) for each in MORE_KINDS)],
    ids=lambda kind: f"{kind.reader} {kind.ending}",
)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture(scope="module")
def both(kind: Kind, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictors]:
    folder = tmp_path_factory.mktemp("model") / models[kind.model].name
    shutil.copytree(models[kind.model], folder)
    for name, change in (("plans", {"image_reader_writer": kind.reader}), ("dataset", {"file_ending": kind.ending})):
        document = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(document | change))
    with served(ArchiveRequest(folder, folder.parent / "store", name="m", folds=(0,))) as ours:
        yield stock.loaded(folder, folds=[0], use_mirroring=False), ours


@contextmanager
def served(request: ArchiveRequest) -> Iterator[RemotePredictor]:
    """A predictor before the core of a server that has this archive."""
    [archive] = make_archives(request)
    unpacked = archive.parent.parent / "unpacked"
    zipfile.ZipFile(archive).extractall(unpacked)
    bundle = ModelBundle(unpacked)
    pipeline = Pipeline(bundle, LocalEngine(bundle, torch.device("cpu")), Limits(), 600.0)
    with (
        core_peer.serving(pipeline) as peer,
        RemotePredictor(peer.url, "m", use_mirroring=False, preprocess="stock") as ours,
    ):
        yield ours


@pytest.fixture
def case(kind: Kind, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return kind.write_case(tmp_path / "in")


def test_files_into_a_folder(both: Predictors, kind: Kind, case: Path, tmp_path: Path) -> None:
    for each, name in zip(both, ("theirs", "ours"), strict=True):
        (tmp_path / name).mkdir()
        each.predict_from_files_sequential(str(case.parent), str(tmp_path / name), True)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", kind.atol)


def test_a_folder_by_the_command(both: Predictors, kind: Kind, case: Path, tmp_path: Path) -> None:
    theirs, ours = both
    (tmp_path / "theirs").mkdir()
    theirs.predict_from_files_sequential(str(case.parent), str(tmp_path / "theirs"), True)
    server = ["--server", ours.client.urls[0], "--model", "m", "-f", "0", "--disable_tta"]
    predict.run(["-i", str(case.parent), "-o", str(tmp_path / "ours"), *server, "--save_probabilities"])
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", LAST_BITS)


def test_files_whose_results_are_returned(both: Predictors, kind: Kind, case: Path) -> None:
    for probabilities in (False, True):
        stocks, ours = (each.predict_from_files_sequential([[str(case)]], None, probabilities) for each in both)
        assert_same(stocks, ours, kind.atol)


def test_arrays_as_its_reader_gives_them(both: Predictors, kind: Kind, case: Path, tmp_path: Path) -> None:
    theirs, _ = both
    image, properties = theirs.plans_manager.image_reader_writer_class().read_images([str(case)])
    for each, name in zip(both, ("theirs", "ours"), strict=True):
        (tmp_path / name).mkdir()
        each.predict_single_npy_array(image, dict(properties), None, str(tmp_path / name / "case"), True)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours", kind.atol)
    stocks, ours = (each.predict_single_npy_array(image, dict(properties), None, None, True) for each in both)
    assert_same(stocks, ours, kind.atol)


def test_an_array_that_was_resampled_is_predicted_with_its_own_spacing(models: dict[str, Path], tmp_path: Path) -> None:
    """Its properties still say where the image lay: nnU-Net writes there, and predicts with the new spacing."""
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(volumes.blobs(SHAPE, 5)[0], TURNED))
    theirs = stock.loaded(models["five_folds"], folds=[0], use_mirroring=False)
    image, properties = theirs.plans_manager.image_reader_writer_class().read_images([str(file)])
    properties = {**properties, "spacing": [0.7 * size for size in properties["spacing"]]}
    with served(ArchiveRequest(models["five_folds"], tmp_path / "store", name="m", folds=(0,))) as ours:
        for each, name in ((theirs, "theirs"), (ours, "ours")):
            (tmp_path / name).mkdir()
            each.predict_single_npy_array(image, dict(properties), None, str(tmp_path / name / "case"), True)
    assert_same_files(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_an_array_is_turned_as_its_file_is_where_the_model_wants_one_orientation(
    reader: type[SimpleITKIO | NibabelIO], models: dict[str, Path], tmp_path: Path
) -> None:
    image = volumes.blobs(SHAPE, 5)[0].astype(np.int16)
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(image, TURNED))
    array, properties = reader().read_images([str(file)])
    shutil.copytree(models["five_folds"], folder := tmp_path / models["five_folds"].name)
    plans = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(json.dumps(plans | {"image_reader_writer": reader.__name__}))
    request = ArchiveRequest(folder, tmp_path / "store", name="m", folds=(0,), input_orientation="RAS")
    with served(request) as ours:
        of_file = ours.predict_from_files([[str(file)]], None)
        labels = ours.predict_single_npy_array(array, properties)
        assert_same(of_file, [labels])
        assert np.ptp(labels) > 0
        with pytest.raises(errors.MissingProperty, match="RAS"):
            ours.predict_single_npy_array(array, {"spacing": properties["spacing"]})


def test_an_unfinished_file_has_no_name_of_the_datasets(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nnU-Net's own writer is used: whoever lists the folder meanwhile sees no image."""
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(volumes.blobs(SHAPE, 5)[0], TURNED))
    image, properties = SimpleITKIO().read_images([str(file)])
    (tmp_path / "out").mkdir()
    seen: list[list[str]] = []
    write_seg = SimpleITKIO.write_seg

    def write(self: SimpleITKIO, *arguments: object) -> None:
        write_seg(self, *arguments)
        seen.append([each.name for each in (tmp_path / "out").iterdir() if each.name.endswith(".nii.gz")])

    monkeypatch.setattr(SimpleITKIO, "write_seg", write)
    known = {**properties, "spacing": [0.7 * size for size in properties["spacing"]]}
    with served(ArchiveRequest(models["five_folds"], tmp_path / "store", name="m", folds=(0,))) as ours:
        ours.predict_single_npy_array(image, known, None, str(tmp_path / "out" / "case"))
    assert seen == [[]]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["case.nii.gz"]
