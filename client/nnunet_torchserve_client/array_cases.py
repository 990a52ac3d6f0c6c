"""Arrays as nnU-Net's readers give them, on their way to a server and back, and into files.

An array lies somewhere only by what its properties say. Of most readers a server can be told that, and writes the file.
Others have ways of their own (NIfTI's affine; images that were turned): then nnU-Net's own writer is used, and nnunetv2
must be installed.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from .answers import Answer
from .bodies import PREVIOUS_STAGE
from .cases import TIFF_READER, output_format
from .client import Case
from .description import Description, Json
from .errors import (
    ClientError,
    MissingProperty,
    NotServed,
    PreprocessedInput,
    UnreadableFile,
    UnwritableFile,
    WrongUse,
)
from .outputs import write_aside, write_prediction
from .previous_stage import check_previous_stage, checked_labels
from .results import PREPROCESSED, PROPERTIES, result_arrays, stock_properties

Array = npt.NDArray[Any]

_PLACED_BY_SERVER = ("SimpleITKIO", "NaturalImage2DIO", TIFF_READER)

_IMAGE_AXES, _SPACE_AXES = 4, 3
_LETTERS = {"L": (0, 1.0), "R": (0, -1.0), "P": (1, 1.0), "A": (1, -1.0), "S": (2, 1.0), "I": (2, -1.0)}
"""nibabel's letters of what an axis runs towards -> axis and sign of that direction in ITK's LPS."""


@dataclass(frozen=True, slots=True)
class ArrayNote:
    """What is known of an array on its way.

    Attributes:
        properties: as the caller gave them.
        target: path of the result without its ending; ``None`` if it is to be returned.
        server_writes: whether the server writes the file.
    """

    properties: Mapping[str, Any] = field(repr=False)
    target: str | None
    server_writes: bool


def raw_items(images: Any, labels: Any, properties: Any, names: Any) -> Iterator[Json]:
    """What ``predict_from_data_iterator`` takes, of one image or of lists.

    Args:
        images: (C, Z, Y, X).
        labels: (1, Z, Y, X) of a cascade's first stage, of each; ``None`` for none.
        properties: of each.
        names: path of each result without its ending; ``None`` returns the results.

    Raises:
        WrongUse: lists of different lengths.
    """
    images, properties = _listed(images), _listed(properties)
    names = [None] * len(images) if names is None else _listed(names)
    labels = [None] * len(images) if labels is None else _listed(labels)
    if not len(images) == len(properties) == len(names) == len(labels):
        msg = (
            f"{len(images)} images, {len(properties)} properties, {len(names)} output files and {len(labels)} "
            "segmentations of a previous stage: one for each image"
        )
        raise WrongUse(msg)
    items = zip(images, labels, properties, names, strict=True)
    return (
        {"data": image, "data_properties": _as_read(known), "ofile": name, PREVIOUS_STAGE: before}
        for image, before, known, name in items
    )


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _as_read(properties: Any) -> Any:
    """Properties without what nnU-Net's preprocessing has put into the caller's own dict, in an earlier call of it."""
    if not isinstance(properties, Mapping):
        return properties
    return {name: value for name, value in properties.items() if name not in PREPROCESSED}


def array_case(number: int, item: Mapping[str, Any], description: Description, *, with_probabilities: bool) -> Case:
    """A case from an item of a data iterator; what is wrong with this item alone is the case's fault.

    Args:
        number: of the item, by which it is called where it has no output file.
        item: ``data`` (C, Z, Y, X), ``data_properties``, ``ofile``; ``previous_stage`` (1, Z, Y, X) or nothing.
        description: of the model.
        with_probabilities: whether they are wanted too.

    Raises:
        PreprocessedInput: nnU-Net has preprocessed it, and the others most likely too.
        NotServed: a server does not write the dataset's files.
        WrongPreviousStage: labels of a first stage for a model that takes none, or none for one that needs them.
    """
    target = item.get("ofile")
    name = Path(target).name if isinstance(target, str | os.PathLike) else f"image {number}"
    check_previous_stage(description, given=item.get(PREVIOUS_STAGE) is not None)
    try:
        return _case(name, item, description, with_probabilities=with_probabilities)
    except (PreprocessedInput, NotServed):
        raise
    except ClientError as error:
        return Case(name, b"", fault=error)


def _case(name: str, item: Mapping[str, Any], description: Description, *, with_probabilities: bool) -> Case:
    """See :func:`array_case`.

    Raises:
        MissingProperty: the item lacks something.
        WrongUse: it is no such image.
        WrongPreviousStage: labels that do not fit the image.
        UnreadableFile: it is the path of a file that holds none.
    """
    missing = [name for name in ("data", "data_properties", "ofile") if name not in item]
    if missing:
        msg = f"an item of the iterator has no {' and no '.join(missing)}"
        raise MissingProperty(msg)
    properties, target = item["data_properties"], item["ofile"]
    if not isinstance(properties, Mapping) or not isinstance(target, str | os.PathLike | None):
        msg = "data_properties is a dict, and ofile a path without ending, or None"
        raise WrongUse(msg)
    if any(name in properties for name in PREPROCESSED):
        msg = (
            "this case was preprocessed by nnU-Net: a server takes images as they were read, and preprocesses them. "
            "Give it those, with get_data_iterator_from_raw_npy_data or predict_from_files"
        )
        raise PreprocessedInput(msg)
    array = _image(item["data"])
    labels = item.get(PREVIOUS_STAGE)
    labels = None if labels is None else checked_labels(labels, array)
    spacing = _spacing(properties)
    placed = {} if target is None else _placement(description.reader, properties)
    by_server = (
        description.reader in _PLACED_BY_SERVER
        and description.input_orientation is None
        and _lies_as_it_is_spaced(spacing, placed)
    )
    options: dict[str, object] = {"spacing": spacing[::-1]}
    if target is not None and by_server:
        ending = description.file_ending
        options |= {"output_format": output_format(ending)} | placed
        if with_probabilities:
            options |= {"save_probabilities": True, "properties": True}
    else:
        options |= {"output_format": "npz", "save_probabilities": with_probabilities}
        if target is not None and with_probabilities:
            options["properties"] = True
        options |= _orientation(description, properties)
    note = ArrayNote(properties, None if target is None else os.fspath(target), by_server)
    return Case(name, array, options, note, previous_stage=labels)


def finish_array(case: Case, answer: Answer, description: Description, *, with_probabilities: bool) -> Any:
    """Write or return a result.

    Returns:
        Labels (Z, Y, X), or those and probabilities (C, Z, Y, X); ``None`` if they were written.

    Raises:
        UnwritableFile: a file cannot be written.
        BadAnswer: something is missing in the answer.
        NotServed: nnU-Net's own writer is needed, and nnunetv2 is not installed.
    """
    note: ArrayNote = case.note
    if note.target is None:
        return result_arrays(answer, with_probabilities=with_probabilities)
    if note.server_writes:
        write_prediction(
            answer,
            note.target,
            description.file_ending,
            with_probabilities=with_probabilities,
            reader=description.reader,
            spacing=list(note.properties["spacing"]),
            properties=note.properties,
        )
    else:
        _write_by_nnunet(answer, note, description, with_probabilities=with_probabilities)
    return None


def direction_towards(letters: str) -> list[float]:
    """ITK's direction, row by row, of an image whose axes x, y, z run towards these.

    Args:
        letters: nibabel's, as ``RAS``.
    """
    matrix = np.zeros((3, 3))
    for column, letter in enumerate(letters):
        axis, sign = _LETTERS[letter]
        matrix[axis, column] = sign
    return [float(number) for number in matrix.ravel()]


def _image(data: Any) -> Array:
    """The numbers of an item, (C, Z, Y, X)."""
    if isinstance(data, str):  # nnU-Net's own way to hand over what is too large for a pipe: it removes the file too
        path = Path(data)
        try:
            data = np.load(path, allow_pickle=False)
            path.unlink()
        except (OSError, ValueError) as error:
            msg = f"{path} cannot be read as an array"
            raise UnreadableFile(msg) from error
    if hasattr(data, "detach"):
        data = data.detach().cpu().numpy()  # a tensor; PyTorch is loaded already
    if not isinstance(data, np.ndarray) or data.ndim != _IMAGE_AXES:
        shape = f"of shape {data.shape}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
        msg = f"an image is an array (C, Z, Y, X), as nnU-Net's readers give it; this one is {shape}"
        raise WrongUse(msg)
    return data


def _spacing(properties: Mapping[str, Any]) -> list[float]:
    """Millimetres along z, y, x."""
    if "spacing" not in properties:
        msg = "the properties of an array have its spacing: mm along z, y, x"
        raise MissingProperty(msg)
    try:
        spacing = [float(size) for size in properties["spacing"]]
    except (TypeError, ValueError):
        spacing = []
    if len(spacing) != _SPACE_AXES or not all(0 < size < np.inf for size in spacing):
        msg = "a spacing is three numbers above 0: mm along z, y, x"
        raise WrongUse(msg)
    return spacing


def _placement(reader: str, properties: Mapping[str, Any]) -> dict[str, object]:
    """Where the file that the server writes shall lie: as nnU-Net's ``write_seg`` would have it."""
    if reader != "SimpleITKIO":
        return {}
    try:
        itk = properties["sitk_stuff"]
        return {name: [float(number) for number in itk[name]] for name in ("spacing", "origin", "direction")}
    except (KeyError, TypeError, ValueError) as error:
        msg = "the properties of an array that becomes a file have what SimpleITKIO's read_images puts in sitk_stuff"
        raise MissingProperty(msg) from error


