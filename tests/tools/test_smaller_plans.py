"""Plans for a lighter network: what is left of it, and what stays as it was."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.smaller_plans import cost, smaller_plans
from support.odd_models import OddModel, old_format
from support.untrained import DEMO_MODEL

STANDARD = OddModel(features=(32, 64, 128, 256, 320, 320))


def planned(folder: Path, model: OddModel = STANDARD) -> Path:
    """nnU-Net's files of a dataset."""
    (folder / "dataset.json").write_text(json.dumps(model.dataset()))
    plans = model.plans()
    plans["configurations"][model.configuration]["patch_size"] = [64, 64, 64]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    return folder / "nnUNetPlans.json"


def features_of(plans: dict[str, Any]) -> list[int]:
    [configuration] = plans["configurations"].values()
    features: list[int] = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
    return features


@pytest.mark.parametrize(
    ("features", "residual", "factor", "left"),
    [
        ((32, 64, 128, 256, 320, 320), False, 0.5, [16, 32, 64, 128, 160, 160]),
        ((32, 64, 320), True, 0.4, [13, 24, 128]),
        ((8, 16, 32), False, 0.25, [4, 4, 8]),
        ((2, 8), True, 0.01, [2, 4]),
    ],
)
def test_only_features_and_name_change(
    features: tuple[int, ...], residual: bool, factor: float, left: list[int]
) -> None:
    plans = OddModel(features=features, residual=residual).plans()
    before = copy.deepcopy(plans)
    smaller = smaller_plans(plans, factor, "small")
    assert plans == before
    assert features_of(smaller) == left
    features_of(smaller)[:] = features
    assert smaller == before | {"plans_name": "small"}


def test_plans_of_old_nnunet_are_shrunk_too() -> None:
    plans = OddModel(features=(32, 64, 64)).plans()
    old_format(plans)
    plans["configurations"]["3d_fullres"]["n_conv_per_stage_encoder"] = [2, 1, 3]
    [configuration] = smaller_plans(plans, 0.5, "small", 2)["configurations"].values()
    assert (configuration["UNet_base_num_features"], configuration["unet_max_num_features"]) == (16, 32)
    assert configuration["n_conv_per_stage_encoder"] == [2, 1, 2]


@pytest.mark.parametrize(
    ("residual", "name"),
    [(False, "n_conv_per_stage"), (True, "n_blocks_per_stage"), (False, "n_conv_per_stage_decoder")],
)
def test_no_stage_has_more_convolutions_than_were_asked_for(residual: bool, name: str) -> None:
    plans = OddModel(features=(8, 16, 16), residual=residual).plans()
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments[name] = 3
    [configuration] = smaller_plans(plans, 0.5, "small", 2)["configurations"].values()
    assert configuration["architecture"]["arch_kwargs"][name] == 2
    arguments[name] = [3, 1, 2]
    [configuration] = smaller_plans(plans, 0.5, "small", 2)["configurations"].values()
    assert configuration["architecture"]["arch_kwargs"][name] == [2, 1, 2]
    [configuration] = smaller_plans(plans, 0.5, "small")["configurations"].values()
    assert configuration["architecture"]["arch_kwargs"][name] == [3, 1, 2]


def test_a_configuration_that_inherits_its_network_inherits_the_smaller_one() -> None:
    plans = json.loads((DEMO_MODEL / "plans.json").read_text())
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    smaller = smaller_plans(plans, 0.5, "small")
    assert smaller["configurations"]["3d_cascade_fullres"] == plans["configurations"]["3d_cascade_fullres"]
    dataset = json.loads((DEMO_MODEL / "dataset.json").read_text())
    was, left = (cost(each, dataset, "3d_cascade_fullres") for each in (plans, smaller))
    assert left.parameters < was.parameters / 3


def test_what_a_network_takes_is_what_torch_counts() -> None:
    """Two channels and four classes of 16 x 16 pixels; four and eight features, a convolution in each stage."""
    model = OddModel(2, channels=("a", "b"), schemes=("ZScoreNormalization",) * 2, features=(4, 8))
    found = cost(model.plans(), model.dataset(), "2d")
    encoder = 2 * (9 * 2 * 4 * 16**2 + 9 * 4 * 8 * 8**2)
    decoder = 2 * (4 * 8 * 4 * 8**2 + 9 * 8 * 4 * 16**2 + 4 * 4 * 16**2)
    assert found.operations == encoder + decoder


def test_the_command_writes_them_where_nnunet_looks_for_them(tmp_path: Path) -> None:
    plans = planned(tmp_path)
    done = CliRunner().invoke(app, ["shrink-plans", str(plans), "--name", "nnUNetPlansHalf"])
    assert done.exit_code == 0, done.output
    change, file = done.stdout.splitlines()
    assert Path(file) == tmp_path / "nnUNetPlansHalf.json"
    written = json.loads(Path(file).read_text())
    assert features_of(written) == [16, 32, 64, 128, 160, 160]
    assert {each.name for each in tmp_path.iterdir()} == {"dataset.json", "nnUNetPlans.json", "nnUNetPlansHalf.json"}
    line = r"3d_fullres: ([\d.]+) -> ([\d.]+) million parameters, ([\d.]+)% of the operations of a patch"
    found = re.fullmatch(line, change)
    assert found
    before, after, share = map(float, found.groups())
    assert after == pytest.approx(before / 4, rel=0.02)
    assert share == pytest.approx(25, abs=2)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--name", "small", "--features", "1.5"), 2, "between 0 and 1"),
        (("--name", "small", "--features", "0"), 2, "between 0 and 1"),
        (("--name", "a__b"), 2, "single _"),
        (("--name", "../up"), 2, "letters"),
        (("--name", "nnUNetPlans"), 2, "exists"),
    ],
)
def test_what_cannot_be_meant_is_said(arguments: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["shrink-plans", str(planned(tmp_path)), *arguments])
    assert done.exit_code == code
    assert said in done.stderr
    assert {each.name for each in tmp_path.iterdir()} == {"dataset.json", "nnUNetPlans.json"}


@pytest.mark.parametrize(
    ("plans", "said"), [("{", "no valid JSON"), ("[]", "no JSON object"), ("{}", "no configurations"), (None, "read")]
)
def test_files_that_are_not_nnunets_are_said(plans: str | None, said: str, tmp_path: Path) -> None:
    file = planned(tmp_path)
    file.unlink() if plans is None else file.write_text(plans)
    done = CliRunner().invoke(app, ["shrink-plans", str(file), "--name", "small"])
    assert done.exit_code == (2 if plans is None else 1)
    assert said in done.stderr


def test_a_network_without_stages_is_refused() -> None:
    plans = OddModel().plans()
    plans["configurations"]["3d_fullres"]["architecture"] = {
        "network_class_name": "some.Transformer",
        "arch_kwargs": {},
    }
    with pytest.raises(ToolError, match=r"some\.Transformer"):
        smaller_plans(plans, 0.5, "small")
