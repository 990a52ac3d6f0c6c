"""What nnU-Net wrote about the postprocessing of a model: which steps, on which labels.

``nnUNetv2_find_best_configuration`` and ``nnUNetv2_determine_postprocessing`` pickle functions and their arguments into
``postprocessing.pkl``, which is what ``nnUNetv2_apply_postprocessing`` does, and write their names and arguments into
``postprocessing.json`` beside it. The pickle is read without unpickling it. Where both are there they must agree: the
JSON has a function's name without its module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_torchserve.options import FoldName
from nnunet_torchserve.postprocessing import LARGEST_LABEL, KeepLargest, Postprocessing

from .errors import ToolError, UsageError
from .harmless import Refused, printable
from .plain_pickle import Function, read_plain_pickle

PICKLE, JSON = "postprocessing.pkl", "postprocessing.json"

_NAME = "remove_all_but_largest_component_from_segmentation"
_FULL_NAME = f"nnunetv2.postprocessing.remove_connected_components.{_NAME}"
_LABELS, _BACKGROUND = "labels_or_regions", "background_label"

_MOST_BYTES = {".pkl": 2**20, ".json": 2**24}
"""By suffix. A step of 1,000 labels has 40 kB in the pickle. The JSON has the Dice of every label as well."""

_MOST_STEPS = 2**12
"""nnU-Net writes at most one for each label or region of a model, and one for all of them."""

_MOST_LABELS = 2 * (LARGEST_LABEL + 1)
"""Of all steps together: each label among all of the foreground, and in a step of its own. In a pickle steps and labels
cost next to nothing: they may share one list."""

_FOLDS = re.compile(r"crossval_results_folds_(\d+(?:_\d+)*)")

_SUPPORTED = f"nnU-Net's {_NAME} is the only function that can be served"


@dataclass(frozen=True, slots=True)
class FoundPostprocessing:
    """What was found, and where.

    Attributes:
        file: nnU-Net's.
        postprocessing: what it says.
    """

    file: Path
    postprocessing: Postprocessing


class _NotServed(Exception):
    """Something that nnU-Net's own files do not hold; the message says what."""


def read_postprocessing(file: Path) -> Postprocessing:
    """What a file of nnU-Net's says.

    Args:
        file: ``postprocessing.pkl``; if there is a ``.json`` of the same name beside it, that must say the same.
            Or ``postprocessing.json``, which is then the only one that is read.

    Raises:
        UsageError: there is no such file, or it is another one.
        ToolError: it is damaged, holds something else than steps that can be served, or disagrees with the other.
    """
    if file.suffix not in _MOST_BYTES:
        msg = f"{file} is neither nnU-Net's {PICKLE} nor its {JSON}"
        raise UsageError(msg)
    if not file.is_file():
        msg = f"{file} does not exist or is no file; name the {PICKLE} or {JSON} that nnU-Net wrote"
        raise UsageError(msg)
    if file.suffix == ".json":
        return _read(file, _from_json)
    pickled, beside = _read(file, _from_pickle), file.with_suffix(".json")
    if beside.is_file() and _read(beside, _from_json) != pickled:
        msg = (
            f"{file} and the {beside.name} beside it say different things; name {beside.name} to take what that says, "
            "or delete the one that is wrong"
        )
        raise ToolError(msg)
    return pickled


def postprocessing_in(folder: Path) -> FoundPostprocessing | None:
    """What nnU-Net determined for the predictions in a folder; ``None`` if it did not.

    Args:
        folder: of predictions that were compared with the truth: ``crossval_results_folds_*`` or one of ``ensembles``.

    Raises:
        ToolError: as :func:`read_postprocessing`.
    """
    for name in (PICKLE, JSON):
        if (file := folder / name).is_file():
            return FoundPostprocessing(file, read_postprocessing(file))
    return None


def postprocessing_of_folds(model_folder: Path, folds: Sequence[FoldName]) -> FoundPostprocessing:
    """What nnU-Net determined for a model by cross-validation of exactly these folds.

    Args:
        model_folder: ``TRAINER__PLANS__CONFIGURATION``.
        folds: in any order.

    Raises:
        UsageError: there is none; the message says for which folds there is one.
        ToolError: two that are of the same folds differ; or as :func:`read_postprocessing`.
    """
    folders = _cross_validated(model_folder)
    of_folds = [folder for folder, its_folds in folders.items() if set(its_folds) == set(folds)]
    found = [each for each in map(postprocessing_in, of_folds) if each is not None]
    if not found:
        raise UsageError(_none_for(model_folder, folds, of_folds, folders))
    _check_agree(found)
    return found[0]


def postprocessing_of_ensemble(model_folders: Sequence[Path], folds: Sequence[FoldName]) -> FoundPostprocessing:
    """What nnU-Net determined for the mean of models by cross-validation of exactly these folds.

    Args:
        model_folders: ``TRAINER__PLANS__CONFIGURATION`` of one dataset, in any order.
        folds: in any order.

    Raises:
        UsageError: there is none.
        ToolError: two that are of the same models and folds differ; or as :func:`read_postprocessing`.
    """
    first = model_folders[0].absolute()
    place, wanted = first.parent / "ensembles", {folder.name for folder in model_folders}
    if {folder.absolute().parent for folder in model_folders} != {first.parent}:
        msg = "nnU-Net determines no postprocessing for an ensemble of several datasets; name a file"
        raise UsageError(msg)
    folders = sorted(place.iterdir()) if place.is_dir() else []
    of_these = [folder for folder in folders if _models_and_folds(folder) == (wanted, set(map(str, folds)))]
    found = [each for each in map(postprocessing_in, of_these) if each is not None]
    if not found:
        msg = (
            f"{place} holds no postprocessing for exactly {' and '.join(sorted(wanted))} with the folds "
            f"{', '.join(map(str, folds))}; nnU-Net determines one if nnUNetv2_find_best_configuration finds this "
            "ensemble to be the best"
        )
        raise UsageError(msg)
    _check_agree(found)
    return found[0]


