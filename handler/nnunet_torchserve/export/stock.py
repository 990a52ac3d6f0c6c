"""Export by nnU-Net's own function, which calls somebody's label manager or resampling function as it always does.

They get an array, as from ``nnUNetv2_predict`` (``predict_from_data_iterator``); of nnU-Net's methods,
``predict_single_npy_array`` and ``predict_from_files_sequential`` give them a tensor.
"""

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
    """Labels (Z, Y, X) and probabilities (C, Z, Y, X) of all classes."""
    labels, probabilities = _convert(model, logits, properties, probabilities=True)
    return written(labels), probabilities


def _convert(model: TrainedModel, logits: torch.Tensor, properties: Mapping[str, Any], *, probabilities: bool) -> Any:
    """How torch splits its work among threads may decide the last bit, so it runs on as many as stock's."""
    check_finite(logits)
    threads = torch.get_num_threads()
    try:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.cpu().numpy(),
            model.plans,
            model.configuration,
            model.labels,
            properties,
            return_probabilities=probabilities,
            num_threads_torch=STOCK_THREADS,
        )
    finally:
        torch.set_num_threads(threads)  # which stock forgets when it fails
