"""A student is taught by a model on a server as by the same model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_trainers.soft_target_files import SoftTargets
from support.distilling import one_process, preprocess, write_dataset
from support.server import LiveServer
from support.training import named_folders

pytestmark = pytest.mark.serve


def test_a_served_teacher_gives_what_its_folder_gives(
    server: LiveServer, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in named_folders(tmp_path).items():
        monkeypatch.setenv(name, value)
    one_process(monkeypatch)
    folder = models["five_folds"]
    plans = write_dataset(
        tmp_path, *(json.loads((folder / each).read_text()) for each in ("plans.json", "dataset.json"))
    )
    preprocess(plans, "3d_fullres")
    cases = plans.parent / "nnUNetPlans_3d_fullres"

    def ask(*arguments: object) -> Any:
        known = ("soft-targets", plans, "--configuration", "3d_fullres", "--folds", "0,2", "--disable-tta")
        return CliRunner().invoke(app, list(map(str, (*known, *arguments))))

    url = ("--server", server.server.inference_url)
    other = ask("--model", "regions", *url)
    assert (other.exit_code, "the student shall learn" in other.stderr) == (1, True)
    assert not (cases / "soft_targets").exists()
    nobody = ask("--model", "nobody", *url)
    assert (nobody.exit_code, "404" in nobody.stderr) == (1, True)
    done = ask("--model", "five_folds", *url)
    assert done.exit_code == 0, done.output
    teacher = SoftTargets.beside(cases).teacher()
    assert teacher is not None
    assert teacher.name == folder.name
    assert (teacher.folds, teacher.use_mirroring) == ((0, 2), False)
    assert ask("--model", "five_folds", *url).stdout.startswith("0 cases made, 2 were there")
    refused = ask("--teacher", folder)
    assert (refused.exit_code, "remove it to change the teacher" in refused.stderr) == (1, True)
    (cases / "soft_targets").rename(tmp_path / "served")
    assert ask("--teacher", folder, "--device", "cpu").exit_code == 0
    for case in ("case_0", "case_1"):
        served, expected = (SoftTargets(each).load(case)[:] for each in (tmp_path / "served", cases / "soft_targets"))
        assert np.ptp(expected.astype(np.float32)) > 0.5
        np.testing.assert_allclose(served, expected, atol=1e-3)
