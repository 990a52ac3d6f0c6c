"""The mean of several models' probabilities, and its labels: what ``nnUNetv2_ensemble`` makes of their files.

It sums float32 probabilities in the order of its folders, divides by their number, and decides by what is left. Here
no model's probabilities are ever there as a whole where they can be made voxel by voxel (:mod:`.probabilities`): one
block of the image after the other is resampled for every model, summed and decided. Where a model's function gives no
part of an image, where there are regions, or where the models have their axes in another order, one model's
probabilities are whole beside the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from ..volume import LabelArray
from . import probabilities
from .canvas import Canvas, crop_box, to_image, written
from .grid import Resampling, TrainedModel, resampling_of
from .labels import exports_as_default, label_map_and_probabilities
from .rules import ArgMax, check_finite, rule_of
from .threads import check, in_threads


@dataclass(frozen=True, slots=True)
class Predicted:
    """One member's share.

    Attributes:
        model: its plans, configuration and labels.
        logits: (classes, z, y, x) on its network's grid.
        properties: nnU-Net's ``data_properties`` of its preprocessing.
    """

    model: TrainedModel
    logits: torch.Tensor
    properties: Mapping[str, Any]


def labels_and_mean(
    members: Sequence[Predicted],
    channels: Sequence[int],
    dtype: type[np.float32 | np.float16] = np.float32,
    deadline: float | None = None,
) -> tuple[LabelArray, probabilities.Probabilities]:
    """What ``merge_files`` of ``nnunetv2.ensembling.ensemble`` writes.

    Args:
        members: of the ensemble, whose labels agree, in nnU-Net's order.
        channels: those whose mean is wanted, in this order.
        dtype: of that.
        deadline: ``time.monotonic()`` after which it is given up.

    Returns:
        Labels (Z, Y, X), and probabilities (len(channels), Z, Y, X), on the image's grid.

    Raises:
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    steps = [resampling_of(each.model, each.logits, each.properties) for each in members]
    if not in_blocks(members, steps):
        return _whole(members, channels, dtype, deadline)
    for each in members:
        check_finite(each.logits)
    first = members[0]
    rule = rule_of(first.model)
    canvas = Canvas(first.model, rule, first.properties)
    out: probabilities.Probabilities = probabilities.blank(
        rule, channels, first.properties["shape_before_cropping"], dtype
    )
    crop = out[:, *crop_box(first.properties)]
    shape, classes = steps[0].shape, len(first.logits)

    def block(span: tuple[int, int]) -> None:
        mean = probabilities.of_span(members[0].logits, steps[0], span)
        for each, step in zip(members[1:], steps[1:], strict=True):
            mean += probabilities.of_span(each.logits, step, span)
        mean /= len(members)
        probabilities.put(mean, span, shape, rule, canvas, channels, crop)

    in_threads(block, probabilities.shares(shape, classes), deadline)
    return canvas.finish(), cast("probabilities.Probabilities", to_image(out, first.model))


def in_blocks(members: Sequence[Predicted], steps: Sequence[Resampling]) -> bool:
    """Whether the mean can be made block by block: every model's can, and they have the same voxels in one order."""
    first = members[0]
    return all(
        step.taps is not None
        and exports_as_default(each.model)
        and isinstance(rule_of(each.model), ArgMax)
        and step.shape == steps[0].shape
        and list(each.model.plans.transpose_forward) == list(first.model.plans.transpose_forward)
        and crop_box(each.properties) == crop_box(first.properties)
        for each, step in zip(members, steps, strict=True)
    )


def _whole(
    members: Sequence[Predicted],
    channels: Sequence[int],
    dtype: type[np.float32 | np.float16],
    deadline: float | None,
) -> tuple[LabelArray, probabilities.Probabilities]:
    mean: npt.NDArray[np.float32] | None = None
    for each in members:
        check(deadline)
        _, every = label_map_and_probabilities(each.model, each.logits, each.properties, deadline=deadline)
        if mean is None:
            mean = np.ascontiguousarray(every, np.float32)
        else:
            mean += every
        del every
    if mean is None:
        msg = "an ensemble has members"
        raise ValueError(msg)
    mean /= len(members)
    labels = members[0].model.labels.convert_probabilities_to_segmentation(mean)
    return written(np.asarray(labels)), cast(
        "probabilities.Probabilities", mean[list(channels)].astype(dtype, copy=False)
    )
