"""An archive gets the postprocessing of what it holds, none that is another model's, and what it gets is said."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nnunet_torchserve.bundle import BUNDLE_FILE
from nnunet_torchserve.postprocessing import KeepLargest, Postprocessing
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.composition import Composition, compose
from nnunet_torchserve_tools.errors import ModelWarning, ToolError, UsageError
from nnunet_torchserve_tools.postprocessing_choice import PostprocessingChoice, in_words
from nnunet_torchserve_tools.trained import read_trained_model
from support.odd_models import OddModel

pytestmark = pytest.mark.filterwarnings("ignore:The values in the label map", "ignore:.torch.jit:FutureWarning")

ONE = OddModel(2, folds=(0, 1))
REGIONS = OddModel(
    2,
    labels={"background": 0, "whole": [1, 2, 3], "core": [2], "ignore": 4},
    more_dataset={"regions_class_order": [1, 7]},
)


def write(folder: Path, *steps: int | Sequence[int], name: str = "postprocessing", background: int = 0) -> Path:
    """As nnU-Net does."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * len(steps),
        "postprocessing_kwargs": [{"labels_or_regions": step, "background_label": background} for step in steps],
    }
    (folder / f"{name}.json").write_text(json.dumps(document))
    return folder / f"{name}.json"


def packed(*folders: Path) -> Composition:
    return compose([read_trained_model(folder, None, "checkpoint_final.pth", trust=False) for folder in folders])


def bundle(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read(BUNDLE_FILE))


def test_an_archive_of_one_fold_gets_what_was_determined_for_that_fold_alone(tmp_path: Path) -> None:
    model = ONE.write(tmp_path)
    write(model / "crossval_results_folds_0_1", [1, 2, 3], 2)
    write(model / "crossval_results_folds_1", 3)
    flags = ["--name", "m", "--output", str(tmp_path / "store"), "--per-fold", "--postprocessing", "auto"]
    result = CliRunner().invoke(app, ["archive", str(model), *flags])
    assert result.exit_code == 0, result.output
    found = {name: bundle(tmp_path / "store" / f"{name}.mar") for name in ("m", "m_fold_0", "m_fold_1")}
    steps = {name: each["postprocessing"] and each["postprocessing"]["steps"] for name, each in found.items()}
    assert [[step["labels"] for step in steps[name]] for name in ("m", "m_fold_1")] == [[[1, 2, 3], [2]], [[3]]]
    assert steps["m_fold_0"] is None
    both, one = (f"{model.name}/crossval_results_folds_{folds}/postprocessing.json" for folds in ("0_1", "1"))
    assert result.stderr.splitlines()[1:] == [
        "warning: without postprocessing, as nnU-Net determined none for one fold alone: m_fold_0",
        f"m: postprocessing: 2 steps: only the largest component stays of 1-3, then of 2 ({both})",
        f"m_fold_1: postprocessing: 1 step: only the largest component stays of 3 ({one})",
    ]


def test_without_one_for_all_packed_folds_there_is_no_archive(tmp_path: Path) -> None:
    model = ONE.write(tmp_path)
    write(model / "crossval_results_folds_0", 1)
    flags = ["--output", str(tmp_path / "store"), "--per-fold", "--postprocessing", "auto"]
    result = CliRunner().invoke(app, ["archive", str(model), *flags])
    assert (result.exit_code, "for exactly the folds 0, 1" in result.stderr) == (2, True)
    assert not (tmp_path / "store").exists()


