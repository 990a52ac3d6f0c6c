"""Which way one model's logits are exported: as the request, its plan and its device need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from ..errors import BadOption
from ..label_manager import decides_as_default
from ..options import ExportMethod
from ..resampling import is_somebodys_own
from ..volume import LabelArray
from . import dense, nearest, probabilities, sparse, stock, streamed
from .canvas import Canvas, crop_box, to_image
from .grid import TrainedModel, resampling_of
from .rules import ArgMax, Regions, rule_of

_CPU = torch.device("cpu")


def label_map(
    model: TrainedModel,
    logits: torch.Tensor,
    properties: Mapping[str, Any],
    method: ExportMethod = ExportMethod.EXACT,
    deadline: float | None = None,
) -> LabelArray:
    """The segmentation of one case.

    Args:
        model: its plans, configuration and labels.
        logits: float16 or float32 (classes, z, y, x) on the network's grid, in the plan's axis order; left as they are.
        properties: nnU-Net's ``data_properties`` from preprocessing.
        method: ``EXACT`` gives what ``convert_predicted_logits_to_segmentation_with_correct_shape`` gives.
        deadline: ``time.monotonic()`` after which it is given up.

    Returns:
        Labels (Z, Y, X) on the input's grid, uint8, or uint16 if one is above 254.

    Raises:
        BadOption: a label manager or a resampling function of the model's own knows no other method than ``EXACT``.
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    if not exports_as_default(model):
        if method is not ExportMethod.EXACT:
            msg = "export: this model's own way from logits to labels allows exact only"
            raise BadOption(msg)
        return stock.label_map(model, logits, properties)
    rule, resampling = _rule(model, logits), resampling_of(model, logits, properties)
    canvas = Canvas(model, rule, properties)
    if method is ExportMethod.NEAREST:
        nearest.export(logits.cpu(), resampling, rule, canvas, deadline)
    elif method is ExportMethod.LINEAR:
        by_torch = replace(resampling, function=streamed.linear(resampling), together=1)
        streamed.export(logits, by_torch, rule, canvas, deadline)
    elif resampling.taps is None:
        streamed.export(logits, resampling, rule, canvas, deadline)
    elif logits.device == _CPU:
        sparse.export(logits, resampling.taps, rule, canvas, deadline)
    else:
        dense.export(logits, resampling.taps, rule, canvas, deadline)
    return canvas.finish()


def label_map_and_probabilities(
    model: TrainedModel,
    logits: torch.Tensor,
    properties: Mapping[str, Any],
    chosen: Sequence[int] | None = None,
    dtype: type[np.float32 | np.float16] = np.float32,
    deadline: float | None = None,
) -> tuple[LabelArray, probabilities.Probabilities]:
    """The segmentation of one case, and how probable each class is.

    Args:
        model: as in :func:`label_map`.
        logits: as in :func:`label_map`.
        properties: as in :func:`label_map`.
        chosen: channels of the network, in the order in which they are wanted; ``None`` takes all.
        dtype: of the probabilities.
        deadline: ``time.monotonic()`` after which it is given up.

    Returns:
        Labels as in :func:`label_map`, except where two classes' probabilities are equal although their logits are
        not (stock takes the first); and probabilities (channels, Z, Y, X) on the input's grid, stock's to the bit in
        float32, those rounded in float16.

    Raises:
        NonFiniteLogits: a logit is NaN or infinite.
    """
    channels = range(len(logits)) if chosen is None else chosen
    resampling = resampling_of(model, logits, properties)
    if not exports_as_default(model) or not resampling.known:
        labels, every = stock.label_map_and_probabilities(model, logits, properties)
        return labels, cast("probabilities.Probabilities", every[list(channels)].astype(dtype, copy=False))
    rule = _rule(model, logits)
    canvas = Canvas(model, rule, properties)
    out: probabilities.Probabilities = probabilities.blank(rule, channels, properties["shape_before_cropping"], dtype)
    crop = out[:, *crop_box(properties)]
    probabilities.export(logits.cpu(), resampling, rule, canvas, channels, crop, deadline)
    return canvas.finish(), cast("probabilities.Probabilities", to_image(out, model))


def exports_as_default(model: TrainedModel) -> bool:
    """Whether nothing on the way from logits to labels is somebody's own code, which only stock's function calls."""
    return decides_as_default(model.labels) and not is_somebodys_own(model.configuration.resampling_fn_probabilities)


def _rule(model: TrainedModel, logits: torch.Tensor) -> ArgMax | Regions:
    rule = rule_of(model)
    if len(logits) != rule.classes:
        msg = f"the logits have {len(logits)} classes, the model has {rule.classes}"
        raise ValueError(msg)
    return rule
