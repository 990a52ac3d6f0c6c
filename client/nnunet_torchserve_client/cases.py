"""Files of this machine as nnU-Net names them: ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz``, one for each channel.

The functions give what nnU-Net's ``predict_from_files`` would have worked on, in its order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import NotServed, UnreadableFile, WrongPart, WrongUse

OUTPUT_FORMATS = {
    ".nii.gz": "nii.gz",
    ".nii": "nii",
    ".nrrd": "nrrd",
    ".mha": "mha",
    ".png": "png",
    ".bmp": "bmp",
    ".tif": "tif",
    ".tiff": "tif",
}
"""``file_ending`` of a dataset -> what a server is asked for."""

TIFF_READER = "Tiff3DIO"
"""nnU-Net's reader of stacks: a JSON file beside an image has its spacing."""

_CHANNEL_LETTERS = len("_0000")

Item = TypeVar("Item")
Path_ = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """The files of a case.

    Attributes:
        name: nnU-Net's identifier of the case.
        files: one for each channel, in their order.
        target: path of the result without its ending; ``None`` if it is to be returned.
        previous_stage: file with the labels of a cascade's first stage; ``None`` if there is none.
    """

    name: str
    files: tuple[str, ...]
    target: str | None = None
    previous_stage: str | None = None


def output_format(file_ending: str) -> str:
    """What a server is asked for, so that it answers with files of this ending.

    Raises:
        NotServed: it has no such format.
    """
    try:
        return OUTPUT_FORMATS[file_ending.lower()]
    except KeyError:
        msg = f"the dataset's files end in {file_ending}; a server writes {', '.join(OUTPUT_FORMATS)}"
        raise NotServed(msg) from None


def files_in(folder: Path_, file_ending: str) -> list[list[str]]:
    """The files of each case of a folder, cases in the order of their names.

    As nnU-Net's ``create_lists_from_splitted_dataset_folder``; files with another ending are left out.

    Raises:
        UnreadableFile: the folder is not there, or cannot be read.
        WrongUse: a file with this ending has no channel in its name.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file() and entry.name.endswith(file_ending))
    except OSError as error:
        msg = f"the folder {os.fspath(folder)} cannot be read: {error.strerror}"
        raise _missing(error)(msg) from error
    channel = re.compile(r"(.*)_\d{4}" + re.escape(file_ending), re.DOTALL)
    cases: dict[str, list[str]] = {}
    for name in names:
        match = channel.fullmatch(name)
        if match is None:
            msg = f"{name} does not end in the number of its channel, as in CASE_0000{file_ending}"
            raise WrongUse(msg)
        cases.setdefault(match[1], []).append(os.path.join(folder, name))  # noqa: PTH118 (strings, as nnU-Net's)
    return [cases[case] for case in sorted(cases)]


def case_name(files: Sequence[Path_], file_ending: str) -> str:
    """nnU-Net's identifier of a case: the name of its first file without channel and ending."""
    return Path(files[0]).name[: -(len(file_ending) + _CHANNEL_LETTERS)]


def part(items: Sequence[Item], num_parts: int, part_id: int) -> list[Item]:
    """One of ``num_parts`` parts, cut as nnU-Net's ``_manage_input_and_output_lists`` does; see :func:`check_part`."""
    return list(items[part_id::num_parts])


def check_part(num_parts: int, part_id: int, *, one_more: bool = False) -> None:
    """Raise unless there is such a part; no two have an item in common.

    Args:
        num_parts: how many there are.
        part_id: its number, from 0.
        one_more: whether it may be ``num_parts``, as in nnU-Net's ``predict_from_files``, though not in its commands:
            what is the first part's but for its first item.

    Raises:
        WrongPart: there is none.
    """
    if num_parts < 1 or not 0 <= part_id < num_parts + one_more:
        msg = f"part_id {part_id} of {num_parts} parts: they are numbered from 0 to {num_parts - 1}"
        raise WrongPart(msg)


def is_there(target: str, file_ending: str, *, with_probabilities: bool) -> bool:
    """Whether a result was written before, as nnU-Net asks that for ``overwrite=False``."""
    endings = [file_ending, ".npz"] if with_probabilities else [file_ending]
    return all(Path(target + ending).is_file() for ending in endings)


def tiff_spacing(files: Sequence[Path_]) -> list[Any] | None:
    """The spacing (mm, z, y, x) of a stack, from the JSON file beside its first file; ``None`` if there is none.

    Raises:
        UnreadableFile: it is no such file.
    """
    first = os.fspath(files[0])
    beside = Path(first[: -(len(Path(first).suffix) + _CHANNEL_LETTERS)] + ".json")
    if not beside.is_file():
        return None
    try:
        spacing = json.loads(beside.read_text())["spacing"]
        numbers = [float(size) for size in spacing]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f'{beside} is not what nnU-Net writes beside a TIFF: {{"spacing": [z, y, x]}}'
        raise UnreadableFile(msg) from error
    if len(numbers) != _AXES:
        msg = f"{beside} has a spacing of {len(numbers)} numbers; there should be {_AXES}, z, y, x"
        raise UnreadableFile(msg)
    return list(spacing)


_AXES = 3


def placement(reader: str, files: Sequence[Path_]) -> dict[str, object]:
    """The options that say where the images of a case lie, where the files themselves cannot.

    Args:
        reader: nnU-Net's, of the model.
        files: of the case.

    Raises:
        UnreadableFile: see :func:`tiff_spacing`.
    """
    spacing = tiff_spacing(files) if reader == TIFF_READER else None
    return {} if spacing is None else {"spacing": [float(size) for size in spacing[::-1]]}


def _missing(error: OSError) -> type[UnreadableFile]:
    return MissingFolder if isinstance(error, FileNotFoundError) else UnreadableFile


class MissingFolder(UnreadableFile, FileNotFoundError):
    """A folder that is not there."""
