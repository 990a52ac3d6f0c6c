"""Two processes that train together see what they see with stock's targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.ddp_steps import TASK, TRAINERS
from support.training import Home

RANKS = 2


@pytest.mark.long  # test_steps_give_stocks_losses_counts_and_weights guards the steps; these processes load it all anew
def test_two_processes_give_stocks_losses_and_weights(tmp_path: Path) -> None:
    home, output = Home(tmp_path / "home", TASK), tmp_path / "seen"
    home.write()
    environment = os.environ | home.variables() | {"PYTHONPATH": str(Path(__file__).parents[1])}
    commands = [
        [sys.executable, "-m", "support.ddp_steps", str(home.folder), str(rank), str(RANKS), str(output)]
        for rank in range(RANKS)
    ]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    said = [each.communicate()[0] for each in running]
    assert [each.returncode for each in running] == [0] * RANKS, "\n".join(text[-3000:] for text in said)
    ranks = [torch.load(f"{output}.{rank}", weights_only=False) for rank in range(RANKS)]
    stock, *ours = (trainer.__name__ for trainer in TRAINERS)
    for seen in ranks:
        for name in ours:
            assert_same(seen[stock], seen[name])
    first, second = (seen[stock] for seen in ranks)
    assert first["keys"] != second["keys"] or first["losses"] != second["losses"], "each has images of its own"
    assert first["logged"] == second["logged"]
    assert all(map(torch.equal, first["weights"], second["weights"]))


def assert_same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name in ("keys", "losses", "logged"):
        assert found[name] == expected[name]
    assert all(map(torch.equal, expected["weights"], found["weights"]))
