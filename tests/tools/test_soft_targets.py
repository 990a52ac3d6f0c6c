"""What a student is taught is what its teacher predicts, on the grid of the student's cases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nnunet_torchserve_tools import soft_targets
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.smaller_plans import cost
from nnunet_torchserve_tools.student import Grid, Student
from nnunet_torchserve_tools.teachers import ModelFolder, Probabilities, Source
from nnunet_torchserve_trainers.distill_trainers import nnUNetTrainerDistill
from nnunet_torchserve_trainers.soft_target_files import SoftTargets, Teacher
from support import stock, volumes
from support.distilling import SPACING, one_process, preprocess, write_dataset
from support.odd_models import OddModel
from support.training import REGIONS, batches, named_folders, seed

CPU = torch.device("cpu")
OF_REGIONS: dict[str, Any] = {"labels": REGIONS, "more_dataset": {"regions_class_order": [1, 2, 3]}}
MODELS = {
    "labels": OddModel(folds=(0, 1), mirroring=(0, 1)),
    "regions": OddModel(**OF_REGIONS),
    "planes": OddModel(2, mirroring=(0,)),
}


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in named_folders(tmp_path).items():
        monkeypatch.setenv(name, value)
    one_process(monkeypatch)


def lesson(
    folder: Path, model: OddModel, student: OddModel | None = None, orientation: str = "RAS"
) -> tuple[Path, Path]:
    """A teacher's folder, and the plans of a student whose cases are preprocessed."""
    student = student or model
    plans = write_dataset(folder, student.plans(), student.dataset(), orientation)
    preprocess(plans, student.configuration)
    return model.write(folder / "models"), plans


def ask(plans: Path, model: OddModel, *arguments: object) -> Any:
    command = ["soft-targets", str(plans), "--configuration", model.configuration, *map(str, arguments)]
    return CliRunner().invoke(app, command)


def case_of(plans: Path, model: OddModel, case: str) -> tuple[Any, dict[str, Any], Any]:
    """A preprocessed image, its properties and its soft targets."""
    folder = plans.parent / f"{model.plans_name}_{model.configuration}"
    image, _, _, properties = nnUNetDatasetBlosc2(str(folder)).load_case(case)
    return image[:], properties, SoftTargets.beside(folder).load(case)[:]


@pytest.mark.parametrize("name", MODELS)
def test_on_the_teachers_own_grid_they_are_what_nnunet_predicts(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    teacher, plans = lesson(tmp_path, model)
    done = ask(plans, model, "--teacher", teacher, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert (
        done.stdout
        == f"2 cases made, 0 were there: {plans.parent / f'nnUNetPlans_{model.configuration}'}/soft_targets\n"
    )
    predictor = stock.loaded(teacher)
    for case in ("case_0", "case_1"):
        image, _, found = case_of(plans, model, case)
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
        expected = predictor.label_manager.apply_inference_nonlin(logits).numpy()
        assert found.dtype == np.float16
        assert expected.std() > 0.01
        np.testing.assert_array_equal(found, expected.astype(np.float16))


def with_spacing(spacing: tuple[float, float, float], plans: dict[str, Any]) -> None:
    """Of a network's grid, in mm along Z, Y and X."""
    plans["configurations"]["3d_fullres"]["spacing"] = list(spacing)


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0), (6.0, 1.5, 1.5)], ids=["isotropic", "slice by slice"])
def test_on_another_grid_they_are_turned_cropped_and_resampled(
    spacing: tuple[float, float, float], tmp_path: Path
) -> None:
    """The student's grid is the image's here, with other axes: so nnU-Net exports the same, on the image.

    Thick slices are resampled apart from the other two axes.
    """
    model = OddModel(mirroring=(2,), change_plans=partial(with_spacing, spacing))
    student = OddModel(spacing=SPACING, transposed=(2, 0, 1), plans_name="others")
    teacher, plans = lesson(tmp_path, model, student)
    assert ask(plans, student, "--teacher", teacher).exit_code == 0
    _, properties, found = case_of(plans, student, "case_1")
    image = tmp_path / "raw/Dataset950_Odd/imagesTr/case_1_0000.nii.gz"
    expected = stock.predict(teacher, [image]).probabilities
    assert expected is not None
    box = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
    assert [each.stop - each.start for each in box] != list(properties["shape_before_cropping"])
    turned = expected.transpose(0, 3, 1, 2)[(slice(None), *box)]
    assert found.shape == turned.shape
    np.testing.assert_allclose(found, turned, atol=2e-3)


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        ("SimpleITKIO", "NibabelIO"),
        ("NibabelIOWithReorient", "NibabelIOWithReorient"),
        ("SimpleITKIOWithReorient", "SimpleITKIOWithReorient"),
    ],
)
def test_where_both_read_an_image_alike_they_lie_alike(of_student: str, of_teacher: str, tmp_path: Path) -> None:
    """Of images that are stored in another orientation than those readers turn them to."""
    model = OddModel()
    teacher, plans = lesson(tmp_path, model.but(reader=of_teacher), model.but(reader=of_student), "LPS")
    assert ask(plans, model, "--teacher", teacher).exit_code == 0
    image, _, found = case_of(plans, model, "case_0")
    predictor = stock.loaded(teacher)
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    expected = predictor.label_manager.apply_inference_nonlin(logits).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert np.abs(found - expected[:, :, ::-1, ::-1]).max() > 0.05, "nobody would see that they are mirrored"


