"""docs/performance.md and its figures say what the result files say."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.report import tables
from benchmarks.report.figures import FIGURES, FOLDER, shown_by
from benchmarks.report.page import PAGE, rewritten, tables_of
from benchmarks.report.results import load


def test_the_tables_are_those_of_the_results() -> None:
    page = PAGE.read_text()
    assert rewritten(page) == page, "run `make figures`"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_shows_what_the_results_say(name: str) -> None:
    assert shown_by(FOLDER / f"{name}.svg") == FIGURES[name].numbers(), "run `make figures`"


def test_every_table_and_figure_is_on_the_page() -> None:
    page = PAGE.read_text()
    assert sorted(tables_of(page)) == sorted(tables.BLOCKS)
    assert {file.stem for file in FOLDER.glob("*.svg")} == set(FIGURES)
    assert [name for name in FIGURES if f"(figures/{name}.svg)" not in page] == []


def test_another_result_makes_another_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(name: str) -> Any:
        document = copy.deepcopy(load(name))
        if name == "command":
            document["cases"]["2 mm"]["server_seconds"]["median"] = 999.0
        return document

    monkeypatch.setattr(tables, "load", slower)
    assert "| 999 s |" in rewritten(PAGE.read_text())
