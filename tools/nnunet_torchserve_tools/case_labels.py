"""Somebody's labels of an image, on the image's own grid, or refused: they judge answers, so they must lie right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_torchserve.codecs import open_image, open_labels
from nnunet_torchserve.errors import LONGEST_NAMES, RequestError
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.options import parse_options
from nnunet_torchserve.painting import integers
from nnunet_torchserve.postprocessing import LARGEST_LABEL
from nnunet_torchserve.previous_stage import grid_differences
from nnunet_torchserve.volume import LabelArray

from .errors import ToolError
from .validation_cases import ValidationCase, read_bytes


def read_labels(case: ValidationCase, parts: Mapping[str, Any], lead: Member, limits: Limits) -> LabelArray:
    """The labels (Z, Y, X), uint16, of a case that has some.

    Args:
        case: the case.
        parts: the fields of its request.
        lead: the model, whose reader's conventions are followed.
        limits: of the files.

    Raises:
        UsageError: the file cannot be read.
        ToolError: they are damaged, lie elsewhere, or hold what is no label of the model's.
    """
    if case.labels is None:
        msg = f"case {case.name} has no labels"
        raise ValueError(msg)
    options = parse_options(json.dumps(case.options(lead.reader)).encode())
    try:
        image = open_image((next(iter(parts.values())),), limits, lead.reader, options.placement)
        source = open_labels(read_bytes(case.labels), limits, lead.reader, image.geometry)
        differences = list(grid_differences(source.geometry, image.geometry))
        if source.channels != 1 or differences:
            reason = "; ".join(differences) or f"{source.channels} channels"
            msg = f"the labels of case {case.name} do not lie on the image's grid: they have {reason}"
            raise ToolError(msg)
        values = source.read()[0]
    except RequestError as error:
        msg = f"the labels of case {case.name}: {error}"
        raise ToolError(msg) from error
    if not (values.min() >= 0 and values.max() <= LARGEST_LABEL and np.array_equal(values, np.rint(values))):
        msg = f"the labels of case {case.name} hold other values than whole numbers from 0"
        raise ToolError(msg)
    labels: LabelArray = values.astype(np.uint16)
    known = {number for value in lead.dataset["labels"].values() for number in integers(value)}
    if strange := sorted(set(np.unique(labels).tolist()) - known):
        msg = (
            f"the labels of case {case.name} hold {strange[0]}, which the model's dataset.json does not have; it has "
            + ", ".join(map(str, sorted(known)))[:LONGEST_NAMES]
        )
        raise ToolError(msg)
    return labels