@pytest.mark.parametrize(
    ("of_student", "of_teacher"),
    [
        ("SimpleITKIO", "NibabelIOWithReorient"),
        ("SimpleITKIO", "SimpleITKIOWithReorient"),
        ("NibabelIOWithReorient", "NibabelIO"),
        ("SimpleITKIOWithReorient", "NibabelIOWithReorient"),
    ],
)
def test_a_teacher_who_reads_images_in_another_way_is_refused(
    of_student: str, of_teacher: str, shared_lesson: tuple[Path, Path], tmp_path: Path
) -> None:
    """Shape and crop are the same, and the probabilities may be those of a mirrored body."""
    model = MODELS["labels"]
    plans = shared_lesson[1].with_name(f"{of_student}.json")
    plans.write_text(json.dumps(model.but(reader=of_student).plans()))
    done = ask(plans, model, "--teacher", model.but(reader=of_teacher, folds=(0,)).write(tmp_path))
    assert done.exit_code == 1
    assert f"reads images by {of_teacher}, the cases were read by {of_student}" in done.stderr
    assert not (plans.parent / "nnUNetPlans_3d_fullres" / "soft_targets").exists()


def test_a_teacher_is_the_same_by_another_name_and_with_its_folds_in_another_order(tmp_path: Path) -> None:
    teacher = OddModel(folds=(0, 1, "all")).write(tmp_path)
    renamed = shutil.copytree(teacher, tmp_path / "renamed")
    one = ModelFolder(teacher, (0, 1, "all"), "checkpoint_final.pth", CPU).teacher
    other = ModelFolder(renamed, ("all", 1, 0), "checkpoint_final.pth", CPU).teacher
    assert other == one
    assert other.folds == (0, 1, "all")
    assert other.name == "renamed"


def test_the_folder_says_whose_they_are_and_takes_no_others(tmp_path: Path) -> None:
    model = MODELS["labels"]
    teacher, plans = lesson(tmp_path, model)
    folder = plans.parent / "nnUNetPlans_3d_fullres" / "soft_targets"
    assert ask(plans, model, "--teacher", teacher, "--folds", "1", "--disable-tta").exit_code == 0
    record = json.loads((folder / "teacher.json").read_text())
    assert (record["name"], record["folds"], record["use_mirroring"]) == (teacher.name, [1], False)
    assert record["channels"][2] == {"name": "middle", "labels": [2]}
    assert record["image_reader_writer"] == json.loads(plans.read_text())["image_reader_writer"]
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for arguments in (("--folds", "0", "--disable-tta"), ("--folds", "1"), ("--disable-tta",)):
        refused = ask(plans, model, "--teacher", teacher, *arguments)
        assert refused.exit_code == 1
        assert "remove it to change the teacher" in refused.stderr
    weights = teacher / "fold_1" / "checkpoint_final.pth"
    torch.save(torch.load(weights, weights_only=False) | {"_best_ema": 0.7}, weights)
    assert "remove it" in ask(plans, model, "--teacher", teacher, "--folds", "1", "--disable-tta").stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.long  # nnU-Net starts a process for its pool
def test_they_go_with_the_cases_that_are_preprocessed_anew(tmp_path: Path) -> None:
    model = MODELS["regions"]
    teacher, plans = lesson(tmp_path, model)
    assert ask(plans, model, "--teacher", teacher).exit_code == 0
    student = Student(plans, model.configuration)
    assert SoftTargets.beside(student.folder).teacher() is not None
    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.run("Dataset950_Odd", model.configuration, model.plans_name, num_processes=1)
    assert Student(plans, model.configuration).cases == ["case_0", "case_1"]
    assert SoftTargets.beside(student.folder).teacher() is None


class Ends:
    """A teacher who is interrupted."""

    def __init__(self, source: Source, after: int) -> None:
        self._source, self._left = source, after

    @property
    def teacher(self) -> Teacher:
        return self._source.teacher

    @property
    def image_channels(self) -> tuple[str, ...]:
        return self._source.image_channels

    def probabilities(self, images: Sequence[str], grid: Grid) -> Probabilities:
        if self._left == 0:
            msg = "interrupted"
            raise ToolError(msg)
        self._left -= 1
        return self._source.probabilities(images, grid)


