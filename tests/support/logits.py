"""Logits on a network's grid, made up or predicted, and models and properties that go with them: input of the export.

All shapes are (z, y, x) in the plan's axis order; logits are float16 (C, z, y, x), as nnU-Net's predictor gives them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from . import stock
from .untrained import DEMO_MODEL

_STEEPNESS = 12.0
"""How much an organ's logit falls from its centre to its border."""

_HIGHEST = 10.0
_NOISE = 0.15


@dataclass(frozen=True, slots=True)
class ExportModel:
    """What the export needs of a model: a ``ModelBundle``'s attributes of these names."""

    plans: PlansManager
    configuration: ConfigurationManager
    labels: LabelManager


def export_model(
    classes: int | None = None,
    *,
    regions: Sequence[Sequence[int]] | None = None,
    spacing: Sequence[float] = (1.5, 1.5, 1.5),
) -> ExportModel:
    """The demo model's plans with other labels and another grid.

    Args:
        classes: with background; or else
        regions: the labels of each region, background apart; they are painted as 1, 2, ….
        spacing: mm, in the plan's axis order.
    """
    plans: dict[str, Any] = json.loads((DEMO_MODEL / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = list(spacing)
    dataset: dict[str, Any] = json.loads((DEMO_MODEL / "dataset.json").read_text())
    if regions is None:
        assert classes is not None
        dataset["labels"] = {"background": 0} | {f"part_{label}": label for label in range(1, classes)}
    else:
        dataset["labels"] = {"background": 0} | {f"region_{n}": list(labels) for n, labels in enumerate(regions, 1)}
        dataset["regions_class_order"] = list(range(1, len(regions) + 1))
    return export_model_of(plans, dataset, "3d_fullres")


def export_model_of(plans: dict[str, Any], dataset: dict[str, Any], configuration: str) -> ExportModel:
    """A model of the contents of plans.json and dataset.json, neither of which is changed."""
    manager = PlansManager(copy.deepcopy(plans))
    return ExportModel(manager, manager.get_configuration(configuration), manager.get_label_manager(dataset))


def properties_for(
    shape_before: Sequence[int], spacing: Sequence[float], bbox: Sequence[tuple[int, int]] | None = None
) -> dict[str, Any]:
    """nnU-Net's ``data_properties`` of a case.

    Args:
        shape_before: of the image in the plan's axis order, before it was cropped.
        spacing: mm in the image's own axis order (z, y, x).
        bbox: first voxel and the one after the last, for each axis; the whole image by default.
    """
    box = [(0, n) for n in shape_before] if bbox is None else list(bbox)
    return {
        "spacing": [float(size) for size in spacing],
        "shape_before_cropping": tuple(shape_before),
        "bbox_used_for_cropping": [[low, high] for low, high in box],
        "shape_after_cropping_and_before_resampling": tuple(high - low for low, high in box),
    }


def organs(classes: int, shape: Sequence[int], seed: int) -> torch.Tensor:
    """A body of smooth ellipsoids: class 0 is background, every other class one organ, and there is a little noise.

    Each logit falls with the distance from its organ's centre and is 0 on its surface, so ``organs(...)[1:]`` are
    logits of regions. Organs are as large whatever their number, so that many fill the body and few leave it empty.
    Only one class at a time is in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty((classes, *shape), dtype=torch.half)
    axes = [torch.linspace(0, 1, n).reshape([-1 if k == axis else 1 for k in range(3)]) for axis, n in enumerate(shape)]
    for number in range(classes):
        logit = _NOISE * torch.randn(tuple(shape), generator=generator)
        if number > 0:
            centre = 0.1 + 0.8 * torch.rand(3, generator=generator)
            radii = 0.05 + 0.12 * torch.rand(3, generator=generator)
            z, y, x = (((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True))
            logit += ((z + y + x).sqrt_().neg_().add_(1) * _STEEPNESS).clamp_(-_HIGHEST, _HIGHEST)
        logits[number] = logit
    return logits


def white_noise(classes: int, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Independent normal logits: every cell of the grid is a border between classes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty((classes, *shape), dtype=torch.half)
    for logit in logits:
        logit.copy_(torch.randn(tuple(shape), generator=generator))
    return logits


def predicted(
    model_folder: Path, images: Sequence[Path], fold: int = 0
) -> tuple[ExportModel, torch.Tensor, dict[str, Any]]:
    """Model, logits and properties of a case, by stock's predictor with one fold and without mirroring."""
    predictor = stock.loaded(model_folder, folds=(fold,), use_mirroring=False)
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    array, read = plans.image_reader_writer_class().read_images([str(image) for image in images])
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(
        array, None, {"spacing": read["spacing"]}, plans, configuration, predictor.dataset_json
    )
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu()
    return ExportModel(plans, configuration, predictor.label_manager), logits, properties
