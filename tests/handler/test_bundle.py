"""What an archive says of itself: another schema, or members that do not bear the recipe out, and nothing is served."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Edited:
    """An unpacked archive that somebody edits, with the checksums that fit."""

    folder: Path
    described: Json

    def write(self, **changes: Any) -> None:
        """``bundle.json`` with other keys."""
        files = self.described["files"]
        for name in files:
            if name.startswith("members/"):
                files[name] = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        self.described.update(changes)
        (self.folder / BUNDLE_FILE).write_text(json.dumps(self.described))

    def file(self, member: str, name: str, change: Callable[[Json], None]) -> None:
        """One of a member's files, changed."""
        file = self.folder / "members" / member / name
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        self.write()

    def member(self, name: str, **changes: Any) -> None:
        """What is said of a member, changed."""
        [member] = (each for each in self.described["members"] if each["name"] == name)
        member.update(changes)
        self.write()


def two_members(described: Json, model: Path, folder: Path) -> Edited:
    """A flat model, and a cascade's second stage whose first it is."""
    shutil.copytree(model, folder)
    shutil.copytree(folder / "members" / "2d", folder / "members" / "cascade")
    described["files"] |= {name.replace("/2d/", "/cascade/"): digest for name, digest in described["files"].items()}
    edited = Edited(folder, described)
    recipe = Cascade(first=Single(member="2d"), member="cascade").model_dump()
    last = other("cascade", described) | {"configuration": "cascade"}
    edited.write(members=[*described["members"], last], recipe=recipe)
    stage = {"inherits_from": "2d", "previous_stage": "2d"}
    edited.file("cascade", "plans.json", lambda plans: plans["configurations"].update(cascade=stage))
    return edited


def one_stage(edited: Edited) -> None:
    """The second model is no cascade any more."""
    edited.file("cascade", "plans.json", lambda plans: plans["configurations"]["cascade"].pop("previous_stage"))


def ensemble(edited: Edited, *models: Json | str) -> None:
    """Another recipe: members by their names, and cascades."""
    of = [Single(member=each).model_dump() if isinstance(each, str) else each for each in models]
    edited.write(recipe={"kind": "ensemble", "of": of})


def no_folds(edited: Edited) -> None:
    edited.member("2d", folds=[])


def a_fold_twice(edited: Edited) -> None:
    edited.member("2d", folds=edited.described["members"][0]["folds"] * 2)


def a_second_stage_alone(edited: Edited) -> None:
    ensemble(edited, "2d", "cascade")


def a_first_stage_that_is_a_second(edited: Edited) -> None:
    stage = {"2d": {"inherits_from": "base", "previous_stage": "base"}}
    edited.file("2d", "plans.json", lambda p: p["configurations"].update(base=p["configurations"].pop("2d"), **stage))


def a_cascade_that_waits_for_labels_in_an_ensemble(edited: Edited) -> None:
    ensemble(edited, "2d", Cascade(first=None, member="cascade").model_dump())


def no_second_stage(edited: Edited) -> None:
    one_stage(edited)


def another_first_stage(edited: Edited) -> None:
    edited.file("cascade", "plans.json", lambda p: p["configurations"]["cascade"].update(previous_stage="3d_lowres"))


def a_first_stage_of_another_trainer(edited: Edited) -> None:
    edited.member("2d", trainer="nnUNetTrainerBN")


def a_first_stage_of_other_folds(edited: Edited) -> None:
    [fold] = edited.described["members"][0]["folds"]
    (edited.folder / "members" / "2d" / "fold_1.safetensors").write_bytes(b"")
    edited.described["files"]["members/2d/fold_1.safetensors"] = ""
    edited.member("2d", folds=[fold, fold | {"fold": 1}])


def a_model_twice(edited: Edited) -> None:
    one_stage(edited)
    ensemble(edited, "2d", "cascade", "2d")


def other_labels(edited: Edited) -> None:
    one_stage(edited)
    ensemble(edited, "2d", "cascade")
    edited.file("cascade", "dataset.json", lambda dataset: dataset["labels"].update(high=2, middle=3))


