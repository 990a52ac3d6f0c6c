"""Files as nnU-Net's ``predict_from_files`` leaves them, written so that none is ever seen in part.

Each is written beside its place, brought to the disk and renamed: whoever looks sees the old file, none, or the new
one, also after a power cut. Of a case the label map comes last, so that where it is, everything of the case is.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .answers import Answer, arrays_of
from .cases import TIFF_READER, Path_, output_format
from .description import Description, Json
from .errors import BadAnswer, UnwritableFile
from .results import PREPROCESSED, PROBABILITIES, PROPERTIES, stock_properties, turn

logger = logging.getLogger(__name__)

_LONGEST_NAME = 255 - len("..12345678.part")
"""Bytes of a name that may be part of another one: more than 255 few file systems take."""

ARGUMENTS_FILE, DATASET_FILE, PLANS_FILE = "predict_from_raw_data_args.json", "dataset.json", "plans.json"


def options_for(file_ending: str, *, with_probabilities: bool) -> dict[str, object]:
    """What a server is asked for, so that :func:`write_prediction` has what it needs."""
    wanted: dict[str, object] = {"output_format": output_format(file_ending)}
    return wanted | ({"save_probabilities": True, "properties": True} if with_probabilities else {})


def postprocess_option(description: Description, *, wanted: bool) -> dict[str, object]:
    """What a server is told of postprocessing, which nnU-Net's own prediction never does.

    Args:
        description: of the model; one that has none, or a server that knows of none, is told nothing.
        wanted: whether labels shall be postprocessed.
    """
    if description.postprocesses:
        return {"postprocess": wanted}
    if wanted:
        logger.warning("the served model has no postprocessing: labels are as the network gives them")
    return {}


def write_prediction(
    answer: Answer,
    target: str,
    file_ending: str,
    *,
    with_probabilities: bool,
    reader: str,
    spacing: object = None,
    properties: Mapping[str, Any] | None = None,
) -> None:
    """Write the files of one case.

    Args:
        answer: to a request with :func:`options_for`.
        target: path without ending.
        file_ending: of the dataset.
        with_probabilities: also ``.npz`` and ``.pkl``, for ``nnUNetv2_ensemble``.
        reader: nnU-Net's, of the model.
        spacing: of a stack of pictures (mm, z, y, x), as its JSON file has it; ``None`` is 1 mm.
        properties: of an image that was an array, for the ``.pkl`` instead of what the server says of its file.

    Raises:
        UnwritableFile: a file cannot be written; none is left in part.
        BadAnswer: the answer lacks something.
    """
    labels = answer.content
    if with_probabilities:
        parts = answer.parts()
        try:
            labels = parts[f"labels.{output_format(file_ending)}"]
            document = json.loads(parts[PROPERTIES])
            probabilities = arrays_of(parts[PROBABILITIES], answer)["probabilities"]
            said = stock_properties(document)
        except (KeyError, ValueError, TypeError) as error:
            msg = "the answer lacks a part that was asked for"
            raise BadAnswer(msg, case=answer.case, request_id=answer.request_id, server=answer.server) from error
        del parts
        if properties is not None:
            said = {**properties, **{name: said[name] for name in PREPROCESSED if name in said}}
        turned = turn(probabilities, document.get("turn"))
        write_aside(f"{target}.npz", lambda file: np.savez_compressed(file, probabilities=turned))
        write_aside(f"{target}.pkl", lambda file: pickle.dump(said, file))
    if reader == TIFF_READER:
        write_json(f"{target}.json", {"spacing": [1, 1, 1] if spacing is None else spacing})
    write_aside(target + file_ending, lambda file: file.write(labels))


def write_side_files(folder: Path_, dataset_json: Json, plans_json: Json, arguments: Mapping[str, object]) -> None:
    """Write what nnU-Net puts beside its predictions; make the folder if it is not there.

    Args:
        folder: of the predictions.
        dataset_json: of the model, keys in their order.
        plans_json: likewise.
        arguments: of the call.

    Raises:
        UnwritableFile: one cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"the folder {os.fspath(folder)} cannot be made: {error.strerror}"
        raise UnwritableFile(msg) from error
    write_json(Path(folder, ARGUMENTS_FILE), arguments)
    write_json(Path(folder, DATASET_FILE), dataset_json, sort_keys=False)
    write_json(Path(folder, PLANS_FILE), plans_json, sort_keys=False)


def write_json(path: Path_, document: Mapping[str, object], *, sort_keys: bool = True, replace: bool = True) -> None:
    """As batchgenerators' ``save_json``, which nnU-Net uses; see :func:`write_aside`."""
    text = json.dumps(document, sort_keys=sort_keys, indent=4, default=_plain)
    write_aside(path, lambda file: file.write(text.encode()), replace=replace)


def write_aside(path: Path_, write: Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Write a file that is there whole, or not at all.

    Args:
        path: where it goes.
        write: writes its content.
        replace: whether what is there is replaced; else it stays, if it came meanwhile.

    Raises:
        UnwritableFile: it cannot be written: a full disk, a folder that is read-only or not there.
    """
    place = Path(path)
    known = place.name if len(os.fsencode(place.name)) <= _LONGEST_NAME else ""
    aside = place.with_name(f".{known}.{secrets.token_hex(4)}.part")
    try:
        try:
            with aside.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if replace or not _link(aside, place):
                aside.replace(place)
        finally:
            aside.unlink(missing_ok=True)
        _sync_folder(place.parent)
    except OSError as error:
        msg = f"{place} cannot be written: {error.strerror or type(error).__name__}"
        raise UnwritableFile(msg) from error


def _link(file: Path, place: Path) -> bool:
    """Give a file a second name, unless one has it; ``False`` where the file system cannot do that."""
    try:
        place.hardlink_to(file)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """So that the new name is on the disk; not every file system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(value: object) -> object:
    """What JSON does not know: paths, and NumPy's numbers and arrays."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
