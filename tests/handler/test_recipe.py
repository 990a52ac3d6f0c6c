"""How one answer is made of members, as a value: which members it names, and in what order."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from nnunet_torchserve.recipe import Cascade, Ensemble, Recipe, Single, last_stage, members_of

FLAT = Single(member="2d")
CASCADE = Cascade(first=Single(member="3d_lowres"), member="3d_cascade_fullres")
RECIPES: TypeAdapter[Single | Cascade | Ensemble] = TypeAdapter(Recipe)


@pytest.mark.parametrize(
    ("recipe", "members", "last"),
    [
        (FLAT, ["2d"], "2d"),
        (CASCADE, ["3d_lowres", "3d_cascade_fullres"], "3d_cascade_fullres"),
        (Ensemble(of=(FLAT, Single(member="3d_fullres"))), ["2d", "3d_fullres"], "2d"),
        (Ensemble(of=(CASCADE, FLAT)), ["3d_lowres", "3d_cascade_fullres", "2d"], "3d_cascade_fullres"),
        (Ensemble(of=(FLAT, CASCADE)), ["2d", "3d_lowres", "3d_cascade_fullres"], "2d"),
        (
            Ensemble(of=(Single(member="3d_lowres"), CASCADE)),
            ["3d_lowres", "3d_lowres", "3d_cascade_fullres"],
            "3d_lowres",
        ),
    ],
    ids=["single", "cascade", "ensemble", "cascade first", "cascade last", "a first stage that is a model too"],
)
def test_members_come_in_the_order_in_which_they_are_needed(
    recipe: Single | Cascade | Ensemble, members: list[str], last: str
) -> None:
    assert list(members_of(recipe)) == members
    assert last_stage(recipe) == last
    assert RECIPES.validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    "content",
    [
        '{"member": "2d"}',
        '{"kind": "best", "member": "2d"}',
        '{"kind": "single", "member": "../2d"}',
        '{"kind": "single", "member": ""}',
        '{"kind": "single", "member": "2d", "weight": 2}',
        '{"kind": "cascade", "member": "2d"}',
        '{"kind": "ensemble", "of": [{"kind": "single", "member": "2d"}]}',
        '{"kind": "ensemble", "of": [{"kind": "single", "member": "2d"}, {"kind": "ensemble", "of": []}]}',
    ],
)
def test_what_is_no_recipe_is_refused(content: str) -> None:
    with pytest.raises(ValidationError):
        RECIPES.validate_json(content)
