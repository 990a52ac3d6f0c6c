"""Threads that wait leave their cores to others: what OpenMP finds in the environment when PyTorch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_torchserve_tools.openmp import let_threads_sleep

LISTENING = """
import os, sys
from ctypes import CDLL, c_char_p

def heard(event, arguments):
    if event == "import" and arguments[0] == "torch":
        getenv = CDLL(None).getenv  # as OpenMP reads it
        getenv.restype = c_char_p
        print("torch with", getenv(b"OMP_WAIT_POLICY"), flush=True)
        os._exit(44)  # to load it takes seconds

sys.addaudithook(heard)
from nnunet_torchserve_tools.cli import app
app(sys.argv[1:])
"""


def test_what_somebody_has_said_stays() -> None:
    said = {"OMP_WAIT_POLICY": "ACTIVE"}
    let_threads_sleep(said)
    assert said == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize("verb", ["archive", "validate"])
def test_a_verb_that_computes_says_it_before_pytorch_is_loaded(
    verb: str, models: dict[str, Path], tmp_path: Path
) -> None:
    arguments = {
        "archive": [str(models["flat"]), "--folds", "9", "--output", str(tmp_path)],
        "validate": [str(tmp_path / "none.mar"), "--images", str(tmp_path)],
    }
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", LISTENING, verb, *arguments[verb]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 44, done.stderr
    assert "torch with b'PASSIVE'" in done.stdout
