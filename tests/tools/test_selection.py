"""Folders and zips become the same archives; what is chosen of a zip, and what is taken with it, is said."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.model_sharing.model_export import export_pretrained_model
from typer.testing import CliRunner, Result

from nnunet_torchserve.bundle import BUNDLE_FILE
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.selection import Choice, Selection, selected
from support.cross_validated import CASCADE, DATASET, FLAT, FOLDS, LOWRES, MODELS, Home, Mistake, cross_validated
from support.odd_models import OddModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:The values in the label map", "ignore:.torch.jit:FutureWarning"),
    pytest.mark.usefixtures("private"),
]

OTHER = "nnUNetTrainerBN"
KEEP = {
    "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
    "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """2d, 3d_lowres and its cascade, of two folds, with postprocessing. Not to be changed."""
    home = cross_validated(tmp_path_factory.mktemp("trained"), [(model, Mistake()) for model in MODELS])
    ensemble = f"ensembles/ensemble___{home.model(FLAT).name}___{home.model(LOWRES).name}___0_1"
    for folder in (home.model(FLAT) / "crossval_results_folds_0_1", home.dataset / ensemble):
        folder.mkdir(parents=True)
        (folder / "postprocessing.json").write_text(json.dumps(KEEP))
    return home


@pytest.fixture
def home(trained: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    for name, value in trained.environment().items():
        monkeypatch.setenv(name, value)
    return trained


def export(target: Path, *models: OddModel, trainer: str = "nnUNetTrainer") -> Path:
    """``nnUNetv2_export_model_to_zip``."""
    configurations = tuple(model.configuration for model in models)
    export_pretrained_model(DATASET, str(target), configurations, trainer, folds=FOLDS)
    return target


def archive(folder: Path, *arguments: str) -> Result:
    """The command, which makes m.mar in that folder."""
    return CliRunner().invoke(app, ["archive", *arguments, "--name", "m", "--output", str(folder)])


def made(folder: Path, model: Path, **fields: Any) -> bytes:
    [file] = make_archives(ArchiveRequest(model, folder / "made", name="m", **fields))
    return file.read_bytes()


def choose(*sources: Path, **fields: Any) -> Selection:
    with selected(Choice(sources, **fields)) as selection:
        return selection


def names(folders: Sequence[Path]) -> list[str]:
    return [folder.name for folder in folders]


def test_a_zip_of_one_configuration_is_packaged_as_its_folder_is(home: Home, tmp_path: Path, private: Path) -> None:
    result = archive(tmp_path, str(export(tmp_path / "model.zip", FLAT)), "--postprocessing", "auto")
    assert result.exit_code == 0
    file = f"{home.model(FLAT).name}/crossval_results_folds_0_1/postprocessing.json"
    assert result.stderr.splitlines()[1:] == [
        f"m: postprocessing: 1 step: only the largest component stays of 1, 2 ({file})"
    ]
    found = (tmp_path / "m.mar").read_bytes()
    assert found == made(tmp_path, home.model(FLAT), postprocessing="auto")
    assert str(private).encode() not in found
    with zipfile.ZipFile(tmp_path / "m.mar") as content:
        bundle = json.loads(content.read(BUNDLE_FILE))
    assert bundle["members"][0]["source"]["folder"] == f"{DATASET}/{home.model(FLAT).name}"
    assert bundle["postprocessing"]["steps"][0]["labels"] == [1, 2]
    assert not list(private.iterdir())


def test_one_of_several_configurations_is_chosen_by_name(home: Home, tmp_path: Path) -> None:
    exported = export(tmp_path / "model.zip", *MODELS)
    with pytest.raises(UsageError, match="holds 3 models; choose with --configuration: 2d, 3d_cascade_fullres, 3d_low"):
        choose(exported)
    with pytest.raises(UsageError, match="no configuration 3d_fullres; it has 2d, 3d_cascade_fullres, 3d_lowres"):
        choose(exported, configurations=("3d_fullres",))
    assert names(choose(exported, configurations=("3d_lowres",)).models) == [home.model(LOWRES).name]


def test_a_cascades_first_stage_is_taken_from_the_same_zip_and_said(home: Home, tmp_path: Path) -> None:
    exported = export(tmp_path / "model.zip", *MODELS)
    result = archive(tmp_path, str(exported), "--configuration", "3d_cascade_fullres")
    assert result.exit_code == 0
    said = "is the second stage of a cascade; its first, 3d_lowres, is taken from the zip too"
    assert result.stderr.splitlines()[1:] == [f"{exported}: 3d_cascade_fullres {said}"]
    assert (tmp_path / "m.mar").read_bytes() == made(
        tmp_path, home.model(CASCADE), previous_stages=(home.model(LOWRES),)
    )


def test_configurations_of_one_zip_may_be_an_ensemble(home: Home, tmp_path: Path) -> None:
    exported = export(tmp_path / "model.zip", *MODELS)
    chosen = ("--configuration", "3d_lowres", "--configuration", "2d", "--ensemble", "--postprocessing", "auto")
    assert archive(tmp_path, str(exported), *chosen).exit_code == 0
    postprocessing = next((home.dataset / "ensembles").glob("*/postprocessing.json"))
    assert (tmp_path / "m.mar").read_bytes() == made(
        tmp_path, home.model(LOWRES), others=(home.model(FLAT),), postprocessing=postprocessing
    )


@pytest.mark.parametrize("zipped", ["folder", "zip of one", "zip of several"])
def test_a_first_stage_may_be_named(zipped: str, home: Home, tmp_path: Path) -> None:
    cascade = export(tmp_path / "cascade.zip", CASCADE)
    first = {
        "folder": lambda: home.model(LOWRES),
        "zip of one": lambda: export(tmp_path / "first.zip", LOWRES),
        "zip of several": lambda: export(tmp_path / "first.zip", *MODELS),
    }[zipped]()
    selection = choose(cascade, previous_stages=(first,))
    assert names(selection.models) == [home.model(CASCADE).name]
    assert names(selection.previous_stages) == [home.model(LOWRES).name]


def test_a_zip_without_the_first_stage_is_no_source_of_it(home: Home, tmp_path: Path) -> None:
    cascade = export(tmp_path / "cascade.zip", CASCADE)
    assert not choose(cascade).previous_stages
    with pytest.raises(UsageError, match="no model that the plans name"):
        choose(cascade, previous_stages=(export(tmp_path / "first.zip", FLAT, CASCADE),))


def test_every_cascade_of_an_ensemble_has_the_first_stage_of_its_own_training(home: Home, tmp_path: Path) -> None:
    """Those of two trainers come in two zips."""
    for model in (LOWRES, CASCADE):
        other = model.but(trainer=OTHER).write(tmp_path)
        shutil.copy(home.model(model) / "plans.json", other / "plans.json")
        for fold in FOLDS:
            shutil.copytree(home.model(model) / f"fold_{fold}" / "validation", other / f"fold_{fold}" / "validation")
            (other / f"fold_{fold}" / "progress.png").touch()
        (other / "dataset_fingerprint.json").touch()
    one = export(tmp_path / "one.zip", LOWRES, CASCADE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(tmp_path))
        two = export(tmp_path / "two.zip", LOWRES, CASCADE, trainer=OTHER)
    result = archive(tmp_path, str(one), str(two), "--configuration", "3d_cascade_fullres", "--ensemble")
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(tmp_path / "m.mar") as content:
        recipe = json.loads(content.read(BUNDLE_FILE))["recipe"]
    stages = [(each["first"]["member"], each["member"]) for each in recipe["of"]]
    assert stages == [
        (f"{trainer}__nnUNetPlans__3d_lowres", f"{trainer}__nnUNetPlans__3d_cascade_fullres")
        for trainer in ("nnUNetTrainer", OTHER)
    ]


def test_messages_name_the_zip_and_not_where_it_is_unpacked(home: Home, tmp_path: Path, private: Path) -> None:
    exported = export(tmp_path / "model.zip", FLAT)
    result = archive(tmp_path, str(exported), "--folds", "0,3")
    assert result.exit_code == 2
    assert f"fold 3 has no checkpoint_final.pth in {exported}/{DATASET}/{home.model(FLAT).name}" in result.stderr
    assert str(private) not in result.stderr
    assert not list(private.iterdir())


def test_only_the_weights_that_are_asked_for_are_unpacked(home: Home, tmp_path: Path) -> None:
    exported, first = export(tmp_path / "model.zip", CASCADE), export(tmp_path / "first.zip", LOWRES)
    with selected(Choice((exported,), folds=(1,), previous_stages=(first,))) as selection:
        weights = [
            {file.parent.name: file.stat().st_size > 0 for file in folder.glob("fold_*/checkpoint_final.pth")}
            for folder in (*selection.models, *selection.previous_stages)
        ]
    assert weights == [{"fold_0": False, "fold_1": True}] * 2


def test_a_message_says_what_a_zip_has_though_it_is_not_unpacked(home: Home, tmp_path: Path) -> None:
    result = archive(tmp_path, str(export(tmp_path / "model.zip", FLAT)), "--checkpoint", "checkpoint_best.pth")
    assert result.exit_code == 2
    assert "fold_0, fold_1 have checkpoint_final.pth: take it with --checkpoint checkpoint_final.pth" in result.stderr


def test_a_file_that_is_no_zip_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_text("no zip")
    with pytest.raises(ToolError, match=r"model\.zip is no zip"):
        choose(tmp_path / "model.zip")
    with pytest.raises(UsageError, match=r"other\.zip does not exist|other\.zip/plans"):
        make_archives(ArchiveRequest(choose(tmp_path / "other.zip").models[0], tmp_path / "store"))


@pytest.mark.parametrize(
    ("sources", "fields", "said"),
    [
        ((), {}, "name a trained model's folder or zip, or with --dataset"),
        (("a", "b"), {}, "add --ensemble"),
        (("a",), {"ensemble": True}, "two models or more"),
        (("a",), {"configurations": ("2d",)}, "--configuration chooses from a zip"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    sources: tuple[str, ...], fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        choose(*(tmp_path / source for source in sources), **fields)


def test_models_of_a_zip_are_counted_before_anything_is_unpacked(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_torchserve_tools import zip_source

    exported = export(tmp_path / "model.zip", FLAT, LOWRES)
    monkeypatch.setattr(zip_source, "_unpack", None)
    with pytest.raises(UsageError, match="add --ensemble"):
        choose(exported, configurations=("2d", "3d_lowres"))
    with pytest.raises(UsageError, match="two models or more"):
        choose(exported, configurations=("2d",), ensemble=True)
    with pytest.raises(UsageError, match="named twice"):
        choose(exported, exported, configurations=("2d",), ensemble=True)


def test_a_first_stage_that_nobody_needs_is_refused(home: Home, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model needs it"):
        make_archives(
            ArchiveRequest(
                home.model(CASCADE),
                tmp_path / "store",
                previous_stages=(
                    home.model(LOWRES),
                    LOWRES.but(trainer=OTHER).write(tmp_path),
                ),
            )
        )
