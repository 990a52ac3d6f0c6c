"""The command that proposes codes for structures, and the archive that takes them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.segments import read_segments
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ModelWarning, ToolError, UsageError
from nnunet_torchserve_tools.model_card import model_card
from nnunet_torchserve_tools.segments import checked_segments, propose

TISSUE = {"value": "85756007", "scheme": "SCT", "meaning": "Tissue"}
PLAIN = {"category": TISSUE, "type": TISSUE}


def dataset(folder: Path, *names: str) -> Path:
    labels = {"background": 0} | {name: value for value, name in enumerate(names, start=1)} | {"ignore": 99}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def test_a_concept_of_the_standard_is_proposed_with_its_side(tmp_path: Path) -> None:
    names = (
        "kidney_right",
        "LeftKidney",
        "upper lobe of lung left",
        "vertebrae_L1",
        "tumour",
        "liver",
        "grey_matter",
        "oesophagus",
    )
    found = propose(dataset(tmp_path, *names))
    assert found.unknown == []
    said = {
        name: (codes.type.meaning, codes.laterality and codes.laterality.meaning) for name, codes in found.codes.items()
    }
    assert said == {
        "kidney_right": ("Kidney", "Right"),
        "LeftKidney": ("Kidney", "Left"),
        "upper lobe of lung left": ("Upper lobe of lung", "Left"),
        "vertebrae_L1": ("L1 vertebra", None),
        "tumour": ("Neoplasm", None),
        "liver": ("Liver", None),
        "grey_matter": ("Gray Matter", None),
        "oesophagus": ("Esophagus", None),
    }
    assert found.codes["liver"].type.value == "10200004"
    assert found.codes["liver"].category.meaning == "Anatomical Structure"
    assert found.codes["tumour"].category.meaning == "Morphologically Abnormal Structure"


def test_a_concept_that_has_a_side_in_its_name_is_that_concept(tmp_path: Path) -> None:
    [atrium] = propose(dataset(tmp_path, "left_atrium")).codes.values()
    assert (atrium.type.meaning, atrium.laterality) == ("Left atrium", None)


@pytest.mark.parametrize("name", ["organ 7", "kidney_tumour_rim", "rt kidney", "WT", "class_1", "lft"])
def test_a_name_that_is_no_concept_s_is_left_to_the_user(name: str, tmp_path: Path) -> None:
    found = propose(dataset(tmp_path, name))
    assert (dict(found.codes), found.unknown) == ({}, [name])


def test_the_command_prints_a_file_that_archive_takes_and_says_where_it_is_from(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["segments", str(dataset(tmp_path, "liver", "thing"))])
    assert result.exit_code == 0, result.output
    assert list(read_segments(result.stdout.encode())) == ["liver"]
    assert "thing: not known" in result.stderr
    assert "PS3.16" in result.stderr
    assert "pydicom" in result.stderr


@pytest.mark.parametrize(("content", "error"), [(None, UsageError), ("[]", ToolError), ('{"labels": 3}', ToolError)])
def test_what_is_no_model_is_refused(content: str | None, error: type[ToolError], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(error, match=r"dataset\.json"):
        propose(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"lever": PLAIN}, "'lever' is no structure of the model; it has liver"),
        ({"liver": {"type": TISSUE}}, "liver.category: Field required"),
        ({"liver": PLAIN | {"category": TISSUE | {"value": "1" * 17}}}, "liver.category.value: .* 16 characters"),
        ({"liver": PLAIN | {"category": TISSUE | {"meaning": "a\\b"}}}, "liver.category.meaning"),
        ({"liver": PLAIN | {"color": [1, 2, 256]}}, r"liver\.color\.2"),
        ({"liver": PLAIN | {"side": TISSUE}}, r"liver\.side"),
        ([], "object"),
    ],
)
def test_a_file_of_codes_that_is_none_is_refused(content: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "codes.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=words):
        checked_segments(tmp_path / "codes.json", ["liver"])


def test_an_archive_keeps_codes_and_says_which_structures_have_none(models: dict[str, Path], tmp_path: Path) -> None:
    names = [
        name
        for name in json.loads((models["five_folds"] / "dataset.json").read_bytes())["labels"]
        if name != "background"
    ]
    (tmp_path / "codes.json").write_text(json.dumps({names[0]: PLAIN}))
    request = ArchiveRequest(models["five_folds"], tmp_path / "store", folds=(0,), segments=tmp_path / "codes.json")
    with pytest.warns(ModelWarning, match=", ".join(names[1:])):
        [archive] = make_archives(request)
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    bundle = ModelBundle(tmp_path / "unpacked")
    assert list(bundle.codes) == [names[0]]
    assert "segments.json" in bundle.description.files
    assert list(model_card(archive)["segments"]) == [names[0]]
