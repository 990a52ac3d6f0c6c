"""``nnunet-torchserve describe FILE.mar``."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import price, settings_for
from nnunet_torchserve.options import Options
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.model_card import Shape, lines, model_card
from support.odd_models import OddModel

SHAPE = Shape((200, 180, 40), (0.8, 0.9, 3.0))


def test_a_card_says_what_the_model_is(
    archive_of: Callable[[str], Path], unpacked: Callable[[str], Path], models: dict[str, Path]
) -> None:
    card, bundle = model_card(archive_of("regions")), ModelBundle(unpacked("regions"))
    assert card["digest"] == f"sha256:{bundle.digest}"
    assert [channel["name"] for channel in card["channels"]] == list(bundle.lead.channel_names.values())
    assert all(channel["values"][0] < channel["values"][1] for channel in card["channels"])
    assert card["labels"] == bundle.lead.dataset["labels"]
    assert card["regions_class_order"] == bundle.lead.dataset["regions_class_order"]
    [name] = bundle.members
    assert card["recipe_in_words"] == name
    assert card["members"][name]["folds"] == list(bundle.lead.folds)
    member, [fold] = card["members"][name], bundle.lead.description.folds
    weights = bundle.lead.folder / fold.weights_file
    checkpoint = models["regions"] / f"fold_{fold.fold}" / "checkpoint_final.pth"
    assert member["weights_bytes"] == weights.stat().st_size
    for what, file in (("weights", weights), ("checkpoint", checkpoint)):
        digest = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        assert member[f"{what}_digests"] == {str(fold.fold): digest}
        assert f"    sha256 of each fold's {what}: {fold.fold} {digest[7:19]}…" in lines(card)
    assert any(card["digest"] in line for line in lines(card))


def test_a_case_costs_what_the_server_would_charge(
    archive_of: Callable[[str], Path], unpacked: Callable[[str], Path]
) -> None:
    member = ModelBundle(unpacked("five_folds")).lead
    expected = price(member, SHAPE.geometry(), 1, settings_for(member, Options()), Options())
    case = model_card(archive_of("five_folds"), SHAPE)["case"]
    assert (case["forward_passes"], case["memory_bytes"]) == (expected.passes, expected.bytes)
    assert case["members"][member.name]["grid_zyx"] == list(expected.grid)


def test_a_recipe_is_told_in_words(tmp_path: Path) -> None:
    first = OddModel(named="3d_lowres", spacing=3.0).write(tmp_path)
    last = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres").write(tmp_path)
    flat = OddModel(2).write(tmp_path)
    [archive] = make_archives(
        ArchiveRequest(last, tmp_path / "store", others=(flat,), previous_stages=(first,), name="both")
    )
    card = model_card(archive, Shape((60, 50, 40), (1.0, 1.0, 1.0)))
    assert card["recipe_in_words"] == "ensemble of (3d_lowres, then 3d_cascade_fullres) and 2d"
    assert list(card["case"]["members"]) == ["3d_lowres", "3d_cascade_fullres", "2d"]
    assert card["case"]["forward_passes"] == sum(each["forward_passes"] for each in card["case"]["members"].values())
    assert any("3d_lowres: nnUNetTrainer" in line for line in lines(card))


def test_the_command_prints_it_for_people_and_for_programs(archive_of: Callable[[str], Path]) -> None:
    file = str(archive_of("flat"))
    people = CliRunner().invoke(app, ["describe", file, "--shape", "100,90,5", "--spacing", "1,1,5"])
    assert people.exit_code == 0, people.output
    assert "forward passes" in people.output
    program = CliRunner().invoke(app, ["describe", file, "--json"])
    assert json.loads(program.output)["configuration"] == "2d"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--shape", "100,90,5"], "belong together"),
        (["--shape", "100,90", "--spacing", "1,1,1"], "three numbers"),
        (["--shape", "100,90,-1", "--spacing", "1,1,1"], "three numbers"),
        (["--shape", "2,2,2", "--spacing", "0.01,0.01,0.01"], "no case of that shape"),
    ],
)
def test_wrong_use_is_told(flags: list[str], reason: str, archive_of: Callable[[str], Path]) -> None:
    done = CliRunner().invoke(app, ["describe", str(archive_of("five_folds")), *flags])
    assert done.exit_code == UsageError.exit_code
    assert reason in done.output


def test_what_is_no_archive_or_damaged_is_told(archive_of: Callable[[str], Path], tmp_path: Path) -> None:
    other = tmp_path / "other.mar"
    other.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no archive"):
        model_card(other)
    with zipfile.ZipFile(archive_of("flat")) as archive, zipfile.ZipFile(other, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name) + (b" " if name.endswith("dataset.json") else b""))
    with pytest.raises(ToolError, match="damaged"):
        model_card(other)