def test_a_command_that_was_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    model = MODELS["regions"]
    teacher, plans = lesson(tmp_path, model)
    student, source = Student(plans, model.configuration), ModelFolder(teacher, None, "checkpoint_final.pth", CPU)
    told: list[str] = []
    with pytest.raises(ToolError, match="interrupted"):
        soft_targets.make_soft_targets(student, Ends(source, 1), told.append)
    first = student.folder / "soft_targets" / "case_0.b2nd"
    written = first.stat().st_mtime_ns
    done = ask(plans, model, "--teacher", teacher)
    assert done.stdout.startswith("1 cases made, 1 were there")
    assert told == ["case_0 (1 of 2)"]
    assert done.stderr.splitlines()[-1] == "case_1 (2 of 2)"
    assert first.stat().st_mtime_ns == written


class Overtaken(Ends):
    """A teacher beside whom another one starts, and has a case before him."""

    def __init__(self, source: Source, targets: SoftTargets) -> None:
        super().__init__(source, 2)
        self._targets = targets

    def probabilities(self, images: Sequence[str], grid: Grid) -> Probabilities:
        found = super().probabilities(images, grid)
        self._targets.begin(replace(self.teacher, folds=(7,)))
        self._targets.save("case_1", found, found.shape[1:])
        return found


def test_two_commands_at_once_do_not_mix_their_teachers(tmp_path: Path) -> None:
    model = MODELS["regions"]
    teacher, plans = lesson(tmp_path, model)
    student, source = Student(plans, model.configuration), ModelFolder(teacher, None, "checkpoint_final.pth", CPU)
    targets = SoftTargets.beside(student.folder)
    with pytest.raises(ToolError, match="remove it to change the teacher"):
        soft_targets.make_soft_targets(student, Overtaken(source, targets), lambda _: None)
    assert [file.name for file in targets.folder.glob("*.b2nd")] == ["case_1.b2nd"]


def test_a_student_of_half_the_features_is_taught_and_costs_what_was_promised(tmp_path: Path) -> None:
    model = OddModel(features=(8, 16, 16))
    teacher, plans = lesson(tmp_path, model)
    shrunk = CliRunner().invoke(app, ["shrink-plans", str(plans), "--name", "nnUNetPlansHalf"])
    assert shrunk.exit_code == 0
    half = plans.with_name("nnUNetPlansHalf.json")
    assert ask(half, model, "--teacher", teacher).exit_code == 0
    document, dataset = json.loads(half.read_text()), model.dataset()
    promised = cost(document, dataset, "3d_fullres").operations
    seed(0)
    trainer: Any = nnUNetTrainerDistill(document | {"continue_training": False}, "3d_fullres", "all", dataset, CPU)
    trainer.initialize()
    before = [each.clone() for each in trainer.network.parameters()]
    losses = [float(trainer.train_step(batch)["loss"]) for batch in batches(trainer, 0)[:2]]
    assert np.isfinite(losses).all()
    assert not all(map(torch.equal, before, trainer.network.parameters()))
    trainer.set_deep_supervision_enabled(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        trainer.network(torch.zeros(1, 1, 16, 16, 16))
    assert (
        counter.get_total_flops()
        == promised
        < cost(json.loads(plans.read_text()), dataset, "3d_fullres").operations / 3
    )


def test_a_cascades_second_stage_is_taught_with_the_labels_of_its_first_as_input(tmp_path: Path) -> None:
    """By a teacher without stages. The first stage is one of the same trainer, as nnU-Net has it."""
    model, student = OddModel(), OddModel(features=(2, 4, 4), named="3d_cascade_fullres", previous_stage="3d_lowres")
    teacher, plans = lesson(tmp_path, model, student)
    assert ask(plans, student, "--teacher", teacher).exit_code == 0
    image, _, found = case_of(plans, student, "case_0")
    logits = stock.loaded(teacher).predict_logits_from_preprocessed_data(torch.from_numpy(image))
    expected = torch.softmax(logits, 0).numpy()
    np.testing.assert_array_equal(found, expected.astype(np.float16))
    document = student.plans() | {"continue_training": False}
    trainer: Any = nnUNetTrainerDistill(document, student.configuration, "all", student.dataset(), CPU)
    previous = Path(trainer.folder_with_segs_from_previous_stage)
    assert previous.parts[-3] == "nnUNetTrainerDistill__nnUNetPlans__3d_lowres"
    previous.mkdir(parents=True)
    for case in ("case_0", "case_1"):
        shape = case_of(plans, student, case)[0].shape[1:]
        nnUNetDatasetBlosc2.save_seg(np.full(shape, 3, np.uint8), str(previous / case))
    trainer.initialize()
    batch, *_ = batches(trainer, 0)
    assert batch["data"].shape[1] == 1 + 3
    assert (batch["data"][:, 3] == 1).any(), "nothing of the first stage's labels came"
    assert not batch["data"][:, 1:3].any()
    assert np.isfinite(trainer.train_step(batch)["loss"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "who teaches"),
        (("--teacher", "TEACHER", "--model", "five_folds"), 2, "who teaches"),
        (("--teacher", "TEACHER", "--server", "http://127.0.0.1:1"), 2, "--server is for a model on a server"),
        (("--model", "five_folds", "--device", "cpu"), 2, "--device is for a model folder"),
        (("--model", "five folds", "--server", "http://127.0.0.1:1"), 2, "by its name on the server"),
        (("--teacher", "nowhere"), 2, "has no plans.json"),
        (("--teacher", "TEACHER", "--folds", "7"), 2, "fold_7"),
        (("--teacher", "TEACHER", "--folds", "x"), 2, "numbers separated by commas"),
        (("--teacher", "TEACHER", "--checkpoint", "other.pth"), 2, "no fold of"),
        (("--teacher", "TEACHER", "--device", "tpu"), 2, "cuda or cpu"),
    ],
)
def test_what_cannot_be_meant_is_said(
    arguments: tuple[str, ...], code: int, said: str, shared_lesson: tuple[Path, Path]
) -> None:
    teacher, plans = shared_lesson
    done = ask(plans, MODELS["labels"], *(teacher if each == "TEACHER" else each for each in arguments))
    assert done.exit_code == code
    assert said in done.stderr
    assert not (plans.parent / "nnUNetPlans_3d_fullres" / "soft_targets").exists()


