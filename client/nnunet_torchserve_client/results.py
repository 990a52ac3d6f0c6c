"""What an answer holds, as nnU-Net has it: arrays on the grid that its readers see, properties in its types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .answers import Answer, arrays_of
from .arrays import Array
from .errors import BadAnswer

Json = dict[str, Any]

PREPROCESSED = ("shape_before_cropping", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling")
"""What nnU-Net's preprocessing adds to the properties of a case."""

PROPERTIES = "properties.json"
PROBABILITIES = "probabilities.npz"
"""Of a server's zip."""


def result_arrays(answer: Answer, *, with_probabilities: bool) -> Any:
    """Labels (Z, Y, X), or those and probabilities (C, Z, Y, X), on the grid that nnU-Net's reader sees.

    Raises:
        BadAnswer: something is missing in the answer.
    """
    parts = answer.parts()
    how: Mapping[str, list[int]] | None = None
    try:
        if PROPERTIES in parts:
            how = json.loads(parts.pop(PROPERTIES)).get("turn")
        arrays = {name: array for content in parts.values() for name, array in arrays_of(content, answer).items()}
        labels = turn(arrays["labels"], how)
        return (labels, turn(arrays["probabilities"], how)) if with_probabilities else labels
    except (KeyError, ValueError, TypeError) as error:
        msg = "the answer lacks an array that was asked for"
        raise BadAnswer(msg, case=answer.case, request_id=answer.request_id, server=answer.server) from error


def stock_properties(document: Mapping[str, Any]) -> Json:
    """``data_properties`` in the types that nnU-Net's readers and its preprocessing give them.

    Args:
        document: a server's ``properties.json``.
    """
    reader = str(document["reader"])
    said = document["properties"]
    found: Json = {}
    for name, value in said.items():
        if name == "sitk_stuff":
            found[name] = {key: tuple(each) if isinstance(each, list) else each for key, each in value.items()}
        elif name == "nibabel_stuff":
            found[name] = {key: np.array(each, np.float64) for key, each in value.items()}
        elif name == "spacing":
            found[name] = _stock_spacing(reader, value)
        elif name.startswith("shape_"):
            found[name] = tuple(value)
        else:
            found[name] = value
    return found


def _stock_spacing(reader: str, spacing: list[Any]) -> object:
    if reader.startswith("SimpleITKIO"):
        return [np.float64(size) for size in spacing]
    return tuple(spacing) if reader == "NaturalImage2DIO" else spacing


def turn(array: Array, how: Mapping[str, list[int]] | None) -> Array:
    """An array on the image's own grid as nnU-Net's reorienting readers see it.

    Args:
        array: (C, Z, Y, X) or (Z, Y, X).
        how: a server's ``turn``; ``None`` leaves it as it is.
    """
    if how is None:
        return array
    first = array.ndim - len(how["axes"])
    order = [*range(first), *(first + axis for axis in how["axes"])]
    turned: Array = np.flip(array.transpose(order), tuple(first + axis for axis in how["flip"]))
    return turned
