"""Model folders of kinds that nobody trains for a test: small networks with random weights, any plans."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from .untrained import DEMO_MODEL

Json = dict[str, Any]

LABELS: Json = {"background": 0, "low": 1, "middle": 2, "high": 3}


RESIDUAL_BLOCKS = (1, 3, 4)
"""Of the first stages: ``ResEncUNetPlanner.UNet_blocks_per_stage_encoder``."""


def architecture(dimensions: int, features: Sequence[int] = (4, 8), *, residual: bool = False) -> Json:
    """The section of a plan that describes a U-Net."""
    stages = len(features)
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * stages,
            "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
            blocks: list(RESIDUAL_BLOCKS[:stages]) if residual else [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _nothing(_: object) -> None:
    pass


def old_format(plans: Json) -> None:
    """The plan as nnU-Net 2.0 to 2.2 wrote it."""
    [configuration] = plans["configurations"].values()
    built = configuration.pop("architecture")["arch_kwargs"]
    stages = built.get("n_blocks_per_stage") or built["n_conv_per_stage"]
    configuration |= {
        "UNet_class_name": "ResidualEncoderUNet" if "n_blocks_per_stage" in built else "PlainConvUNet",
        "UNet_base_num_features": built["features_per_stage"][0],
        "unet_max_num_features": built["features_per_stage"][-1],
        "n_conv_per_stage_encoder": stages,
        "n_conv_per_stage_decoder": built["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [1] * len(configuration["patch_size"]),
        "pool_op_kernel_sizes": built["strides"],
        "conv_kernel_sizes": built["kernel_sizes"],
    }


def resampled_by(name: str, **how: object) -> Callable[[Json], None]:
    """Plans that name a function for everything, with arguments of its own."""

    def change(plans: Json) -> None:
        for configuration in plans["configurations"].values():
            for what in ("data", "seg", "probabilities"):
                arguments = how | ({"is_seg": what == "seg"} if how else {})
                configuration |= {f"resampling_fn_{what}": name, f"resampling_fn_{what}_kwargs": arguments}

    return change


@dataclass(frozen=True)
class OddModel:
    """What to write.

    Attributes:
        dimensions: of the network.
        channels: names of the images.
        schemes: normalisation of each of them.
        labels: of dataset.json.
        intensities: the fingerprint of each channel; the demo model's if it is empty.
        more_dataset: overrides of dataset.json.
        change_plans: changes plans.json, after the network was built by the plans as they were.
        trainer: whose network it is.
        folds: each with other weights.
        checkpoint: file name.
        change_weights: changes each fold's state dict.
        residual: a network with residual blocks.
        features: of each stage of the network.
        spacing: mm of the network's grid.
        named: the configuration's name, where it is not that of the dimensions.
        previous_stage: the configuration of a cascade's first stage.
        mirroring: axes that the checkpoint allows.
        transposed: ``transpose_forward``.
        masked: whether normalisation looks at the nonzero region only.
        plans_name: of its planner.
    """

    dimensions: int = 3
    channels: tuple[str, ...] = ("MR",)
    schemes: tuple[str, ...] = ("ZScoreNormalization",)
    labels: Json = field(default_factory=lambda: LABELS)
    intensities: tuple[Json, ...] = ()
    more_dataset: Json = field(default_factory=dict)
    change_plans: Callable[[Json], None] = _nothing
    trainer: str = "nnUNetTrainer"
    folds: tuple[int | str, ...] = (0,)
    checkpoint: str = "checkpoint_final.pth"
    change_weights: Callable[[dict[str, torch.Tensor]], None] = _nothing
    residual: bool = False
    features: tuple[int, ...] = (4, 8)
    spacing: float = 1.5
    reader: str = "SimpleITKIO"
    named: str | None = None
    previous_stage: str | None = None
    mirroring: tuple[int, ...] | None = None
    transposed: tuple[int, int, int] = (0, 1, 2)
    masked: bool = False
    plans_name: str = "nnUNetPlans"

    def but(self, **changes: Any) -> OddModel:
        """The same with other attributes."""
        return replace(self, **changes)

    @property
    def configuration(self) -> str:
        """nnU-Net's name for it."""
        return self.named or ("3d_fullres" if self.dimensions == 3 else "2d")

    def plans(self) -> Json:
        """As the network is built by them."""
        plans: Json = json.loads((DEMO_MODEL / "plans.json").read_text())
        configuration = copy.deepcopy(plans["configurations"]["3d_fullres"]) | {
            "data_identifier": f"{self.plans_name}_{self.configuration}",
            "patch_size": [16] * self.dimensions,
            "spacing": [self.spacing] * self.dimensions,
            "median_image_size_in_voxels": [24] * self.dimensions,
            "normalization_schemes": list(self.schemes),
            "use_mask_for_norm": [self.masked] * len(self.channels),
            "architecture": architecture(self.dimensions, self.features, residual=self.residual),
        }
        if self.previous_stage is not None:
            configuration["previous_stage"] = self.previous_stage
        known = plans["foreground_intensity_properties_per_channel"]["0"]
        intensities = self.intensities or (known,) * len(self.channels)
        return plans | {
            "dataset_name": "Dataset950_Odd",
            "plans_name": self.plans_name,
            "image_reader_writer": self.reader,
            "transpose_forward": list(self.transposed),
            "transpose_backward": [self.transposed.index(axis) for axis in range(3)],
            "configurations": {self.configuration: configuration},
            "foreground_intensity_properties_per_channel": {str(k): each for k, each in enumerate(intensities)},
        }

    def dataset(self) -> Json:
        """dataset.json."""
        named = {str(number): name for number, name in enumerate(self.channels)}
        document = {"channel_names": named, "labels": self.labels, "numTraining": 5, "file_ending": ".nii.gz"}
        return document | self.more_dataset

    def write(self, folder: Path) -> Path:
        """Make nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder."""
        model = folder / "Dataset950_Odd" / f"{self.trainer}__{self.plans_name}__{self.configuration}"
        model.mkdir(parents=True)
        plans, dataset = self.plans(), self.dataset()
        (model / "dataset.json").write_text(json.dumps(dataset))
        for seed, fold in enumerate(self.folds):
            weights = _network(plans, dataset, self.configuration, self.trainer, seed)
            self.change_weights(weights)
            checkpoint = {
                "network_weights": weights,
                "_best_ema": np.float64(0.5),
                "init_args": {"configuration": self.configuration, "fold": fold},
                "trainer_name": self.trainer,
                "inference_allowed_mirroring_axes": self.mirroring,
            }
            (model / f"fold_{fold}").mkdir()
            torch.save(checkpoint, model / f"fold_{fold}" / self.checkpoint)
        self.change_plans(plans)
        (model / "plans.json").write_text(json.dumps(plans))
        return model


def _network(plans: Json, dataset: Json, configuration: str, trainer: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    manager = PlansManager(copy.deepcopy(plans))
    configured = manager.get_configuration(configuration)
    build = recursive_find_trainer_class_by_name(trainer).build_network_architecture
    heads = manager.get_label_manager(dataset).num_segmentation_heads
    takes_plans = "plans_manager" in inspect.signature(build).parameters
    first = (
        (manager, configured)
        if takes_plans
        else (
            configured.network_arch_class_name,
            configured.network_arch_init_kwargs,
            configured.network_arch_init_kwargs_req_import,
        )
    )
    inputs = determine_num_input_channels(manager, configured, dataset)
    network = build(*first, inputs, heads, enable_deep_supervision=True)
    return dict(network.state_dict())
