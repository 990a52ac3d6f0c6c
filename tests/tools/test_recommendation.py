"""What nnU-Net finds to be the best is what is packaged; what is missing for it is said, with what would mend it."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
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
from support.cross_validated import (
    CASCADE,
    DATASET,
    FLAT,
    FOLDS,
    LOWRES,
    MODELS,
    Home,
    Mistake,
    cross_validated,
    find_best,
    folder_name,
)
from support.odd_models import OddModel

pytestmark = pytest.mark.filterwarnings("ignore:The values in the label map", "ignore:.torch.jit:FutureWarning")

ENSEMBLE = f"ensembles/ensemble___{folder_name(FLAT)}___{folder_name(CASCADE)}___0_1"
BAD, HALF, OTHER_HALF = Mistake((2, 11), 0.97), Mistake((2, 5)), Mistake((8, 11))
Json = dict[str, Any]


def best_of(folder: Path, *mistakes: Mistake, **how: Any) -> Home:
    """What there is after nnU-Net has found the best; the folder is another one then, as on another machine."""
    home = cross_validated(folder / "there", list(zip(MODELS, mistakes, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        find_best(home, patch, **how)
    (folder / "there").rename(folder / "here")
    return Home(folder / "here", home.models)


@pytest.fixture(scope="module")
def an_ensemble(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """The mean of 2d and the cascade is the best. Not to be changed."""
    return best_of(tmp_path_factory.mktemp("ensemble"), HALF, BAD, OTHER_HALF)


@pytest.fixture
def home(an_ensemble: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A copy, to be damaged, that nnUNet_results names."""
    shutil.copytree(an_ensemble.folder, tmp_path / "home")
    copied = Home(tmp_path / "home", an_ensemble.models)
    for name, value in copied.environment().items():
        monkeypatch.setenv(name, value)
    return copied


def archive(folder: Path, *arguments: str) -> tuple[Result, bytes]:
    """What the command says, and the archive."""
    result = CliRunner().invoke(app, ["archive", *arguments, "--name", "m", "--output", str(folder / "said")])
    assert result.exit_code == 0, result.output
    return result, (folder / "said" / "m.mar").read_bytes()


def made(folder: Path, model: Path, **fields: Any) -> bytes:
    [file] = make_archives(ArchiveRequest(model, folder / "made", name="m", **fields))
    return file.read_bytes()


def postprocessing_of(file: Path) -> object:
    with zipfile.ZipFile(file) as content:
        return json.loads(content.read(BUNDLE_FILE))["postprocessing"]


def choose(**fields: Any) -> Selection:
    with selected(Choice(dataset="950", **fields)) as selection:
        return selection


# What is taken


def test_the_ensemble_that_nnunet_recommends_is_the_archive_of_its_folders(home: Home, tmp_path: Path) -> None:
    assert str(home.results) not in (home.dataset / "inference_information.json").read_text()
    result, found = archive(tmp_path, "--dataset", "950")
    assert found == made(
        tmp_path,
        home.model(FLAT),
        others=(home.model(CASCADE),),
        previous_stages=(home.model(LOWRES),),
        folds=FOLDS,
        postprocessing=home.dataset / ENSEMBLE / "postprocessing.pkl",
    )
    assert result.stderr.splitlines()[1:] == [
        (
            "nnU-Net recommends for Dataset950_Odd, with a mean Dice of 0.9952 in cross-validation and 1.0000 after "
            "postprocessing: the mean of"
        ),
        f"  {folder_name(FLAT)}",
        f"  {folder_name(CASCADE)}, whose first stage is {folder_name(LOWRES)}",
        "  folds: 0, 1",
        f"m: postprocessing: 1 step: only the largest component stays of 1-3 ({ENSEMBLE}/postprocessing.pkl)",
    ]


