"""A model folder of any architecture with random weights: for sizes that no test can train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

DEMO_MODEL = Path(__file__).parents[2] / "demo/model/Dataset811_BrainTissueDemo/nnUNetTrainer__nnUNetPlans__3d_fullres"


def standard_unet(
    folder: Path,
    *,
    features: Sequence[int] = (32, 64, 128, 256, 320, 320),
    patch_size: Sequence[int] = (128, 128, 128),
    spacing: float = 1.0,
    classes: int = 4,
    folds: int = 1,
    residual_blocks: Sequence[int] | None = None,
) -> Path:
    """Write a trained-model folder for nnU-Net's plain U-Net, or for its residual encoder.

    Args:
        folder: where it goes.
        features: of each stage; nnU-Net's own for a 3d_fullres configuration by default.
        patch_size: (z, y, x) voxels.
        spacing: mm, cubic voxels.
        classes: with background.
        folds: as many, each with other weights.
        residual_blocks: of each stage of a residual encoder, which has one convolution in each stage of its decoder;
            without it the network is plain.

    Returns:
        nnU-Net's ``TRAINER__PLANS__CONFIG`` folder.
    """
    model = folder / "Dataset899_Untrained" / DEMO_MODEL.name
    plans: dict[str, Any] = json.loads((DEMO_MODEL / "plans.json").read_text())
    dataset: dict[str, Any] = json.loads((DEMO_MODEL / "dataset.json").read_text())
    plans["dataset_name"] = "Dataset899_Untrained"
    dataset["labels"] = {"background": 0} | {f"part_{label}": label for label in range(1, classes)}
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": list(patch_size), "spacing": [spacing] * 3}
    architecture = configuration["architecture"]
    stages = len(features)
    architecture["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": list(features),
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
    }
    if residual_blocks is not None:
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        del architecture["arch_kwargs"]["n_conv_per_stage"]
        architecture["arch_kwargs"] |= {
            "n_blocks_per_stage": list(residual_blocks),
            "n_conv_per_stage_decoder": [1] * (stages - 1),
        }
    model.mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = torch.load(DEMO_MODEL / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for fold in range(folds):
        torch.manual_seed(fold)
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            len(dataset["channel_names"]),
            classes,
            allow_init=True,
            deep_supervision=False,
        )
        (model / f"fold_{fold}").mkdir()
        torch.save(
            checkpoint | {"network_weights": network.state_dict(), "optimizer_state": None},
            model / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return model
