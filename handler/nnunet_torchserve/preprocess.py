"""A volume onto the network's grid: transpose, crop, normalise, resample, as nnU-Net's own preprocessor does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .bundle import ModelBundle
from .cases import network_grid, too_thin_message
from .errors import TooThin
from .volume import Volume


@dataclass(frozen=True, slots=True)
class PreprocessedCase:
    """What the engine and the export need of a case.

    Attributes:
        data: float32 (C, z, y, x) on the network's grid, in the plan's axis order.
        properties: nnU-Net's ``data_properties`` of this case: spacing, crop box, shapes.
    """

    data: torch.Tensor
    properties: dict[str, Any]


def preprocess(bundle: ModelBundle, volume: Volume) -> PreprocessedCase:
    """Run the plan's preprocessor (``DefaultPreprocessor.run_case_npy``) in memory.

    Raises:
        TooThin: cropped to its nonzero region, the volume has no voxel left on an axis of the network's grid.
    """
    preprocessor = bundle.configuration.preprocessor_class(verbose=False)
    properties: dict[str, Any] = {"spacing": list(volume.geometry.spacing_zyx)}
    try:
        data, _, properties = preprocessor.run_case_npy(
            volume.array, None, properties, bundle.plans, bundle.configuration, bundle.dataset
        )
    except Exception as error:
        shape = properties.get("shape_after_cropping_and_before_resampling")
        spacing = [properties["spacing"][axis] for axis in bundle.plans.transpose_forward]
        if shape is not None and min(network_grid(bundle, shape, spacing)) < 1:
            raise TooThin(too_thin_message(shape, spacing)) from error
        raise
    return PreprocessedCase(torch.from_numpy(data), properties)