def _orientation(description: Description, properties: Mapping[str, Any]) -> dict[str, object]:
    """What a server that turns images must know of an array: how it lies.

    Readers that reorient have turned it already, and a plane is not turned. Of the others, those of NIfTI files say how
    it lies. A stack of pictures is taken as a server takes its file, along the patient's axes.

    Raises:
        MissingProperty: the properties do not say it.
    """
    letters, reader = description.input_orientation, description.reader
    if letters is None:
        return {}
    as_it_is: dict[str, object] = {"direction": direction_towards(letters)}
    if reader.endswith("WithReorient") or reader == "NaturalImage2DIO":
        return as_it_is
    try:
        if "sitk_stuff" in properties:
            direction = [float(number) for number in properties["sitk_stuff"]["direction"]]
            return {"direction": direction} if len(direction) == _SPACE_AXES**2 else as_it_is
        if "nibabel_stuff" in properties:
            return {"direction": _direction_of(properties["nibabel_stuff"]["original_affine"])}
    except (KeyError, TypeError, ValueError, IndexError) as error:
        msg = f"the properties of an array do not say how it lies as those of nnU-Net's {reader} do"
        raise MissingProperty(msg) from error
    if reader == TIFF_READER:
        return {}
    msg = (
        f"this model takes images that run towards {letters}, and is told how an array lies by what nnU-Net's {reader} "
        "puts in its properties (sitk_stuff, nibabel_stuff): it is not there"
    )
    raise MissingProperty(msg)


