"""Whether a path is a trained model's folder, told before anything that takes long to load.

PyTorch and nnU-Net take many seconds to load; a misspelt path is said at once.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .errors import UsageError

PLANS_FILE = "plans.json"
"""As in :mod:`nnunet_torchserve.member_description`, which loads much more than this."""

MOST_HINTS = 3
"""So many folders are named in place of a wrong one."""


NO_SOURCE = "name a trained model's folder or zip, or with --dataset one whose best model nnU-Net has found"
NO_ZIP = "does not exist or is no file; name the zip that nnUNetv2_export_model_to_zip wrote"


def check_sources(models: Collection[Path], previous_stages: Collection[Path] = ()) -> None:
    """Refuse folders and zips that are not there.

    What is a file may be a zip, which is opened later.

    Raises:
        UsageError: no model, or as :func:`check_model_folder`.
    """
    if not models:
        raise UsageError(NO_SOURCE)
    for source in (*models, *previous_stages):
        if source.is_file():
            continue
        if source.suffix.lower() == ".zip" and not source.is_dir():
            msg = f"{source} {NO_ZIP}"
            raise UsageError(msg)
        check_model_folder(source)


def check_model_folder(folder: Path) -> None:
    """Refuse a path that is no folder, or one without nnU-Net's plans.

    Raises:
        UsageError: with the trained folders that lie directly below or above it, if there are any.
    """
    if not folder.is_dir():
        msg = f"{folder} does not exist or is no folder; name nnU-Net's TRAINER__PLANS__CONFIGURATION folder or a zip"
        raise UsageError(msg)
    if not (folder / PLANS_FILE).is_file():
        raise UsageError(no_model_folder(folder, PLANS_FILE))


def no_model_folder(folder: Path, missing: str) -> str:
    """What to say of a folder that lacks one of nnU-Net's files.

    Args:
        folder: as the user named it.
        missing: the file's name.
    """
    said = f"{folder} is no trained nnU-Net folder (TRAINER__PLANS__CONFIGURATION): it has no {missing}"
    near = _near(folder)
    if not near:
        return said
    *others, last = map(str, near[:MOST_HINTS])
    more = f" (there are {len(near)})" if len(near) > MOST_HINTS else ""
    named = f"{', '.join(others)} or {last}" if others else last
    return f"{said}; did you mean {named}?{more}"


def _near(folder: Path) -> list[Path]:
    """The trained folders directly below a folder, by their names; else the one that it lies in."""
    below = sorted(file.parent for file in folder.glob(f"*/{PLANS_FILE}"))
    return below or ([folder.parent] if (folder.parent / PLANS_FILE).is_file() else [])
