"""Export by nnU-Net's own function, for label managers that are not nnU-Net's default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from ..tiling import STOCK_THREADS
from ..volume import LabelArray
from .canvas import written
from .grid import TrainedModel
from .rules import check_finite


def label_map(model: TrainedModel, logits: torch.Tensor, properties: Mapping[str, Any]) -> LabelArray:
    """Labels (Z, Y, X)."""
    return written(_convert(model, logits, properties, probabilities=False))


def label_map_and_probabilities(
    model: TrainedModel, logits: torch.Tensor, properties: Mapping[str, Any]
) -> tuple[LabelArray, npt.NDArray[np.float32]]:
    """Labels (Z, Y, X) and probabilities (C, Z, Y, X) of all classes.

    How torch splits a softmax among threads decides its last bit, so it runs on as many as stock's.
    """
    labels, probabilities = _convert(model, logits, properties, probabilities=True)
    return written(labels), probabilities


def _convert(model: TrainedModel, logits: torch.Tensor, properties: Mapping[str, Any], *, probabilities: bool) -> Any:
    check_finite(logits)
    threads = torch.get_num_threads()
    try:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.cpu(),
            model.plans,
            model.configuration,
            model.labels,
            properties,
            return_probabilities=probabilities,
            num_threads_torch=STOCK_THREADS if probabilities else threads,
        )
    finally:
        torch.set_num_threads(threads)  # which stock forgets when it fails
