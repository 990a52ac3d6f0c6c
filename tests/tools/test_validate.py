"""A backend's answers measured against eager's on images, kept with the archive, told with each answer, or refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn
from typer.testing import CliRunner

from nnunet_torchserve.accuracy import ACCURACY_FILE, AccuracyReport
from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.cases import is_default, settings_of
from nnunet_torchserve.engine import golden
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.backends.openvino_library import openvino
from nnunet_torchserve.engine.backends.openvino_networks import OpenVinoNetworks
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.options import Accumulate, ExportMethod, Options, OutputFormat, PreprocessMethod, Priority
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.postprocessing import Postprocessing
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import Response
from nnunet_torchserve_tools import golden_patches
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.graphs import write_graphs
from nnunet_torchserve_tools.label_comparison import mask_of, surface_distance_95
from nnunet_torchserve_tools.measurement import _compare, _structures
from nnunet_torchserve_tools.model_card import lines, model_card
from nnunet_torchserve_tools.validate import validate
from nnunet_torchserve_tools.validation_cases import Validation, ValidationCase
from support import volumes

CPU = torch.device("cpu")
OPENVINO, BF16 = Backend.OPENVINO_FLOAT32, Backend.OPENVINO_BFLOAT16
NAMES = ("low", "middle", "high")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``imagesTs`` and ``labelsTs`` of two cases; the second is oblique."""
    folder = tmp_path_factory.mktemp("validation")
    for number, angle in enumerate((0.0, 0.2)):
        image, labels = volumes.blobs((24, 28, 24), seed=40 + number)  # one patch
        affine = volumes.oblique((1.5, 1.5, 1.5), angle)
        volumes.write(folder / "imagesTs", f"case_{number}_0000.nii.gz", volumes.nifti_gz(image, affine))
        volumes.write(folder / "labelsTs", f"case_{number}.nii.gz", volumes.nifti_gz(labels, affine))
    return folder


@dataclass(frozen=True)
class Made:
    """An archive that was measured, unpacked, and what was told meanwhile."""

    archive: Path
    bundle: ModelBundle
    told: list[str]

    @property
    def report(self) -> AccuracyReport:
        assert self.bundle.accuracy is not None
        return self.bundle.accuracy


