"""Export by nnU-Net's own function: resample every class, argmax or threshold, undo the crop and the transpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from ..bundle import ModelBundle
from ..tiling import STOCK_THREADS
from ..volume import Geometry, LabelArray, LabelMap

_UINT8_LABELS = 255
"""``SimpleITKIO.write_seg`` writes uint8 while the largest label is below this."""


def export(
    bundle: ModelBundle, logits: torch.Tensor, properties: dict[str, Any], geometry: Geometry, *, probabilities: bool
) -> LabelMap:
    """The label map that ``nnUNetPredictor`` would have written.

    Args:
        bundle: the model.
        logits: float16 (classes, z, y, x) on the network's grid.
        properties: nnU-Net's ``data_properties`` from preprocessing.
        geometry: the input's grid.
        probabilities: also give float32 (classes, Z, Y, X) on the input's grid. How torch splits a softmax among
            threads decides its last bit, so it runs on as many as stock's.
    """
    threads = torch.get_num_threads()
    try:
        answer = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            bundle.plans,
            bundle.configuration,
            bundle.labels,
            properties,
            return_probabilities=probabilities,
            num_threads_torch=STOCK_THREADS if probabilities else threads,
        )
    finally:
        torch.set_num_threads(threads)  # which stock forgets when it fails
    labels, class_probabilities = answer if probabilities else (answer, None)
    wide = labels.size > 0 and int(labels.max()) >= _UINT8_LABELS
    array: LabelArray = labels.astype(np.uint16 if wide else np.uint8, copy=False)
    return LabelMap(array, geometry, class_probabilities)