@pytest.mark.parametrize(
    ("mistakes", "best", "first"),
    [((Mistake(), BAD, HALF), FLAT, None), ((BAD, HALF, Mistake()), CASCADE, LOWRES)],
    ids=["one model", "a cascade"],
)
def test_what_is_best_alone_is_packaged_alone(
    mistakes: tuple[Mistake, ...],
    best: OddModel,
    first: OddModel | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = best_of(tmp_path, *mistakes, allow_ensembling=False)
    monkeypatch.setenv("nnUNet_results", str(home.results))
    result, found = archive(tmp_path, "--dataset", DATASET, *([] if first else ["--per-fold"]))
    if not first:
        assert (
            "without postprocessing, as nnU-Net determined none for one fold alone: m_fold_0, m_fold_1" in result.stderr
        )
        for fold in FOLDS:
            assert postprocessing_of(tmp_path / "said" / f"m_fold_{fold}.mar") is None
    assert postprocessing_of(tmp_path / "said" / "m.mar")
    assert found == made(
        tmp_path,
        home.model(best),
        previous_stages=() if first is None else (home.model(first),),
        folds=FOLDS,
        postprocessing="auto",
    )


def test_postprocessing_is_left_out_or_another_one_if_asked_for(home: Home, tmp_path: Path) -> None:
    assert choose().postprocessing == home.dataset / ENSEMBLE / "postprocessing.pkl"
    assert choose(postprocessing="auto") == choose()
    without = choose(postprocessing="none")
    assert without.postprocessing is None
    assert without.remarks[-1] == "  postprocessing: left out"
    assert choose(postprocessing=tmp_path / "other.json").postprocessing == tmp_path / "other.json"
    assert choose(postprocessing=tmp_path / "other.json").postprocessing_folds is None


def test_paths_of_a_machine_with_other_separators_are_understood(home: Home) -> None:
    change(
        home, postprocessing_file="D:\\nnUNet results\\" + f"{DATASET}/{ENSEMBLE}/postprocessing.pkl".replace("/", "\\")
    )
    assert choose().models == (home.model(FLAT), home.model(CASCADE))


def test_an_export_has_its_recommendation_with_it(home: Home, tmp_path: Path) -> None:
    exported = export(tmp_path / "model.zip", *MODELS)
    shutil.move(home.results, tmp_path / "elsewhere")
    result, of_zip = archive(tmp_path, str(exported), "--dataset", "950")
    shutil.move(tmp_path / "elsewhere", home.results)
    assert of_zip == archive(tmp_path, "--dataset", "950")[1]
    assert f"{folder_name(CASCADE)}, whose first stage is" in result.stderr


def test_of_an_export_only_the_recommended_weights_are_unpacked(home: Home, tmp_path: Path) -> None:
    for final in home.dataset.glob("*/fold_*/checkpoint_final.pth"):
        shutil.copy(final, final.with_name("checkpoint_best.pth"))
    exported = tmp_path / "model.zip"
    configurations = tuple(model.configuration for model in MODELS)
    checkpoints = ("checkpoint_final.pth", "checkpoint_best.pth")
    export_pretrained_model(DATASET, str(exported), configurations, folds=FOLDS, save_checkpoints=checkpoints)
    with selected(Choice((exported,), dataset="950")) as selection:
        sizes = {file.name: file.stat().st_size for file in selection.models[0].glob("fold_0/*.pth")}
    assert sizes["checkpoint_best.pth"] == 0 < sizes["checkpoint_final.pth"]


# What is missing


def export(target: Path, *models: OddModel) -> Path:
    """``nnUNetv2_export_model_to_zip``."""
    export_pretrained_model(DATASET, str(target), tuple(model.configuration for model in models), folds=FOLDS)
    return target


def change(home: Home, **best: Any) -> None:
    file = home.dataset / "inference_information.json"
    document = json.loads(file.read_text())
    document["best_model_or_ensemble"] |= best
    file.write_text(json.dumps(document))


def rename_checkpoint(home: Home) -> None:
    file = home.model(FLAT) / "fold_1" / "checkpoint_final.pth"
    file.rename(file.with_name("checkpoint_latest.pth"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda home: shutil.rmtree(home.model(LOWRES)),
            (
                r"3d_lowres, the first stage of a cascade, does not exist with the folds 0, 1 \(copy it .* or run "
                "nnUNetv2_train Dataset950_Odd 3d_lowres FOLD -tr nnUNetTrainer -p nnUNetPlans --npz"
            ),
        ),
        (lambda home: shutil.rmtree(home.model(FLAT)), "__2d does not exist .* nnUNetv2_train Dataset950_Odd 2d FOLD"),
        (
            lambda home: shutil.rmtree(home.model(CASCADE) / "fold_1"),
            "3d_cascade_fullres has no fold_1 .* nnUNetv2_train Dataset950_Odd 3d_cascade_fullres 1 ",
        ),
        (
            rename_checkpoint,
            r"fold_1 has no checkpoint_final\.pth but checkpoint_latest\.pth .* nnUNetv2_train .* 2d 1 .* --npz --c\)",
        ),
        (
            lambda home: shutil.rmtree(home.dataset / ENSEMBLE),
            (
                f"{ENSEMBLE} holds no postprocessing.* nnUNetv2_find_best_configuration Dataset950_Odd -c 2d 3d_lowres "
                "3d_cascade_fullres -tr nnUNetTrainer -p nnUNetPlans -f 0 1; --postprocessing none leaves it out"
            ),
        ),
        (
            lambda home: (home.dataset / "inference_information.json").unlink(),
            "nnU-Net has not said yet .* run nnUNetv2_find_best_configuration Dataset950_Odd, or name",
        ),
        (lambda home: (home.model(CASCADE) / "plans.json").unlink(), r"has no plans\.json"),
    ],
)
def test_what_is_missing_is_said_with_the_command_that_makes_it(
    damage: Callable[[Home], object], said: str, home: Home
) -> None:
    damage(home)
    with pytest.raises(UsageError, match=said):
        choose()