@pytest.fixture(scope="module")
def made(models: dict[str, Path], images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    scratch, told = tmp_path_factory.mktemp("measured"), list[str]()
    validation = Validation((images / "imagesTs",), images / "labelsTs")
    request = ArchiveRequest(
        models["five_folds"], scratch / "store", folds=(0,), name="m", backend=OPENVINO, validation=validation
    )
    [archive] = make_archives(request, told.append)
    zipfile.ZipFile(archive).extractall(scratch / "model")
    return Made(archive, ModelBundle(scratch / "model"), told)


@pytest.fixture(scope="module")
def pipelines(made: Made) -> dict[Backend, Pipeline]:
    return {
        each: Pipeline(made.bundle, LocalEngine(made.bundle, CPU, backend=each), Limits(), 600.0, backend=each)
        for each in (Backend.EAGER, OPENVINO)
    }


def ask(pipeline: Pipeline, image: Path, **options: object) -> Any:
    answer = pipeline.answer(Request({"body": image.read_bytes()}, {"X-Nnunet-Options": json.dumps(options)}))
    assert int(answer.status) == 200, answer.body
    return answer


def test_what_is_reported_is_what_clients_would_get_in_nnunets_own_numbers(
    made: Made, images: Path, pipelines: dict[Backend, Pipeline]
) -> None:
    assert made.report.backend is OPENVINO
    for number, case in enumerate(made.report.cases):
        image = images / "imagesTs" / f"case_{number}_0000.nii.gz"
        assert case.images == (hashlib.sha256(image.read_bytes()).hexdigest(),)
        answers = {
            each: np.asarray(nib.Nifti1Image.from_bytes(ask(pipeline, image, output_format="nii").body).dataobj)
            for each, pipeline in pipelines.items()
        }
        truth = np.asarray(nib.load(images / "labelsTs" / f"case_{number}.nii.gz").dataobj)
        assert case.different == (answers[Backend.EAGER] != answers[OPENVINO]).sum()
        assert list(case.structures) == list(NAMES)
        for value, each in enumerate(case.structures.values(), start=1):
            masks = {name: labels == value for name, labels in answers.items()}
            assert each.dice == nnunets_dice(masks[Backend.EAGER], masks[OPENVINO])
            assert each.labels is not None
            assert each.labels.eager_dice == nnunets_dice(truth == value, masks[Backend.EAGER])
            assert each.labels.backend_dice == nnunets_dice(truth == value, masks[OPENVINO])


def nnunets_dice(reference: npt.NDArray[Any], prediction: npt.NDArray[Any]) -> float:
    hit, extra, missed, _ = compute_tp_fp_fn_tn(reference, prediction)
    return float(2 * hit / (2 * hit + extra + missed))


def test_an_archive_keeps_its_report_under_its_checksums_and_without_names(made: Made) -> None:
    assert ACCURACY_FILE in made.bundle.description.files
    assert "case_0" not in (made.bundle.folder / ACCURACY_FILE).read_text()
    files = set(made.report.files)
    assert {f"members/3d_fullres/fold_0.{end}" for end in ("safetensors", "openvino.xml", "openvino.bin")} <= files
    assert any(line.startswith("case_1 ") and " high " in line for line in made.told)
    card = model_card(made.archive)
    assert card["backend"]["accuracy"] == made.report.summary()
    told = "\n".join(lines(card))
    assert re.search(r"measured on .*: 2 cases", told)
    assert "allowed was a loss of Dice to the labels of 0.001 in the mean, and 0.005 of a structure" in told
    assert re.search(r"mean Dice to labels, of eager and of openvino:float32: low 0\.\d{4} and 0\.\d{4}; middle", told)


def test_a_number_stands_in_the_head_of_such_answers_as_were_measured_and_of_no_others(
    made: Made, images: Path, pipelines: dict[Backend, Pipeline]
) -> None:
    image = images / "imagesTs" / "case_0_0000.nii.gz"
    fast = pipelines[OPENVINO]

    def said(pipeline: Pipeline, **options: object) -> str:
        return str(ask(pipeline, image, **options).headers["X-Nnunet-Backend"])

    name, _, number = said(fast).partition("; dice=")
    assert name == "openvino:float32"
    assert made.report.dice is not None
    assert 0 <= made.report.dice - float(number) < 1e-4
    assert said(fast, folds=[0], use_mirroring=True, postprocess=False, output_format="npz") == said(fast)
    assert said(fast, use_mirroring=False) == "openvino:float32"
    assert said(pipelines[Backend.EAGER]) == "eager"
    unmeasured = ModelBundle(made.bundle.folder)
    unmeasured.accuracy = None
    assert said(replace(fast, bundle=unmeasured)) == "openvino:float32"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), True),
        (Options(folds=(0,), use_mirroring=True, tile_step_size=0.5), True),
        (Options(priority=Priority.BATCH, output_format=OutputFormat.NRRD, postprocess=False), True),
        (Options(use_mirroring=False), False),
        (Options(tile_step_size=1.0), False),
        (Options(use_gaussian=False), False),
        (Options(accumulate=Accumulate.FLOAT32), False),
        (Options(preprocess=PreprocessMethod.STOCK), False),
        (Options(export=ExportMethod.NEAREST), False),
    ],
)
def test_options_that_decide_no_label_make_such_answers_too(options: Options, expected: bool, made: Made) -> None:
    assert is_default(made.bundle, options, settings_of(made.bundle, options)) is expected


def test_an_answer_without_the_postprocessing_that_the_model_has_is_another(made: Made) -> None:
    bundle, without = ModelBundle(made.bundle.folder), Options(postprocess=False)
    assert is_default(bundle, without, settings_of(bundle, without))
    bundle.description = bundle.description.model_copy(update={"postprocessing": Postprocessing()})
    assert not is_default(bundle, without, settings_of(bundle, without))
    assert is_default(bundle, Options(), settings_of(bundle, Options()))


