"""Logits with what an export needs beside them, and the label map that each side makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from nnunet_torchserve.export import label_map, sparse
from nnunet_torchserve.export.grid import resampling_of
from nnunet_torchserve.export.rules import MIXED, rule_of
from nnunet_torchserve.options import ExportMethod
from nnunet_torchserve.taps import Taps, linear_taps
from support.logits import ExportModel, export_model_of, properties_for

Labels = npt.NDArray[np.integer[Any]]


class Side(StrEnum):
    """Who exports."""

    STOCK = "stock"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Export:
    """What an export gets.

    Attributes:
        model: plans, configuration and labels.
        logits: float16 (C, z, y, x).
        properties: nnU-Net's ``data_properties``.
    """

    model: ExportModel
    logits: torch.Tensor
    properties: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write everything for :meth:`load`."""
        plans, labels = self.model.plans, self.model.labels
        [configuration] = [
            name
            for name in plans.available_configurations
            if plans.get_configuration(name).configuration == self.model.configuration.configuration
        ]
        dataset = {"labels": labels.label_dict, "regions_class_order": labels.regions_class_order}
        folder.mkdir()
        np.save(folder / "logits.npy", self.logits.numpy())
        described = {"plans": plans.plans, "dataset": dataset, "configuration": configuration}
        (folder / "model.json").write_text(json.dumps(described))
        (folder / "properties.json").write_text(json.dumps(self.properties, default=int))

    @classmethod
    def load(cls, folder: Path) -> Export:
        """What :meth:`save` wrote."""
        logits = torch.from_numpy(np.load(folder / "logits.npy"))
        properties = json.loads((folder / "properties.json").read_text())
        return cls(export_model_of(**json.loads((folder / "model.json").read_text())), logits, properties)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image's grid within the crop box, in the plan's axis order."""
        return tuple(self.properties["shape_after_cropping_and_before_resampling"])

    @property
    def spacings(self) -> tuple[list[float], list[float]]:
        """Of the network's grid and of the image's, mm, in the plan's axis order; as stock's export has them."""
        image = [self.properties["spacing"][axis] for axis in self.model.plans.transpose_forward]
        network = [float(size) for size in self.model.configuration.spacing]
        return (network if len(network) == len(image) else [image[0], *network]), image

    def mixed_share(self) -> float:
        """The share of cells of the network's grid whose corners leave their label open."""
        rule, taps = rule_of(self.model), resampling_of(self.model, self.logits, self.properties).taps
        assert taps is not None
        between = [_neighbours(each) if each.interpolates else linear_taps(each.size, each.size) for each in taps]
        return float(np.mean(sparse.cell_codes(sparse.encode(self.logits, rule)[0], between) == MIXED[rule.dtype]))

    def thinned(self) -> Export:
        """Every second voxel along each axis: an eighth of the work, and the same code."""
        shape = [math.ceil(size / 2) for size in self.shape]
        logits = self.logits[:, ::2, ::2, ::2].contiguous()
        return Export(self.model, logits, properties_for(shape, self.properties["spacing"]))

    def by(self, side: Side) -> Labels:
        """The label map (Z, Y, X) that one side makes of it."""
        return self.by_stock() if side is Side.STOCK else self.by_us()

    def by_stock(self) -> Labels:
        """nnU-Net's label map, on as many threads as ours."""
        model = self.model
        labels: Labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            self.logits,
            model.plans,
            model.configuration,
            model.labels,
            dict(self.properties),
            num_threads_torch=torch.get_num_threads(),
        )
        return labels

    def by_us(self, method: ExportMethod = ExportMethod.EXACT) -> Labels:
        """Our label map."""
        labels: Labels = label_map(self.model, self.logits, self.properties, method)
        return labels

    def one_class_by_stock(self, number: int) -> npt.NDArray[np.float16]:
        """The logits of a class on the image's grid, by the plan's resampling function."""
        logits = self.logits[number : number + 1]
        resampled = self.model.configuration.resampling_fn_probabilities(logits, self.shape, *self.spacings)
        one: npt.NDArray[np.float16] = np.asarray(resampled)[0]
        return one


def _neighbours(taps: Taps) -> Taps:
    """Half-way between an axis's inputs: one output for each cell."""
    before = np.arange(max(1, taps.size - 1))
    half = np.full(len(before), 0.5)
    return Taps(taps.size, before, np.minimum(before + 1, taps.size - 1), half, half)
