"""``archive --backend openvino:int8``: calibrated on images, measured, and most of its layers in int8."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.backends import openvino_networks
from nnunet_torchserve.engine.golden import golden_name, load_networks, load_networks_or_eager
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.layer_precisions import whole_layers
from nnunet_torchserve.machine import processor_flags
from nnunet_torchserve.member_description import GOLDEN_FILE
from nnunet_torchserve.open_weights import OpenWeights
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve_tools import quantisation
from nnunet_torchserve_tools.accuracy_table import lines
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.calibration import LEAST_PATCHES, calibration_patches
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.validate import validate
from nnunet_torchserve_tools.validation_cases import Tolerance, Validation, ValidationCase, cases_of
from support import volumes
from support.odd_models import OddModel
from support.packaged import pipeline_of

CPU = torch.device("cpu")
INT8 = Backend.OPENVINO_INT8
WINDOWS = 54
"""Of all images that it is calibrated on."""

runs_int8 = pytest.mark.skipif(
    not processor_flags() & openvino_networks._FLAGS[INT8], reason="this processor has no instructions for int8"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of 27 windows each in ``calibration``, and one of one patch, with its labels."""
    folder = tmp_path_factory.mktemp("int8")
    affine = volumes.oblique((1.5, 1.5, 1.5), 0.0)
    for number in range(2):
        image, _ = volumes.blobs((48, 64, 48), seed=60 + number)
        volumes.write(folder / "calibration", f"case_{number}_0000.nii.gz", volumes.nifti_gz(image, affine))
    image, labels = volumes.blobs((24, 28, 24), seed=70)
    volumes.write(folder / "imagesTs", "other_0000.nii.gz", volumes.nifti_gz(image, affine))
    volumes.write(folder / "labelsTs", "other.nii.gz", volumes.nifti_gz(labels, affine))
    return folder


@dataclass(frozen=True)
class Made:
    """An archive of int8, the same unpacked, and what was told meanwhile."""

    archive: Path
    bundle: ModelBundle
    told: list[str]