class Higher:
    """A pipeline whose answers lie a voxel higher along z."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.bundle, self.backend, self._pipeline = pipeline.bundle, pipeline.backend, pipeline

    def answer(self, request: Request) -> Response:
        response = self._pipeline.answer(request)
        with np.load(io.BytesIO(response.body)) as arrays:
            content = dict(arrays)
        content["labels"] = np.roll(content["labels"], 1, axis=-3)
        file = io.BytesIO()
        np.savez(file, **content)
        return replace(response, body=file.getvalue())


def test_distances_are_along_the_axes_whose_spacing_the_image_has(
    pipelines: dict[Backend, Pipeline], tmp_path: Path
) -> None:
    """z comes first in an answer's labels, and last in its spacing."""
    image = volumes.blobs((24, 28, 24), seed=40)[0]
    file = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(image, np.diag([1.0, 2.0, 3.0, 1.0])))
    eager = pipelines[Backend.EAGER]
    higher: Any = Higher(eager)
    structures = _structures(eager.bundle)
    found = _compare(ValidationCase("case", (file,), None), ("0" * 64,), structures, eager, higher, list[str]().append)
    with np.load(io.BytesIO(ask(eager, file, output_format="npz").body)) as arrays:
        labels = arrays["labels"]
    differ = []
    for name, structure in structures.items():
        low, high = (mask_of(each, structure.painted) for each in (labels, np.roll(labels, 1, axis=-3)))
        expected = surface_distance_95(low, high, (3.0, 2.0, 1.0))
        assert found.structures[name].surface_distance_95_mm == expected
        differ.append(expected != surface_distance_95(low, high, (1.0, 2.0, 3.0)))
    assert any(differ)