def other_channels(edited: Edited) -> None:
    one_stage(edited)
    ensemble(edited, "2d", "cascade")
    edited.file("cascade", "dataset.json", lambda dataset: dataset.update(channel_names={"0": "CT"}))


def another_reader(edited: Edited) -> None:
    one_stage(edited)
    ensemble(edited, "2d", "cascade")
    edited.file("cascade", "plans.json", lambda plans: plans.update(image_reader_writer="NibabelIO"))


def another_orientation(edited: Edited) -> None:
    edited.member("2d", input_orientation="RAS")


def another_dataset(edited: Edited) -> None:
    edited.member("2d", dataset="Dataset001_Other")


def other_plans(edited: Edited) -> None:
    edited.member("2d", plans="nnUNetResEncUNetLPlans")


def no_such_configuration(edited: Edited) -> None:
    edited.member("cascade", configuration="3d_lowres")


def no_labels(edited: Edited) -> None:
    edited.file("2d", "dataset.json", lambda dataset: dataset.pop("labels"))


@pytest.mark.parametrize(
    ("contradict", "reason"),
    [
        (no_folds, r"2d has the folds \[\]; it needs one at least"),
        (a_fold_twice, r"2d has the folds \[0, 0\]; .* none twice"),
        (a_second_stage_alone, "cascade is the second stage of a cascade: it needs the labels of 2d, and the recipe"),
        (a_first_stage_that_is_a_second, "2d is the second stage of a cascade: .* and a first stage gets none"),
        (a_cascade_that_waits_for_labels_in_an_ensemble, "cascade is the second stage of a cascade: .* an ensemble"),
        (no_second_stage, "cascade is no second stage of a cascade: its plans name no previous stage"),
        (another_first_stage, "2d is no first stage of cascade: it has the configuration 2d, not 3d_lowres"),
        (a_first_stage_of_another_trainer, "2d is no first stage of cascade: it has the trainer nnUNetTrainerBN"),
        (a_first_stage_of_other_folds, "2d is no first stage of cascade: it has the folds"),
        (another_orientation, "2d is no first stage of cascade: it has the input orientation RAS, not None"),
        (a_model_twice, "the ensemble names 2d twice"),
        (other_labels, "2d and cascade are no ensemble: their labels differ"),
        (other_channels, "2d and cascade are no ensemble: their channels differ"),
        (another_reader, "2d and cascade are no ensemble: their image reader differ"),
        (
            another_dataset,
            r"bundle\.json says that 2d has the dataset Dataset001_Other, its plans\.json says ",
        ),
        (other_plans, r"bundle\.json says that 2d has the plans nnUNetResEncUNetLPlans, its"),
        (no_such_configuration, r"cascade: plans\.json cannot be read: .*3d_lowres"),
        (no_labels, r"2d: dataset\.json: labels cannot be read"),
    ],
)
def test_a_recipe_that_its_members_do_not_bear_out_is_refused(
    contradict: Callable[[Edited], None],
    reason: str,
    described: Json,
    unpacked: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    edited = two_members(described, unpacked("flat"), tmp_path / "model")
    contradict(edited)
    with pytest.raises(BundleError, match=f"^{reason}"):
        ModelBundle(edited.folder)


def test_the_lead_is_what_the_whole_model_looks_like(
    described: Json, unpacked: Callable[[str], Path], tmp_path: Path
) -> None:
    """The members' files are checked like all others."""
    model = two_members(described, unpacked("flat"), tmp_path / "model").folder
    bundle = ModelBundle(model)
    assert list(bundle.members) == ["2d", "cascade"]
    assert bundle.lead is bundle.members["cascade"]
    assert [each.folder.name for each in bundle.members.values()] == list(bundle.members)
    (model / "members" / "2d" / "plans.json").write_text("{}")
    with pytest.raises(BundleError, match=r"^members/2d/plans\.json has sha256"):
        ModelBundle(model)
    shutil.rmtree(model / "members" / "2d")
    with pytest.raises(BundleError, match=r"^members/2d/.* is missing from the archive$"):
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
