"""What the processes of one test run share (``pytest -n``): a folder, and things that only one of them makes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def run_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the whole run; a process of ``pytest -n`` has its own one in it."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(mark: Path, make: Callable[[], object]) -> None:
    """Call ``make`` unless a process of this run has; the others wait until it is done. The file ``mark`` says so."""
    with mark.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not mark.stat().st_size:
            make()
            file.write("made")
