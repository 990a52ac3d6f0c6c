"""Two processes that train together see what they see with stock's targets, and learn from a teacher as one would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_torchserve_trainers.distill_trainers import nnUNetTrainerDistill
from support.ddp_steps import LABELS, PACKED, TASKS, TRAINERS, alone
from support.distilling import doubtful, teach
from support.training import Home, at_home

RANKS = 2
LONGEST_S = 900.0
"""A few times what both take on two busy cores; far less than gloo waits for a process that is gone."""

Seen = dict[str, Any]

# The processes load everything anew. In less time, tests of the steps in a single process guard them.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the homes of all tasks."""
    made = tmp_path_factory.mktemp("homes")
    for name, task in TASKS.items():
        home = Home(made / name, task)
        home.write()
        teach(home, doubtful)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Seen]]:
    """What each process saw, by task and trainer."""
    output = folder / "seen"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    commands = [
        [sys.executable, "-m", "support.ddp_steps", str(folder), str(rank), str(RANKS), str(output)]
        for rank in range(RANKS)
    ]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        said = [each.communicate(timeout=LONGEST_S)[0] for each in running]
    finally:  # if one dies, the other waits for it
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0] * RANKS, "\n".join(text[-3000:] for text in said)
    return [torch.load(f"{output}.{rank}", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("task", [LABELS, PACKED])
def test_two_processes_give_stocks_losses_and_weights(task: str, ranks: list[dict[str, Seen]]) -> None:
    """Of region targets that are packed, and of a student that counts its teacher for nothing."""
    stock, *ours = (trainer.__name__ for trainer in TRAINERS[task] if trainer is not nnUNetTrainerDistill)
    for seen in ranks:
        for name in ours:
            assert_same(seen[task][stock], seen[task][name])
    first, second = (seen[task][stock] for seen in ranks)
    assert first["keys"] != second["keys"] or first["losses"] != second["losses"], "each has images of its own"
    assert first["logged"] == second["logged"]
    assert all(map(torch.equal, first["weights"], second["weights"]))


def assert_same(expected: Seen, found: Seen) -> None:
    for name in ("keys", "losses", "logged"):
        assert found[name] == expected[name]
    assert all(map(torch.equal, expected["weights"], found["weights"]))


def test_two_processes_learn_from_a_teacher_as_one_would_from_both_their_batches(
    folder: Path, ranks: list[dict[str, Seen]]
) -> None:
    """Every term of the loss is a mean over samples here, of which both have equally many."""
    stock, *_, taught = (trainer.__name__ for trainer in TRAINERS[LABELS])
    first, second = (seen[LABELS][taught] for seen in ranks)
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert not all(map(torch.equal, first["weights"], ranks[0][LABELS][stock]["weights"]))
    assert not torch.equal(first["batches"][0]["target"][-1], second["batches"][0]["target"][-1])
    with at_home(folder / "one", TASKS[LABELS]) as home:
        trainer = alone(home, nnUNetTrainerDistill)
        trainer.loss.labels.weight_factors = first["weight_factors"]  # DDP lets the coarsest scale count for a little
        trainer.network.train()
        losses = [
            trainer.train_step(joined(*both))["loss"] for both in zip(first["batches"], second["batches"], strict=True)
        ]
    for step, loss in enumerate(losses):
        assert loss == pytest.approx((first["losses"][step] + second["losses"][step]) / RANKS, rel=1e-5)
    for one, together in zip(trainer.network.state_dict().values(), first["weights"], strict=True):
        torch.testing.assert_close(one, together, rtol=1e-4, atol=1e-6)


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A batch of both's samples."""
    target = [torch.cat(both) for both in zip(one["target"], other["target"], strict=True)]
    return {"data": torch.cat((one["data"], other["data"])), "target": target, "keys": [*one["keys"], *other["keys"]]}
