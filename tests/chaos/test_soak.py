"""Some of what ``make soak`` does for long: requests while engines and workers are killed at random."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.load.soak import Plan, Task, run
from support.chaos import Case
from support.odd_models import OddModel
from support.own_grid import own_code, write

pytestmark = pytest.mark.serve

MINUTE = Plan(requests=10_000, most_seconds=60.0, rounds=2, kill_every_s=5.0, clients=6, workers=3, give_up_s=120.0)
TASKS = 12
FEWEST_KILLS, FEWEST_ANSWERS = 3, 20


def tasks() -> list[Task]:
    """Small images for ``five_folds``, no two alike; all folds, or one fold with more windows."""
    generator = np.random.default_rng(0)
    options = ({"use_mirroring": False}, {"use_mirroring": False, "folds": [0], "tile_step_size": 0.25})
    cases = [
        Case(
            (int(generator.integers(24, 45)), int(generator.integers(24, 45)), int(generator.integers(24, 45))),
            seed,
            json.dumps(options[seed % 2]),
        )
        for seed in range(TASKS)
    ]
    return [Task(case.body, json.loads(case.options)) for case in cases]


@pytest.mark.long
def test_killing_engines_and_workers_costs_clients_only_time(models: dict[str, Path], tmp_path: Path) -> None:
    report = run(models["five_folds"], tasks(), MINUTE, tmp_path)
    assert len(report.kills) >= FEWEST_KILLS
    assert report.answered >= FEWEST_ANSWERS
    assert report.wrong == 0
    assert report.failed == []
    assert report.hung == 0
    assert report.held_when_quiet == 0
    assert report.left_over == []
    for kind in ("engine", "worker"):
        assert report.growth_mb(kind) <= report.allowed_mb(kind), report.quiet


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* goes into the archive as code", "ignore:.torch.jit:FutureWarning")
def test_killing_engines_and_workers_costs_clients_of_a_recipe_only_time(tmp_path: Path) -> None:
    """An ensemble with a cascade, of somebody's own trainer, whose cases take more than their headers tell."""
    file = own_code(tmp_path / "own", 2)
    flat = write(OddModel(2), tmp_path, file)
    lowres = write(OddModel(named="3d_lowres", spacing=3.0), tmp_path, file)
    cascade = write(OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres"), tmp_path, file, own_grid=False)
    asked = [task for task in tasks() if "folds" not in task.options]
    parts = {"others": (cascade,), "previous_stages": (lowres,), "trainer_files": (file,)}
    report = run(flat, asked, replace(MINUTE, most_seconds=40.0, give_up_s=600.0), tmp_path / "served", **parts)
    assert len(report.kills) >= FEWEST_KILLS
    assert report.answered >= FEWEST_ANSWERS // 4
    assert (report.wrong, report.failed, report.hung) == (0, [], 0)
    assert (report.held_when_quiet, report.left_over) == (0, [])
