"""A student is taught by a model on a server as by the same model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from skimage.transform import resize
from typer.testing import CliRunner

from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_trainers.soft_target_files import SoftTargets
from support import stock
from support.distilling import one_process, preprocess, write_dataset
from support.server import LiveServer
from support.training import named_folders

pytestmark = pytest.mark.serve


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in named_folders(tmp_path).items():
        monkeypatch.setenv(name, value)
    one_process(monkeypatch)


def ask(plans: Path, *arguments: object) -> Any:
    known = ("soft-targets", plans, "--configuration", "3d_fullres", "--folds", "0,2", "--disable-tta")
    return CliRunner().invoke(app, list(map(str, (*known, *arguments))))


def test_a_served_teacher_gives_what_its_folder_gives(
    server: LiveServer, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = models["five_folds"]
    document, dataset = (json.loads((folder / each).read_text()) for each in ("plans.json", "dataset.json"))
    plans = write_dataset(tmp_path, document, dataset)
    preprocess(plans, "3d_fullres")
    cases = plans.parent / "nnUNetPlans_3d_fullres"
    url = ("--server", server.server.inference_url)
    other = ask(plans, "--model", "regions", *url)
    assert (other.exit_code, "the student shall learn" in other.stderr) == (1, True)
    turning = plans.with_name("turning.json")
    turning.write_text(json.dumps(document | {"image_reader_writer": "SimpleITKIOWithReorient"}))
    other = ask(turning, "--model", "five_folds", *url)
    assert (other.exit_code, "were read by SimpleITKIOWithReorient" in other.stderr) == (1, True)
    assert not (cases / "soft_targets").exists()
    nobody = ask(plans, "--model", "nobody", *url)
    assert (nobody.exit_code, "404" in nobody.stderr) == (1, True)
    done = ask(plans, "--model", "five_folds", *url)
    assert done.exit_code == 0, done.output
    teacher = SoftTargets.beside(cases).teacher()
    assert teacher is not None
    assert teacher.name == folder.name
    assert (teacher.folds, teacher.use_mirroring) == ((0, 2), False)
    assert ask(plans, "--model", "five_folds", *url).stdout.startswith("0 cases made, 2 were there")
    refused = ask(plans, "--teacher", folder)
    assert (refused.exit_code, "remove it to change the teacher" in refused.stderr) == (1, True)
    (cases / "soft_targets").rename(tmp_path / "served")
    assert ask(plans, "--teacher", folder, "--device", "cpu").exit_code == 0
    for case in ("case_0", "case_1"):
        served, expected = (SoftTargets(each).load(case)[:] for each in (tmp_path / "served", cases / "soft_targets"))
        assert np.ptp(expected.astype(np.float32)) > 0.5
        np.testing.assert_allclose(served, expected, atol=1e-3)


def test_on_another_grid_a_served_teachers_are_turned_cropped_and_resampled(
    server: LiveServer, models: dict[str, Path], tmp_path: Path
) -> None:
    """Stock's probabilities, by hand: each axis of the student has another spacing, and comes from another one."""
    folder = models["five_folds"]
    document, dataset = (json.loads((folder / each).read_text()) for each in ("plans.json", "dataset.json"))
    document |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    document["configurations"]["3d_fullres"]["spacing"] = [1.9, 1.3, 2.5]
    plans = write_dataset(tmp_path, document, dataset)
    preprocess(plans, "3d_fullres")
    done = ask(plans, "--model", "five_folds", "--server", server.server.inference_url)
    assert done.exit_code == 0, done.output
    cases = plans.parent / "nnUNetPlans_3d_fullres"
    image, _, _, properties = nnUNetDatasetBlosc2(str(cases)).load_case("case_1")
    found = SoftTargets.beside(cases).load("case_1")[:]
    assert found.shape[1:] == image.shape[1:] == (14, 16, 10)
    file = tmp_path / "raw" / str(document["dataset_name"]) / "imagesTr" / "case_1_0000.nii.gz"
    expected = stock.predict(folder, [file], folds=(0, 2), use_mirroring=False).probabilities
    assert expected is not None
    box = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
    assert [each.stop - each.start for each in box] != list(properties["shape_before_cropping"])
    turned = expected.transpose(0, 3, 1, 2)[(slice(None), *box)].astype(np.float64)
    by_hand: Any = resize
    resized = np.stack([by_hand(each, image.shape[1:], order=1, mode="edge", anti_aliasing=False) for each in turned])
    assert np.ptp(resized) > 0.5
    np.testing.assert_allclose(found, resized, atol=2e-3)
