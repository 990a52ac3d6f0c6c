"""What an archive says of itself: another schema, or members that are not its recipe's, and nothing more is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_torchserve.bundle import BUNDLE_FILE, BundleDescription, ModelBundle
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.recipe import Cascade, Ensemble, Single

Json = dict[str, Any]


@pytest.fixture
def described(unpacked: Callable[[str], Path]) -> Json:
    """``bundle.json`` of an archive of one member, to be changed."""
    description: Json = json.loads((unpacked("flat") / BUNDLE_FILE).read_text())
    return description


@pytest.mark.parametrize("schema", [1, 3, None])
def test_an_archive_of_another_schema_is_to_be_made_again(schema: object, described: Json, tmp_path: Path) -> None:
    (tmp_path / BUNDLE_FILE).write_text(json.dumps(described | {"schema_version": schema}))
    with pytest.raises(
        BundleError, match=rf"^the archive has schema {schema}, this serving core reads 2; make the archive again$"
    ):
        ModelBundle(tmp_path)


def other(name: str, described: Json) -> Json:
    """A second member."""
    [member] = described["members"]
    return dict(member) | {"name": name}


def test_members_are_those_of_the_recipe_in_its_order(described: Json) -> None:
    [flat], lowres = described["members"], other("3d_lowres", described)
    cascade = Cascade(first=Single(member="3d_lowres"), member="2d")
    both = Ensemble(of=(Single(member="3d_lowres"), cascade))
    for recipe in (cascade, both):
        complete = described | {"members": [lowres, flat], "recipe": recipe.model_dump()}
        read = BundleDescription.model_validate(complete)
        assert ([member.name for member in read.members], read.recipe) == (["3d_lowres", "2d"], recipe)


@pytest.mark.parametrize(
    "members",
    [[], ["3d_lowres"], ["2d", "3d_lowres"], ["2d", "2d"]],
    ids=["none", "another", "one too many", "one twice"],
)
def test_members_that_are_not_the_recipes_are_refused(members: list[str], described: Json, tmp_path: Path) -> None:
    described |= {"members": [other(name, described) for name in members]}
    (tmp_path / BUNDLE_FILE).write_text(json.dumps(described))
    with pytest.raises(BundleError, match="recipe names other members than there are"):
        ModelBundle(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", {"kind": "cascade", "first": {"kind": "single", "member": "3d_lowres"}, "member": "2d"}),
        ("recipe", {"kind": "single", "member": "../2d"}),
        ("recipe", None),
        ("dataset", "Dataset900_X"),
    ],
)
def test_a_description_that_is_not_of_this_schema_is_refused(
    key: str, value: object, described: Json, tmp_path: Path
) -> None:
    (tmp_path / BUNDLE_FILE).write_text(json.dumps(described | {key: value}))
    with pytest.raises(BundleError, match=f"^{BUNDLE_FILE} is not valid"):
        ModelBundle(tmp_path)


def test_the_lead_is_what_the_whole_model_looks_like(
    described: Json, unpacked: Callable[[str], Path], tmp_path: Path
) -> None:
    """The members' files are checked like all others."""
    model = Path(shutil.copytree(unpacked("flat"), tmp_path / "model"))
    shutil.copytree(model / "members" / "2d", model / "members" / "3d_lowres")
    files: dict[str, str] = described["files"]
    files |= {name.replace("/2d/", "/3d_lowres/"): digest for name, digest in files.items()}
    recipe = Cascade(first=Single(member="3d_lowres"), member="2d").model_dump()
    members = [other("3d_lowres", described), *described["members"]]
    (model / BUNDLE_FILE).write_text(json.dumps(described | {"members": members, "recipe": recipe}))
    bundle = ModelBundle(model)
    assert list(bundle.members) == ["3d_lowres", "2d"]
    assert bundle.lead is bundle.members["2d"]
    assert [each.folder.name for each in bundle.members.values()] == list(bundle.members)
    (model / "members" / "3d_lowres" / "plans.json").write_text("{}")
    with pytest.raises(BundleError, match=r"^members/3d_lowres/plans\.json has sha256"):
        ModelBundle(model)
    shutil.rmtree(model / "members" / "3d_lowres")
    with pytest.raises(BundleError, match=r"^members/3d_lowres/.* is missing from the archive$"):
        ModelBundle(model)


@pytest.mark.parametrize("name", ["plans.json", "dataset.json", "fold_0.safetensors"])
def test_a_file_that_decides_what_is_predicted_and_has_no_checksum_is_refused(
    name: str, described: Json, unpacked: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(unpacked("flat"), tmp_path / "model"))
    del described["files"][f"members/2d/{name}"]
    (model / BUNDLE_FILE).write_text(json.dumps(described))
    with pytest.raises(BundleError, match=rf"^members/2d/{name} has no sha256 in {BUNDLE_FILE}"):
        ModelBundle(model)