@pytest.fixture(scope="module")
def shared_lesson(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return lesson(tmp_path_factory.mktemp("lesson"), MODELS["labels"])


def test_a_teacher_of_other_labels_is_refused(tmp_path: Path) -> None:
    teacher, plans = lesson(tmp_path, MODELS["regions"], MODELS["labels"])
    done = ask(plans, MODELS["labels"], "--teacher", teacher)
    assert done.exit_code == 1
    assert "predicts all 1+2+3, core 2+3, centre 3, the student shall learn background 0, low 1" in done.stderr


def test_a_teacher_of_other_images_is_refused(shared_lesson: tuple[Path, Path], tmp_path: Path) -> None:
    """Of two channels, say, in another order, nobody would notice by their shapes."""
    teacher = OddModel(channels=("CT",)).write(tmp_path)
    done = ask(shared_lesson[1], MODELS["labels"], "--teacher", teacher)
    assert (done.exit_code, "takes images of CT; a case has MR" in done.stderr) == (1, True)


def test_a_second_stage_alone_is_refused(tmp_path: Path) -> None:
    model = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres")
    teacher = model.write(tmp_path / "models")
    with pytest.raises(ToolError, match="serve them, and name the server"):
        ModelFolder(teacher, None, "checkpoint_final.pth", CPU)


def test_images_that_were_not_the_preprocessed_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["regions"]
    teacher, plans = lesson(tmp_path, model)
    images = tmp_path / "raw/Dataset950_Odd/imagesTr"
    (images / "case_1_0000.nii.gz").unlink()
    missing = ask(plans, model, "--teacher", teacher)
    assert (missing.exit_code, "no images of case_1" in missing.stderr) == (1, True)
    assert not (plans.parent / "nnUNetPlans_3d_fullres" / "soft_targets").exists(), "hours went into the others first"
    smaller, _ = volumes.blobs((20, 20, 20), 1)
    volumes.write(images, "case_1_0000.nii.gz", volumes.nifti_gz(smaller, np.diag([SPACING, SPACING, SPACING, 1])))
    done = ask(plans, model, "--teacher", teacher)
    assert (done.exit_code, "is not the one that was preprocessed" in done.stderr) == (1, True)
    (images / "case_1_0000.nii.gz").write_bytes(b"no image")
    assert "case_1_0000.nii.gz" in ask(plans, model, "--teacher", teacher).stderr
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in ask(plans, model, "--teacher", teacher).stderr


def test_students_that_are_not_there_are_said(shared_lesson: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, plans = shared_lesson
    planes = MODELS["planes"]
    assert "it has 3d_fullres" in ask(plans, planes, "--teacher", teacher).stderr
    assert "cannot be read" in ask(tmp_path / "no.json", planes, "--teacher", teacher).stderr
    unprepared = write_dataset(tmp_path, planes.plans(), planes.dataset())
    assert "nnUNetv2_preprocess" in ask(unprepared, planes, "--teacher", teacher).stderr