def _models_and_folds(folder: Path) -> tuple[set[str], set[str]] | None:
    """What nnU-Net put into the name of a folder of ``ensembles``."""
    match folder.name.split("___"):
        case ["ensemble", *models, folds]:
            return set(models), set(folds.split("_"))
    return None


def _check_agree(found: Sequence[FoundPostprocessing]) -> None:
    for other in found[1:]:
        if other.postprocessing != found[0].postprocessing:
            msg = f"{found[0].file} and {other.file} are of the same folds and say different things; name one of them"
            raise ToolError(msg)


def _cross_validated(model_folder: Path) -> dict[Path, tuple[int, ...]]:
    """nnU-Net's folders of cross-validated predictions -> their folds."""
    try:
        entries = sorted(entry for entry in model_folder.iterdir() if entry.is_dir())
    except OSError as error:
        msg = f"cannot read {model_folder}: {error.strerror}"
        raise UsageError(msg) from error
    matches = {entry: _FOLDS.fullmatch(entry.name) for entry in entries}
    return {entry: tuple(map(int, match[1].split("_"))) for entry, match in matches.items() if match}


def _none_for(
    model_folder: Path, folds: Sequence[FoldName], of_folds: Sequence[Path], folders: Mapping[Path, Sequence[int]]
) -> str:
    wanted = ", ".join(map(str, folds))
    if "all" in folds:
        return f"fold_all of {model_folder} has no cross-validation, so there is no postprocessing that belongs to it"
    if of_folds:
        return (
            f"{of_folds[0]} holds no {PICKLE}: nnU-Net determines one for what nnUNetv2_find_best_configuration finds "
            "to be the best; for others nnUNetv2_determine_postprocessing does"
        )
    names = [folder.name for folder in folders if (folder / PICKLE).is_file() or (folder / JSON).is_file()]
    there = f"there is {', '.join(names)}" if names else "there is none for others either"
    return f"{model_folder} holds no postprocessing for exactly the folds {wanted}; {there}"


def _read(file: Path, reader: Callable[[bytes], tuple[list[Any], list[Any]]]) -> Postprocessing:
    most = _MOST_BYTES[file.suffix]
    try:
        with file.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise ToolError(msg) from error
    if len(content) > most:
        msg = f"{file} has more than {most} bytes; nnU-Net does not write such files"
        raise ToolError(msg)
    try:
        functions, arguments = reader(content)
        return Postprocessing(steps=tuple(_steps(functions, arguments)))
    except (Refused, _NotServed) as error:
        msg = f"{file} holds {error}; {_SUPPORTED}"
        raise ToolError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{file} is damaged or no postprocessing file of nnU-Net's"
        raise ToolError(msg) from error


def _from_pickle(content: bytes) -> tuple[list[Any], list[Any]]:
    """Function names and their arguments."""
    functions, arguments = _pair(read_plain_pickle(content, {_FULL_NAME}))
    names = [each.name if type(each) is Function else None for each in functions]
    return [_NAME if name == _FULL_NAME else name for name in names], arguments


def _from_json(content: bytes) -> tuple[list[Any], list[Any]]:
    """Function names and their arguments."""
    document = json.loads(content)
    if not isinstance(document, dict):
        msg = "no JSON object"
        raise ValueError(msg)  # noqa: TRY004 (as of any other damage)
    return _pair((document.get("postprocessing_fns"), document.get("postprocessing_kwargs")))


def _pair(value: Any) -> tuple[list[Any], list[Any]]:
    if type(value) is not tuple or [type(each) for each in value] != [list, list] or len(value[0]) != len(value[1]):
        raise ValueError
    functions, arguments = value
    return functions, arguments


def _steps(functions: Sequence[Any], arguments: Sequence[Any]) -> Iterator[KeepLargest]:
    if len(functions) > _MOST_STEPS:
        msg = f"{len(functions)} steps, more than {_MOST_STEPS}"
        raise _NotServed(msg)
    room = _MOST_LABELS
    for function, named in zip(functions, arguments, strict=True):
        if type(function) is not str or type(named) is not dict:
            raise ValueError
        if function != _NAME:
            msg = f"the function {printable(function)}"
            raise _NotServed(msg)
        if others := named.keys() - {_LABELS, _BACKGROUND}:
            msg = f"the argument {printable(min(others))}"
            raise _NotServed(msg)
        if _LABELS not in named:
            raise ValueError
        labels, room = _labels(named[_LABELS], room)
        yield KeepLargest(labels=tuple(sorted(labels)), background=_label(named.get(_BACKGROUND, 0)))


def _labels(value: Any, room: int) -> tuple[set[int], int]:
    """All that nnU-Net unites: a label, a region (a tuple, or a list in JSON), or a list of both.

    Returns:
        The labels, and for how many more there is room.
    """
    found: set[int] = set()
    for each in value if isinstance(value, list | tuple) else [value]:
        members: Sequence[Any] = each if isinstance(each, list | tuple) else [each]
        room -= max(1, len(members))  # to look at none takes time, too
        if room < 0:
            msg = f"more than {_MOST_LABELS} labels in its steps"
            raise _NotServed(msg)
        found.update(map(_label, members))
    return found, room


def _label(value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        msg = f"a {type(value).__name__} in place of a label"
        raise _NotServed(msg)
    if not 0 <= value <= LARGEST_LABEL:
        msg = f"a label that is not from 0 to {LARGEST_LABEL}"
        raise _NotServed(msg)
    return int(value)
