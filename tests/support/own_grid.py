"""Models with somebody's own trainer and resampling: what a case takes is known only when its image is on the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .odd_models import OddModel

TRAINER = "nnUNetTrainerMine"
FILE = "mine.py"

_TEXT = """
import torch
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_simple
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def finer_grid(data, new_shape, current_spacing, new_spacing):
    return resample_torch_simple(data, [GROWTH * n for n in new_shape])


class Mine(torch.nn.Module):
    def __init__(self, inputs, outputs, dimensions):
        super().__init__()
        convolution = torch.nn.Conv2d if dimensions == 2 else torch.nn.Conv3d
        self.first = convolution(inputs, 6, 3, padding=1)
        self.last = convolution(6, outputs, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


class nnUNetTrainerMine(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return Mine(num_input_channels, num_output_channels, len(configuration_manager.patch_size))
"""


def own_code(folder: Path, growth: int) -> Path:
    """The file, whose resampling makes images so many times larger along each axis than the plans say."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(_TEXT.replace("GROWTH", str(growth)))
    return folder / FILE


def write(model: OddModel, folder: Path, file: Path, *, own_grid: bool = True) -> Path:
    """A folder of the model, of the file's trainer, and with its resampling."""

    def change(plans: dict[str, Any]) -> None:
        for configuration in plans["configurations"].values():
            configuration |= {"resampling_fn_data": "finer_grid", "resampling_fn_data_kwargs": {}}

    changed = model.but(trainer=TRAINER, change_plans=change) if own_grid else model.but(trainer=TRAINER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(file.parent))
        return changed.write(folder)
