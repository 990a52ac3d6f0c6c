"""The folds of a trained model folder, and their checkpoints: which there are, and which flags take them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_torchserve.options import FoldName

from .checkpoint import Checkpoint, read_checkpoint
from .errors import ToolError, UsageError

_FOLD_FOLDER = re.compile(r"fold_(\d+)")


def read_checkpoints(
    folder: Path, folds: Sequence[FoldName], checkpoint: str, *, trust: bool
) -> dict[FoldName, Checkpoint]:
    """The checkpoints of an ensemble.

    Args:
        folder: the trained model folder.
        folds: which ones.
        checkpoint: the file's name within each fold's folder.
        trust: open them as ordinary pickles.

    Raises:
        UsageError: a fold or its checkpoint is not there.
        ToolError: a checkpoint is damaged, or disagrees with another.
    """
    checkpoints: dict[FoldName, Checkpoint] = {}
    for fold in folds:
        file = folder / f"fold_{fold}" / checkpoint
        if not file.is_file():
            files = _files_of_folds(folder)
            there = [name for name in files if checkpoint in files[name]]
            msg = f"fold {fold} has no {checkpoint} in {folder}, which has it for {_spoken(there)}"
            if other := _other_checkpoint(files, [fold], checkpoint):
                msg += f"; --checkpoint {other} takes what fold {fold} has"
            raise UsageError(msg)
        checkpoints[fold] = read_checkpoint(file, trust=trust)
    first_fold, first = next(iter(checkpoints.items()))
    for fold, each in checkpoints.items():
        for what in ("trainer", "configuration"):
            if (other := getattr(each, what)) != (expected := getattr(first, what)):
                msg = f"fold {fold} has the {what} {other}, fold {first_fold} has {expected}: they are no ensemble"
                raise ToolError(msg)
    return checkpoints


def numbered_folds(folder: Path, checkpoint: str) -> tuple[FoldName, ...]:
    """Every numbered fold.

    Raises:
        UsageError: there is none with the checkpoint, or there are some without it: whoever forgot that a fold is still
            being trained would never see that the ensemble lacks it.
    """
    files = _files_of_folds(folder)
    numbered = [fold for fold in files if fold != "all"]
    found = tuple(fold for fold in numbered if checkpoint in files[fold])
    lacking = [fold for fold in numbered if checkpoint not in files[fold]]
    if found and not lacking:
        return found
    if found:
        verb, them = ("has", "it") if len(lacking) == 1 else ("have", "them")
        msg = (
            f"{_spoken(lacking)} of {folder} {verb} no {checkpoint}; "
            f"--folds {','.join(map(str, found))} makes an archive without {them}"
        )
        if other := _other_checkpoint(files, numbered, checkpoint):
            msg += f", --checkpoint {other} takes a file that all of them have"
    elif checkpoint in files.get("all", ()):
        msg = f"{folder} has no numbered fold with a {checkpoint}, but fold_all has it: take that with --folds all"
    else:
        msg = f"{folder} has no fold with a {checkpoint}; " + _other_way(files, numbered, checkpoint)
    raise UsageError(msg)


def _other_way(files: Mapping[FoldName, Sequence[str]], numbered: Sequence[FoldName], checkpoint: str) -> str:
    """Which flags take what is there, where no fold has the checkpoint."""
    having = [fold for fold in numbered if _other_checkpoint(files, [fold], checkpoint)]
    if having and (other := _other_checkpoint(files, having, checkpoint)):
        folds = "" if len(having) == len(numbered) else f"--folds {','.join(map(str, having))} "
        have = "has" if len(having) == 1 else "have"
        return f"{_spoken(having)} {have} {other}: take it with {folds}--checkpoint {other}"
    if having:
        return "their checkpoints have different names: choose with --folds and --checkpoint"
    if "all" in files and (other := _other_checkpoint(files, ["all"], checkpoint)):
        return f"fold_all has {other}: take it with --folds all --checkpoint {other}"
    return "was the training ended? Name the folder that has fold_0, fold_1, … with checkpoints in them"


def _other_checkpoint(
    files: Mapping[FoldName, Sequence[str]], folds: Sequence[FoldName], checkpoint: str
) -> str | None:
    """A checkpoint that all of these folds have: best before latest."""
    common = set.intersection(*(set(files.get(fold, ())) for fold in folds)) if folds else set()
    return min((name for name in common if name.endswith(".pth") and name != checkpoint), default=None)


def _files_of_folds(folder: Path) -> dict[FoldName, list[str]]:
    """The names of the files in each fold's folder; numbers in order, then ``all``."""
    folders = {entry.name: entry for entry in folder.iterdir() if entry.is_dir()}
    numbers = sorted(int(found[1]) for found in map(_FOLD_FOLDER.fullmatch, folders) if found)
    folds: list[FoldName] = [*numbers, "all"]
    return {
        fold: [file.name for file in folders[f"fold_{fold}"].iterdir() if file.is_file()]
        for fold in folds
        if f"fold_{fold}" in folders
    }


def _spoken(folds: Sequence[FoldName]) -> str:
    """As in "fold_0, fold_2"."""
    return ", ".join(f"fold_{fold}" for fold in folds) or "no fold"