def test_all_that_is_missing_is_said_at_once(home: Home) -> None:
    for model in MODELS:
        shutil.rmtree(home.model(model) / "fold_0")
        shutil.rmtree(home.model(model) / "fold_1")
    with pytest.raises(UsageError, match=r"lowres.* has no fold_0.*; .*has no fold_1.*; .*; and 3 more$"):
        choose()


def test_another_checkpoint_may_be_what_is_there(home: Home) -> None:
    for model in MODELS:
        for fold in FOLDS:
            file = home.model(model) / f"fold_{fold}" / "checkpoint_final.pth"
            file.rename(file.with_name("checkpoint_best.pth"))
    with pytest.raises(UsageError, match="has no checkpoint_final"):
        choose()
    chosen = choose(checkpoint="checkpoint_best.pth")
    assert chosen.models
    assert chosen.remarks[-1].startswith(
        "  weights: checkpoint_best.pth, not the ones that nnU-Net compared (checkpoint_final.pth, unless "
    )


@pytest.mark.parametrize("models", [(FLAT, CASCADE), (LOWRES,)])
def test_an_export_that_lacks_a_model_is_told_the_command_that_exports_it(
    models: tuple[OddModel, ...], home: Home, tmp_path: Path
) -> None:
    exported = export(tmp_path / "model.zip", *models)
    said = "-d Dataset950_Odd -o .*model.zip -c .*2d .*3d_cascade_fullres -tr nnUNetTrainer -p nnUNetPlans -f 0 1$"
    with pytest.raises(UsageError, match=said) as missing:
        choose(sources=(exported,))
    assert "nnunet-torchserve-zip-" not in str(missing.value)


# What cannot be meant


def test_without_the_results_folder_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results", raising=False)
    with pytest.raises(UsageError, match="nnUNet_results is not set"):
        choose()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"nnUNet_results names .*nowhere, which does not exist"):
        choose()


@pytest.mark.parametrize("wanted", ["950", "0950", DATASET])
def test_a_dataset_is_found_by_name_and_by_number(wanted: str, home: Home) -> None:
    (home.results / "Dataset095_Other").mkdir()
    with selected(Choice(dataset=wanted)) as selection:
        assert selection.folds == FOLDS


@pytest.mark.parametrize("wanted", ["95", "951", "Dataset950", "Odd", "../results/Dataset950_Odd", "", "²"])
def test_a_dataset_that_is_not_there_is_answered_with_those_that_are(wanted: str, home: Home) -> None:
    with (
        pytest.raises(UsageError, match=r"no such dataset.*; it has Dataset950_Odd$"),
        selected(Choice(dataset=wanted)),
    ):
        pass


def test_a_number_of_two_datasets_needs_the_whole_name(home: Home) -> None:
    (home.results / "Dataset950_Other").mkdir()
    with pytest.raises(UsageError, match="has Dataset950_Odd, Dataset950_Other; give the whole name"):
        choose()


@pytest.mark.parametrize(
    "more",
    [
        {"folds": (0,)},
        {"ensemble": True},
        {"configurations": ("2d",)},
        {"previous_stages": (Path("x"),)},
        {"sources": (Path("x"),)},
        {"sources": (Path("x.zip"), Path("y.zip"))},
    ],
)
def test_a_recommendation_is_taken_whole(more: Json, home: Home) -> None:
    with pytest.raises(UsageError, match=r"--dataset (takes|looks)"):
        choose(**more)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 10**5, b" " * (2**24 + 1), b'{"folds": [0]}',
        b'{"folds": [0], "best_model_or_ensemble": {"selected_model_or_models": [], "postprocessing_file": "a/b/c"}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_to_be_damaged(content: bytes, home: Home) -> None:
    (home.dataset / "inference_information.json").write_bytes(content)
    with pytest.raises(ToolError, match=r"is damaged.*run nnUNetv2_find_best_configuration Dataset950_Odd again"):
        choose()


@pytest.mark.parametrize("name", ["", "../2d", "a/b", "a\\b", "\x1b[2J", 7])
def test_names_that_lead_elsewhere_are_refused(name: object, home: Home) -> None:
    selected_model = {"configuration": name, "trainer": "nnUNetTrainer", "plans_identifier": "nnUNetPlans"}
    change(home, selected_model_or_models=[selected_model])
    with pytest.raises(ToolError, match=r"selected_model_or_models\.0\.configuration"):
        choose()


@pytest.mark.parametrize("file", ["postprocessing.pkl", f"/results/{DATASET}/{folder_name(FLAT)}/x/postprocessing.pkl"])
def test_a_file_that_contradicts_itself_is_refused(file: str, home: Home) -> None:
    change(home, postprocessing_file=file)
    with pytest.raises(ToolError, match="contradicts itself"):
        choose()
