"""The tables of training are those of what its benchmarks write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import results, training
from benchmarks.training import distill, region_loader
from benchmarks.training.parcel_regions import COUNTS
from distill_brain_tissue import ONE_FOLD, TAUGHT, TEACHER, TRAINERS

DICE = {
    model: {case: {"CSF": 0.5 + shift, "GM": 0.9} for case, shift in (("one", 0.0), ("two", 0.2))}
    for model in (TEACHER, ONE_FOLD, *TRAINERS)
}
SPREAD = {"min": 1.0, "q1": 3.5, "median": 4.0, "q3": 4.5, "max": 5.0}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What result files hold."""
    documents: dict[str, Any] = {}
    monkeypatch.setattr(training, "load", documents.__getitem__)
    monkeypatch.setattr(results, "load", documents.__getitem__)
    return documents


def test_region_targets(written: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"epoch_s": 20.0, "waiting_s": 5.0}
    monkeypatch.setattr(region_loader, "last_line_of", lambda *_: json.dumps(took))
    work = {str(count): region_loader.measure_work(count, 16, 2, quick=True) for count in COUNTS}
    epochs = {str(count): region_loader.measure_epochs(Path(), count, 5, 2, quick=True) for count in COUNTS}
    written["region_loader"] = {"work": work, "epochs": epochs}
    assert len(region_loader.targets_of(written["region_loader"])) == 9
    rows = training.region_work().splitlines()
    assert len([row for row in rows if row.startswith(("| 3 regions", "| 30 regions"))]) == 6
    assert [row.split("|")[-2].strip() for row in rows if "map" in row] == ["0", "0"]
    epoch = "| 30 | a process of its own | label map | 20.0 s | 100 % | 25 % |"
    assert epoch in training.region_epochs().splitlines()


def test_a_student_beside_its_teacher(written: dict[str, Any]) -> None:
    sides = (TEACHER, ONE_FOLD, TAUGHT)
    speeds = dict.fromkeys(sides[1:], SPREAD)
    document = {
        "cases": distill.WARPS,
        "dice": distill.measure_dice(DICE),
        "costs": {model: {"parameters": 1200, "operations": 2.5e9} for model in sides[1:]} | {"operations_share": 0.12},
        "patches": {"batches": {"1": {"patches_per_second": speeds, "ratio": SPREAD}}},
        "requests": {"2 mm": {"seconds": dict.fromkeys(sides, SPREAD)}},
        "archive_bytes": dict.fromkeys(sides, 2_500_000),
        "training": {model: {"training_seconds": 1300} for model in TRAINERS},
        "served_different_voxels": 0,
    }
    written["distill"] = document
    dice = training.distill_dice()
    assert "| teacher, one fold | 0.600 | 0.900 | 0.750 |" in dice.splitlines()
    assert "warps of one anatomy" in dice
    costs = training.distill_costs().splitlines()
    assert "| student with distillation | 1,200 | 2.50 | 4.0 (3.5 to 4.5) | 4.00 s | 2.50 |" in costs
    assert "| teacher, all folds |  |  |  | 4.00 s | 2.50 |" in costs
    missed = [target.claim for target in distill.targets_of(document) if not target.met]
    assert len(missed) == 2
    assert all("seconds of training" in claim for claim in missed)