def test_a_file_is_for_every_archive_unless_it_is_known_to_be_of_certain_folds(tmp_path: Path) -> None:
    folder = ONE.write(tmp_path)
    file = write(folder / "crossval_results_folds_0_1", 1)
    both = packed(folder)
    of_folds = {f"m_fold_{fold}": both.of_fold(fold) for fold in (0, 1)}
    named = PostprocessingChoice(file, None, (folder,))
    assert [each and each.file for each in (named.of(both), *named.of_folds(of_folds).values())] == [file] * 3
    recommended = PostprocessingChoice(file, (1, 0), (folder,))
    assert recommended.of(both) == named.of(both)
    with pytest.warns(ModelWarning, match="for one fold alone: m_fold_0, m_fold_1"):
        assert set(recommended.of_folds(of_folds).values()) == {None}
    with pytest.raises(UsageError, match="does not exist"):
        PostprocessingChoice(file.with_name("postprocessing.pkl"), None, (folder,)).of_folds(of_folds)


@pytest.mark.parametrize(
    ("model", "steps", "background", "said"),
    [
        (ONE, ([1, 2, 3], 1, 3), 0, None),
        (ONE, ([1, 2, 3], 4), 0, "steps for the label 4, this model has the labels 0-3"),
        (ONE, ([1, 2, 118, 119, 120],), 0, "steps for the labels 118-120, "),
        (ONE, (1,), 9, "steps for the label 9"),
        (ONE, (1, 2, 3, 1), 0, None),
        (ONE, (1, 2, 3, 1, 2), 0, "5 steps, nnU-Net determines at most 4 for this"),
        (REGIONS, ([1, 2, 3], [1, 2, 3], [2]), 0, None),  # nnU-Net's own: 3 is in a region, and never painted
        (REGIONS, ([1, 7],), 0, None),
        (REGIONS, ([1, 2, 3, 4],), 0, "steps for the label 4, this model has the labels 0-3, 7"),
        (REGIONS, (1, 2, 1, 2), 0, "4 steps, nnU-Net determines at most 3 for this"),
    ],
)
def test_what_is_another_models_is_refused(
    model: OddModel, steps: tuple[Any, ...], background: int, said: str | None, tmp_path: Path
) -> None:
    folder = model.write(tmp_path)
    file = write(tmp_path, *steps, background=background)
    choice = PostprocessingChoice(file, None, (folder,))
    if said is None:
        assert (found := choice.of(packed(folder))) is not None
        assert len(found.postprocessing.steps) == len(steps)
        return
    with pytest.raises(ToolError, match=f"postprocessing.json is of another model: it has .*{said}"):
        choice.of(packed(folder))


def test_nor_is_it_taken_where_nnunet_would_have_put_it(tmp_path: Path) -> None:
    folder = ONE.write(tmp_path)
    write(folder / "crossval_results_folds_0_1", 4)
    with pytest.raises(ToolError, match="is of another model"):
        PostprocessingChoice("auto", None, (folder,)).of(packed(folder))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "none, as no step improved the Dice"),
        ([()], "1 step: only the largest component stays of nothing"),
        ([(1,)], "1 step: only the largest component stays of 1"),
        ([(1, 2), (3,)], "2 steps: only the largest component stays of 1, 2, then of 3"),
        ([(1, 2, 3, 5, 7, 8, 9)], "1 step: only the largest component stays of 1-3, 5, 7-9"),
        (
            [(label,) for label in range(1, 8)],
            ("7 steps: only the largest component stays of 1, then of 2, then of 3, then of 4, then of 5, and 2 more"),
        ),
    ],
)
def test_steps_are_said_in_words(labels: list[tuple[int, ...]], words: str) -> None:
    assert in_words(Postprocessing(steps=tuple(KeepLargest(labels=each) for each in labels))) == words


def test_models_of_an_ensemble_with_different_folds_are_named(tmp_path: Path) -> None:
    one, other = ONE.write(tmp_path), OddModel(3, folds=(0,)).write(tmp_path)
    said = f"have different folds, .*: Dataset950_Odd/{one.name} has 0, 1; Dataset950_Odd/{other.name} has 0. Choose"
    with pytest.warns(ModelWarning, match=said):
        packed(one, other)
    same = read_trained_model(one, (0,), "checkpoint_final.pth", trust=False)
    compose([same, read_trained_model(other, None, "checkpoint_final.pth", trust=False)])