def test_what_an_answer_warns_of_is_told(pipelines: dict[Backend, Pipeline], tmp_path: Path) -> None:
    constant = np.full((16, 16, 16), 7, np.int16)
    file = volumes.write(tmp_path, "a_0000.nii.gz", volumes.nifti_gz(constant, np.diag([1.5, 1.5, 1.5, 1.0])))
    eager, told = pipelines[Backend.EAGER], list[str]()
    _compare(ValidationCase("a", (file,), None), ("0" * 64,), _structures(eager.bundle), eager, eager, told.append)
    assert told == ["a: the answer warns of constant_image"]


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("no such kernel"), ValueError("odd graph")])
def test_what_a_library_raises_means_that_nothing_was_measured(
    error: Exception, made: Made, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that the model makes no network, nor a traceback."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(OpenVinoNetworks, "_compiled", fail)
    with pytest.raises(ToolError, match=f"openvino:float32 was not measured here: {type(error).__name__} {error}$"):
        validate(made.archive, Validation((images / "imagesTs",)), lambda _line: None)


def test_a_running_model_says_what_was_measured(made: Made, pipelines: dict[Backend, Pipeline]) -> None:
    described = json.loads(pipelines[OPENVINO].answer(Request({}, {"describe": "True"})).body)["backend"]
    assert described["accuracy"] == json.loads(json.dumps(made.report.summary()))
    assert described["runs"] == "openvino:float32"


def changed(made: Made, target: Path, file: str, content: bytes, *, checksum: bool) -> Path:
    """A copy of the archive in which a file is another."""
    folder = Path(shutil.copytree(made.bundle.folder, target))
    (folder / file).write_bytes(content)
    if checksum:
        described = json.loads((folder / BUNDLE_FILE).read_text())
        described["files"][file] = hashlib.sha256(content).hexdigest()
        (folder / BUNDLE_FILE).write_text(json.dumps(described))
    return folder


def test_a_report_that_was_tampered_with_is_refused(made: Made, tmp_path: Path) -> None:
    document = json.loads((made.bundle.folder / ACCURACY_FILE).read_text())
    document["cases"][0]["structures"]["high"]["common"] += 10**6
    text = json.dumps(document).encode()
    with pytest.raises(BundleError, match=r"accuracy\.json has sha256 .*damaged"):
        ModelBundle(changed(made, tmp_path / "a", ACCURACY_FILE, text, checksum=False))
    with pytest.raises(BundleError, match=r"accuracy\.json is not valid: cases\.0\.structures\.high"):
        ModelBundle(changed(made, tmp_path / "b", ACCURACY_FILE, text, checksum=True))


def test_a_report_is_no_other_weights_report(made: Made, tmp_path: Path) -> None:
    graph = "members/3d_fullres/fold_0.openvino.bin"
    content = bytearray((made.bundle.folder / graph).read_bytes())
    content[-1] ^= 1
    with pytest.raises(BundleError, match="measured with other weights or graphs than the archive holds"):
        ModelBundle(changed(made, tmp_path / "a", graph, bytes(content), checksum=True))


def test_a_backend_that_loses_too_much_makes_no_archive(
    models: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its graph were of other weights, and the golden patch were not looked at."""

    def of_other_weights(member: Member, networks: EagerNetworks) -> None:
        [network] = networks.modules
        bias = list(network.parameters())[-1]
        kept = bias.detach().clone()
        with torch.no_grad():
            bias[-1] += 3
            write_graphs(member, networks)
            bias.copy_(kept)

    monkeypatch.setattr(golden_patches, "write_graphs", of_other_weights)
    monkeypatch.setitem(golden.BACKEND_TOLERANCE, OPENVINO, 100.0)
    request = ArchiveRequest(
        models["five_folds"],
        tmp_path,
        folds=(0,),
        name="m",
        backend=OPENVINO,
        validation=Validation((images / "imagesTs",)),
    )
    with pytest.raises(ToolError, match=r"(low|middle|high) of case case_[01] loses .* Dice to eager's answer"):
        make_archives(request)
    assert not list(tmp_path.glob("*.mar"))


def test_what_this_processor_does_not_compute_in_is_not_measured_here(
    models: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = openvino().Core
    monkeypatch.setattr(core, "get_property", lambda _core, *_names: ["FP32", "INT8"])  # whatever this one has
    request = ArchiveRequest(models["flat"], tmp_path, name="m", backend=BF16)
    with pytest.raises(UsageError, match="--backend openvino:bf16 needs --validate"):
        make_archives(request)
    with pytest.raises(
        ToolError, match=r"openvino:bf16 was not measured here: this CPU has no instructions for openvino:bf16"
    ):
        make_archives(replace(request, validation=Validation((images / "imagesTs",))))
    assert not list(tmp_path.iterdir())


def test_the_command_compares_an_archive_that_is_there(made: Made, images: Path) -> None:
    call = ["validate", str(made.archive), "--images", str(images / "imagesTs"), "--labels", str(images / "labelsTs")]
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["summary"] == json.loads(json.dumps(made.report.summary()))
    assert [case["name"] for case in document["cases"]] == ["case_0", "case_1"]


def test_labels_on_another_grid_or_of_other_numbers_are_refused(made: Made, images: Path, tmp_path: Path) -> None:
    """Both answers would have a Dice near 0 to them, and nothing would seem to be lost."""
    file = images / "labelsTs" / "case_0.nii.gz"
    labels = nib.load(file)
    turned = nib.Nifti1Image(np.asarray(labels.dataobj), labels.affine @ np.diag([-1, 1, 1, 1]))
    other = nib.Nifti1Image(np.asarray(labels.dataobj) * 10, labels.affine)
    image = images / "imagesTs" / "case_0_0000.nii.gz"
    for content, reason in ((turned, "do not lie on the image's grid"), (other, "hold 10, which the model's")):
        nib.save(content, tmp_path / "case_0.nii.gz")
        with pytest.raises(ToolError, match=reason):
            validate(made.archive, Validation((image,), tmp_path), lambda _line: None)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--images", "IMAGES", "--max-dice-loss", "2"], "a number from 0 to 1 was expected"),
        (["--images", "IMAGES", "--labels", "IMAGES"], "case case_0 has no labels"),
        (["--images", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_use_of_the_command_is_told(flags: list[str], reason: str, made: Made, images: Path) -> None:
    flags = [flag.replace("IMAGES", str(images / "imagesTs")) for flag in flags]
    done = CliRunner().invoke(app, ["validate", str(made.archive), *flags])
    assert done.exit_code == UsageError.exit_code
    assert reason in done.output


def test_an_archive_without_another_backend_has_nothing_to_compare(
    archive_of: Callable[[str], Path], images: Path
) -> None:
    done = CliRunner().invoke(app, ["validate", str(archive_of("flat")), "--images", str(images / "imagesTs")])
    assert done.exit_code == UsageError.exit_code
    assert "made for eager" in done.output


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--validate", "x"], "--validate compares another backend with eager"),
        (["--labels", "x"], "--labels belongs to --validate"),
        (["--max-dice-loss", "0.1"], "--max-dice-loss belongs to --validate"),
        (["--validate", "x", "--backend", "openvino"], "x does not exist"),
    ],
)
def test_flags_of_archive_that_do_not_belong_together_are_refused(
    flags: list[str], reason: str, models: dict[str, Path], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["archive", str(models["flat"]), "--output", str(tmp_path), *flags])
    assert done.exit_code == UsageError.exit_code
    assert reason in done.output
