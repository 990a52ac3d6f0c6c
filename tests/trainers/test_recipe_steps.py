"""The steps of a recipe are done once, in order, by one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps import RecipeError, Steps

PYTHON = "python"


def test_a_step_that_is_done_is_left_alone_and_one_that_failed_is_done_again(tmp_path: Path) -> None:
    steps, done = Steps(tmp_path, {"WORD": "said"}), tmp_path / "times"

    def work() -> None:
        done.write_text(done.read_text() + "once " if done.exists() else "once ")

    command: list[str | Path] = [PYTHON, "-c", "import os; print(os.environ['WORD']); raise SystemExit(3)"]
    with steps.alone({}):
        with pytest.raises(RecipeError, match=r"python ended with 3[^$]*said"):
            steps.do("one", work, command)
        steps.do("one", work, [PYTHON, "-c", ""])
        steps.do("one", work, command)
    assert done.read_text() == "once once "


def test_what_must_be_ended_is_ended_where_a_step_fails(tmp_path: Path) -> None:
    steps = Steps(tmp_path, {})
    mark = tmp_path / "ended"
    end: list[str | Path] = [PYTHON, "-c", f"open({str(mark)!r}, 'w')"]
    with steps.alone({}), pytest.raises(RecipeError, match="ended with 1"):
        steps.do("serve", [PYTHON, "-c", "raise SystemExit(1)"], finally_=end)
    assert mark.exists()


def test_other_settings_and_other_processes_are_refused(tmp_path: Path) -> None:
    with (
        Steps(tmp_path, {}).alone({"epochs": 1}),
        pytest.raises(RecipeError, match="another process"),
        Steps(tmp_path, {}).alone({"epochs": 1}),
    ):
        pass
    with pytest.raises(RecipeError, match="other settings"), Steps(tmp_path, {}).alone({"epochs": 2}):
        pass
    with Steps(tmp_path, {}).alone({"epochs": 1}):
        pass
