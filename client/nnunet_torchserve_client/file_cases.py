"""Files of this machine on their way to a server, and what comes back on its way into files.

One place says what a server is asked for with a case of files, for the predictor and for the folder command.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .answers import Answer
from .cases import ImageFiles, MissingFolder, Path_, case_name, files_in, is_there, part, placement, tiff_spacing
from .client import Case
from .description import Description
from .errors import ClientError, WrongUse
from .outputs import options_for, write_prediction
from .previous_stage import check_previous_stage
from .results import result_arrays


def image_files(
    source: Path_ | Sequence[Sequence[Path_]], output: Path_ | Sequence[Path_] | None, file_ending: str
) -> tuple[str | None, list[ImageFiles]]:
    """All cases of a call, as nnU-Net's ``predict_from_files`` takes them.

    Args:
        source: a folder, whose cases come in the order of their names; or for each case its files, one a channel.
        output: a folder; or for each case a path without ending; ``None`` if results are to be returned.
        file_ending: of the dataset.

    Returns:
        The folder for the files beside the predictions, ``None`` if there is none; and the cases.

    Raises:
        UnreadableFile: there is no such folder, or it cannot be read.
        WrongUse: a case without a file, a name without a channel, or another number of paths than of cases.
    """
    if isinstance(source, str | os.PathLike):
        lists = files_in(source, file_ending)
    else:
        lists = [[os.fspath(file) for file in files] for files in source]
    if not all(lists):
        msg = "a case without a file"
        raise WrongUse(msg)
    names = [case_name(files, file_ending) for files in lists]
    folder, targets = _places(output, names)
    return folder, [ImageFiles(*each) for each in zip(names, map(tuple, lists), targets, strict=True)]


def with_previous_stage(
    files: Sequence[ImageFiles], folder: Path_ | None, description: Description
) -> list[ImageFiles]:
    """The cases with the labels of a cascade's first stage, ``CASE.nii.gz``, as ``nnUNetv2_predict`` writes them.

    A file that is not there is the fault of its case.

    Args:
        files: the cases.
        folder: of the labels; ``None`` if none are given.
        description: of the model.

    Raises:
        WrongPreviousStage: the model takes none, or cannot do without.
        MissingFolder: there is no such folder.
    """
    check_previous_stage(description, given=folder is not None)
    if folder is None:
        return list(files)
    if not Path(folder).is_dir():
        msg = f"{os.fspath(folder)} is no folder; the labels of the previous stage were expected in it"
        raise MissingFolder(msg)
    ending = description.file_ending
    return [replace(each, previous_stage=os.fspath(Path(folder, each.name + ending))) for each in files]


def wanted_of(
    files: Sequence[ImageFiles],
    num_parts: int,
    part_id: int,
    file_ending: str,
    *,
    overwrite: bool,
    with_probabilities: bool,
) -> tuple[list[ImageFiles], int]:
    """The cases of a part that are to be predicted.

    Args:
        files: all cases.
        num_parts: see :func:`~.cases.check_part`.
        part_id: likewise.
        file_ending: of the dataset.
        overwrite: ``False`` leaves out what was written before.
        with_probabilities: whether that has probabilities too.

    Returns:
        The cases; and how many besides are left out.
    """
    ours = part(files, num_parts, part_id)
    wanted = [
        each
        for each in ours
        if overwrite
        or each.target is None
        or not is_there(each.target, file_ending, with_probabilities=with_probabilities)
    ]
    return wanted, len(ours) - len(wanted)


def file_case(files: ImageFiles, description: Description, *, with_probabilities: bool) -> Case:
    """A case from files; what is wrong with them alone is the case's fault.

    Args:
        files: are sent as they are.
        description: of the model.
        with_probabilities: whether they are wanted too.

    Raises:
        NotServed: a server does not write the dataset's files.
    """
    try:
        options = placement(description.reader, files.files)
    except ClientError as error:
        return Case(files.name, list(files.files), note=files, fault=error)
    if files.target is not None:
        options |= options_for(description.file_ending, with_probabilities=with_probabilities)
    else:
        options |= {"output_format": "npz", "save_probabilities": with_probabilities}
        if description.reader.endswith("WithReorient"):
            options["properties"] = True
    return Case(files.name, list(files.files), options, note=files, previous_stage=files.previous_stage)


def finish_files(case: Case, answer: Answer, description: Description, *, with_probabilities: bool) -> Any:
    """Write or return a result.

    Returns:
        Labels (Z, Y, X), or those and probabilities (C, Z, Y, X); ``None`` if they were written.

    Raises:
        UnwritableFile: a file cannot be written.
        BadAnswer: something is missing in the answer.
    """
    files: ImageFiles = case.note
    if files.target is None:
        return result_arrays(answer, with_probabilities=with_probabilities)
    write_prediction(
        answer,
        files.target,
        description.file_ending,
        with_probabilities=with_probabilities,
        reader=description.reader,
        spacing=tiff_spacing(files.files) if "spacing" in case.options else None,
    )
    return None


def _places(output: Path_ | Sequence[Path_] | None, names: Sequence[str]) -> tuple[str | None, list[str | None]]:
    """The folder for the files beside the predictions, and each case's path without ending."""
    if output is None:
        return None, [None] * len(names)
    if isinstance(output, str | os.PathLike):
        folder = os.fspath(output)
        return folder, [os.path.join(folder, name) for name in names]  # noqa: PTH118 (strings, as nnU-Net's)
    if len(output) != len(names):
        msg = f"{len(output)} output files for {len(names)} cases"
        raise WrongUse(msg)
    paths = [os.fspath(each) for each in output]
    return (os.path.dirname(paths[0]) or os.curdir if paths else None), [*paths]  # noqa: PTH120