def _direction_of(affine: Any) -> list[float]:
    """ITK's direction, row by row, of an affine of NIfTI's (RAS)."""
    axes = np.diag([-1.0, -1.0, 1.0]) @ np.asarray(affine, np.float64)[:3, :3]
    return [float(number) for number in (axes / np.linalg.norm(axes, axis=0)).ravel()]


def _lies_as_it_is_spaced(spacing: list[float], placed: Mapping[str, Any]) -> bool:
    """Whether the file will have the spacing that the array has.

    nnU-Net predicts with the array's and writes with that of ``sitk_stuff``; one request has one.

    Args:
        spacing: of the array, mm along z, y, x.
        placed: of the file; of a plane its spacing has x and y only.
    """
    along = placed.get("spacing")
    return along is None or spacing[-len(along) :] == along[::-1]


def _write_by_nnunet(answer: Answer, note: ArrayNote, description: Description, *, with_probabilities: bool) -> None:
    """Write the files of a case with nnU-Net's own writer."""
    try:
        from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
    except ImportError as error:
        msg = f"arrays of {description.reader} are written by nnU-Net's own writer: install nnunetv2, or predict files"
        raise NotServed(msg) from error
    found = result_arrays(answer, with_probabilities=with_probabilities)
    labels, probabilities = found if with_probabilities else (found, None)
    target = str(note.target)
    if probabilities is not None:
        known = stock_properties(json.loads(answer.parts()[PROPERTIES]))
        properties: Json = {**note.properties, **{name: known[name] for name in PREPROCESSED if name in known}}
        write_aside(f"{target}.npz", lambda file: np.savez_compressed(file, probabilities=probabilities))
        write_aside(f"{target}.pkl", lambda file: pickle.dump(properties, file))
    place = Path(target + description.file_ending)
    try:
        # a folder of its own: nobody takes an unfinished file for the dataset's, and writers may put more beside it
        with TemporaryDirectory(prefix=".", suffix=".part", dir=place.parent) as aside:
            writer = recursive_find_reader_writer_by_name(description.reader)()
            writer.write_seg(labels, os.path.join(aside, place.name), dict(note.properties))  # noqa: PTH118
            written = sorted(Path(aside).iterdir(), key=lambda file: file.name == place.name)  # the labels last
            for file in written:
                with file.open("rb") as content:
                    os.fsync(content.fileno())
                file.replace(place.with_name(file.name))
    except KeyError as error:
        msg = f"the properties of an array that becomes a file have what {description.reader} puts in them"
        raise MissingProperty(msg) from error
    except (OSError, RuntimeError) as error:
        msg = f"{place} cannot be written"
        raise UnwritableFile(msg) from error
