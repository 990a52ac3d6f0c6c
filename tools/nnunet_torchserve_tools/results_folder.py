"""nnU-Net's results folder, and a dataset in it by its name or number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError
from .harmless import printable

VARIABLE = "nnUNet_results"

_DATASET = re.compile(r"Dataset(\d+)_.+")
_MOST_SHOWN = 10


def results_folder() -> Path:
    """Where nnU-Net's variable says that it is.

    Raises:
        UsageError: the variable is not set, or names no folder.
    """
    if not (name := os.environ.get(VARIABLE)):
        msg = f"{VARIABLE} is not set: --dataset looks for the dataset below it, as nnUNetv2_predict does"
        raise UsageError(msg)
    if not (folder := Path(name)).is_dir():
        msg = f"{VARIABLE} names {name}, which does not exist or is no folder"
        raise UsageError(msg)
    return folder


def datasets_in(results: Path) -> list[str]:
    """The names of the datasets that have results.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        return sorted(entry.name for entry in results.iterdir() if entry.is_dir() and _DATASET.fullmatch(entry.name))
    except OSError as error:
        msg = f"cannot read {results}: {error.strerror}"
        raise UsageError(msg) from error


def find_dataset(wanted: str, there: Iterable[str], place: str) -> str:
    """The one that is meant.

    Args:
        wanted: a name as in ``Dataset004_Hippocampus``, or a number as in 4 or 004.
        there: the names that there are.
        place: where; for messages.

    Raises:
        UsageError: there is none, or several of that number.
    """
    names = sorted(there)
    if wanted in names:
        return wanted
    if wanted.isascii() and wanted.isdecimal():
        fitting = [name for name in names if (found := _DATASET.fullmatch(name)) and int(found[1]) == int(wanted)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            msg = f"--dataset {wanted}: {place} has {_spoken(fitting)}; give the whole name"
            raise UsageError(msg)
    has = f"it has {_spoken(names)}" if names else "it has none"
    msg = f"--dataset {printable(wanted)}: {place} has no such dataset (a number, or a whole name); {has}"
    raise UsageError(msg)


def _spoken(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(map(printable, names[:_MOST_SHOWN])) + more