@pytest.fixture(scope="module")
def made(models: dict[str, Path], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    scratch, told = tmp_path_factory.mktemp("made"), list[str]()
    request = ArchiveRequest(
        models["five_folds"],
        scratch / "store",
        folds=(0,),
        name="m",
        backend=INT8,
        calibration=(images / "calibration",),
        validation=Validation((images / "imagesTs",), images / "labelsTs", Tolerance(1, 1)),
    )
    [archive] = make_archives(request, told.append)
    zipfile.ZipFile(archive).extractall(scratch / "model")
    return Made(archive, ModelBundle(scratch / "model"), told)


def changed(bundle: ModelBundle, target: Path, change: Callable[[Path], None]) -> ModelBundle:
    """A copy of the archive that somebody made otherwise: without the report, the checksums are right."""
    folder = Path(shutil.copytree(bundle.folder, target))
    (folder / "accuracy.json").unlink()
    change(folder / bundle.description.members[0].folder)
    described = json.loads((folder / BUNDLE_FILE).read_text())
    del described["files"]["accuracy.json"]
    for name in described["files"]:
        described["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / BUNDLE_FILE).write_text(json.dumps(described))
    return ModelBundle(folder)


@runs_int8
def test_most_layers_run_in_int8_and_the_report_says_how_many(made: Made) -> None:
    networks = load_networks(made.bundle, CPU, INT8).of("3d_fullres")
    report = made.bundle.accuracy
    assert report is not None
    assert report.backend is INT8
    assert report.precisions == dict(networks.precisions)
    whole, layers = whole_layers(report.precisions)
    assert layers > whole > layers / 2
    assert f"in int8: {whole} of {layers} convolutions and matrix products" in made.told
    assert f"calibrated on {WINDOWS} patches (3d_fullres) of 2 images" in made.told
    assert set(made.bundle.description.backend.made_with) == {"openvino", "nncf"}  # type: ignore[union-attr]
    assert list(made.bundle.lead.folder.glob("fold_0.safetensors"))


@runs_int8
def test_a_report_tells_images_of_the_calibration_from_others(made: Made, images: Path) -> None:
    """Also one that is made later, of the archive alone."""
    calibration = images / "calibration"
    stored = made.bundle.accuracy
    assert stored is not None
    assert stored.calibrated_cases == 0
    assert stored.calibrated_on == tuple(
        hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(calibration.iterdir())
    )
    one_of_two = Validation((images / "imagesTs", calibration / "case_1_0000.nii.gz"))
    later = validate(made.archive, one_of_two, lambda _line: None)
    assert later.calibrated_cases == 1
    assert "calibrated on 1 of these 2 cases, which flatters: it may lose more of other images" in lines(later)


@runs_int8
def test_answers_are_nearly_eagers_and_always_the_same(made: Made) -> None:
    """Other bits than those of float32 as well, or nothing would have been quantised."""
    settings = Settings("3d_fullres", (0,), (0, 2), tile_step_size=0.5, use_gaussian=True)
    data = torch.from_numpy(volumes.blobs((30, 36, 28), seed=80)[0])[None]
    data = (data - data.mean()) / data.std()
    slow, fast = (LocalEngine(made.bundle, CPU, backend=each) for each in (Backend.EAGER, INT8))
    expected, found = slow.predict(data, settings), fast.predict(data, settings)
    assert (expected.logits.argmax(0) == found.logits.argmax(0)).float().mean() > 0.97
    assert (expected.logits.float() - found.logits.float()).abs().max() > 1e-2
    assert torch.equal(fast.predict(data, settings).logits, found.logits)


@runs_int8
def test_graphs_come_back_to_the_bit(made: Made) -> None:
    bundle = made.bundle
    networks = load_networks(bundle, CPU, INT8)
    weights = OpenWeights(bundle.members.values(), bundle.description.files, networks.files)
    patch = torch.ones((1, 1, *bundle.lead.patch_size))
    expected = networks.of("3d_fullres").forward(0, patch)
    networks.unload()
    networks.load(weights)
    assert torch.equal(networks.of("3d_fullres").forward(0, patch), expected)


@runs_int8
def test_the_golden_logits_are_its_own_and_other_ones_are_noticed(
    made: Made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def other(folder: Path) -> None:
        golden = load_file(folder / GOLDEN_FILE)
        name = golden_name(INT8, 0)
        assert not torch.equal(golden[name], golden["fold_0"])
        golden[name] = golden[name].flip(0)
        save_file(golden, folder / GOLDEN_FILE)

    def none(folder: Path) -> None:
        golden = load_file(folder / GOLDEN_FILE)
        del golden[golden_name(INT8, 0)]
        save_file(golden, folder / GOLDEN_FILE)

    assert load_networks_or_eager(changed(made.bundle, tmp_path / "a", other), CPU, INT8, 1).backend is Backend.EAGER
    assert "golden patch: the logits of 3d_fullres, fold 0" in caplog.text
    with pytest.raises(BundleError, match="the archive has no logits of 3d_fullres, fold 0, by openvino:int8"):
        load_networks(changed(made.bundle, tmp_path / "b", none), CPU, INT8)


@runs_int8
def test_a_graph_of_float32_is_not_taken_for_int8(
    made: Made, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = ArchiveRequest(
        models["five_folds"], tmp_path / "store", folds=(0,), name="m", backend=Backend.OPENVINO_FLOAT32
    )
    [archive] = make_archives(request)
    zipfile.ZipFile(archive).extractall(tmp_path / "float32")

    def exchange(folder: Path) -> None:
        for file in (tmp_path / "float32").rglob("*.openvino.*"):
            shutil.copyfile(file, folder / file.name)

    other = changed(made.bundle, tmp_path / "model", exchange)
    assert load_networks_or_eager(other, CPU, INT8, 1).backend is Backend.EAGER
    assert "OpenVINO computes only 0 of the " in caplog.text


def test_a_processor_whose_sums_would_overflow_does_not_run_it(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino_networks, "processor_flags", lambda: frozenset({"avx2", "avx512f"}))
    assert load_networks_or_eager(made.bundle, CPU, INT8, 1).backend is Backend.EAGER
    assert "no instructions for openvino:int8: sums of its products would overflow; it takes AVX512-VNNI" in caplog.text


def test_patches_are_parts_of_the_preprocessed_images_and_always_the_same(made: Made, images: Path) -> None:
    cases = cases_of(Validation((images / "calibration",)), made.bundle.lead)
    found = [calibration_patches(made.bundle, HandlerSettings(), cases, lambda _line: None) for _ in range(2)]
    assert found[0]["3d_fullres"].shape == (WINDOWS, 1, 1, *made.bundle.lead.patch_size)
    assert np.array_equal(found[0]["3d_fullres"], found[1]["3d_fullres"])
    assert len({patch.tobytes() for patch in found[0]["3d_fullres"]}) == WINDOWS
    # z-scored as a whole, and so are many windows together
    assert abs(float(found[0]["3d_fullres"].mean())) < 0.2
    assert 0.8 < float(found[0]["3d_fullres"].std()) < 1.2


def test_a_cascades_second_stage_is_calibrated_on_labels_of_its_first(tmp_path: Path) -> None:
    lowres = OddModel(named="3d_lowres", spacing=3.0).write(tmp_path)
    last = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres").write(tmp_path)
    bundle = pipeline_of(last, tmp_path / "cascade", previous_stages=(lowres,)).bundle
    size = tuple(3 * n for n in bundle.lead.patch_size[::-1])
    image, _ = volumes.blobs((size[0], size[1], size[2]), seed=90)
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(image, volumes.oblique((1.5, 1.5, 1.5), 0.0)))
    copies = [
        ValidationCase(f"case_{number}", (file,), None) for number in range(12)
    ]  # of the coarse grid there is less
    found = calibration_patches(bundle, HandlerSettings(), copies, lambda _line: None)
    assert set(found) == {"3d_lowres", "3d_cascade_fullres"}
    labels = found["3d_cascade_fullres"][:, 0, 1:]
    assert labels.shape[1] == len(bundle.lead.dataset["labels"]) - 1
    assert set(np.unique(labels)) == {0, 1}
    assert labels.sum(axis=1).max() == 1


def test_too_few_patches_are_refused_with_their_number(made: Made, images: Path) -> None:
    cases = cases_of(Validation((images / "imagesTs",)), made.bundle.lead)
    with pytest.raises(
        UsageError, match=rf"at least {LEAST_PATCHES} patches, .* have 1 patches \(3d_fullres\): name more"
    ):
        calibration_patches(made.bundle, HandlerSettings(), cases, lambda _line: None)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--backend", "openvino:int8"], "--backend openvino:int8 needs --calibrate"),
        (["--calibrate", "x"], "--calibrate is for --backend openvino:int8"),
        (["--backend", "openvino:bf16", "--calibrate", "x"], "--calibrate is for --backend openvino:int8"),
        (["--backend", "openvino:int8", "--calibrate", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_use_is_told(flags: list[str], reason: str, models: dict[str, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["archive", str(models["flat"]), "--output", str(tmp_path), *flags])
    assert done.exit_code == UsageError.exit_code
    assert reason in done.output


def test_without_nncf_it_is_not_made_and_the_reason_told(
    models: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantisation.REQUIRES, "nncf", "<1")
    folder = images / "calibration"
    request = ArchiveRequest(
        models["flat"], tmp_path, backend=INT8, calibration=(folder,), validation=Validation((folder,))
    )
    with pytest.raises(ToolError, match=r"making int8 needs nncf<1; .*pip install '\.\[quantize\]'"):
        make_archives(request)
    assert not list(tmp_path.iterdir())
