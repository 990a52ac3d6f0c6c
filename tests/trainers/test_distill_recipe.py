"""The recipe, from the first image to the served answer, with few cases and next to no training."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

import distill_brain_tissue
from distill_brain_tissue import DEMO_MODEL, TAUGHT, TEACHER, TRAINED, Dice, Recipe, follow, means_of

pytestmark = [pytest.mark.long, pytest.mark.serve]

HELD_OUT = 1


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(distill_brain_tissue, "TRAINING_SEEDS", range(5))
    monkeypatch.setattr(distill_brain_tissue, "HELD_OUT_SEEDS", range(1000, 1000 + HELD_OUT))
    return Recipe(tmp_path / "home", DEMO_MODEL / TRAINED, epochs=1, iterations=2)


@pytest.fixture
def dice(recipe: Recipe) -> Dice:
    """What following it gives: minutes, so it is no part of the test."""
    return follow(recipe)


def test_a_student_is_taught_archived_and_served_and_nothing_is_done_twice(recipe: Recipe, dice: Dice) -> None:
    assert set(dice) == set(recipe.models())
    assert {len(cases) for cases in dice.values()} == {HELD_OUT}
    of_teacher, of_student = (fmean(means_of(dice[model]).values()) for model in (TEACHER, TAUGHT))
    assert of_teacher > 0.5, "heads that a teacher does not know"
    assert of_teacher > of_student, "two steps teach nobody"
    assert len(list(recipe.archives.glob("*.mar"))) == 1
    logs = {file: file.read_bytes() for file in (recipe.home / "logs").iterdir()}
    assert follow(recipe) == dice
    assert {file: file.read_bytes() for file in (recipe.home / "logs").iterdir()} == logs
