"""nnU-Net's standard network and ResEnc-M, untrained, in the form that the engine loads: members of an archive.

An archive's checks and trials run on a CPU and take minutes for networks of this size; they are left out here. Weights
do not change how long a patch takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from nnunet_torchserve.bundle import SCHEMA_VERSION, BundleDescription, ModelBundle
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.golden import golden_tensors
from nnunet_torchserve.member_description import GOLDEN_FILE
from nnunet_torchserve_tools.composition import compose
from nnunet_torchserve_tools.golden_patches import write_bundle
from nnunet_torchserve_tools.trained import read_trained_model
from support.stock import CHECKPOINT
from support.untrained import standard_unet

FOLD = 0
FEATURES = (32, 64, 128, 256, 320, 320)
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6)
"""nnU-Net's planners: 32 features doubled up to 320; ``ResEncUNetPlanner.UNet_blocks_per_stage_encoder``."""

_LARGE = 96
"""Voxels along each axis, from which on nnU-Net's planner has six stages and not five."""

_TINY = (8, 16, 32)
_READER = "NibabelIO"


@dataclass(frozen=True, slots=True)
class Network:
    """A network for cubic patches.

    Attributes:
        kind: ``standard``, ``ResEnc-M``, or ``tiny``, for trials without a GPU.
        size: voxels along each axis of a patch.
    """

    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.kind} {self.size}³"

    def write(self, folder: Path, classes: int) -> Path:
        """Write nnU-Net's model folder of it."""
        features = _TINY if self.kind == "tiny" else FEATURES[: 6 if self.size >= _LARGE else 5]
        blocks = RESIDUAL_BLOCKS[: len(features)] if self.kind == "ResEnc-M" else None
        size = (self.size,) * 3
        model = standard_unet(folder, features=features, patch_size=size, classes=classes, residual_blocks=blocks)
        plans = json.loads((model / "plans.json").read_text())
        (model / "plans.json").write_text(json.dumps(plans | {"image_reader_writer": _READER}))
        return model


def staged(model: Path, stage: Path, *, golden: bool) -> ModelBundle:
    """The model as an unpacked archive has it.

    Args:
        model: nnU-Net's folder.
        stage: becomes the archive's.
        golden: it has a golden patch, which an engine wants; it is computed on the CPU.
    """
    composition = compose([read_trained_model(model, (FOLD,), CHECKPOINT, trust=False)])
    members = tuple(trained.describe(name, None) for name, trained in composition.members.items())
    for member in members:
        composition.members[member.name].write(stage / member.folder, member)
    description = BundleDescription(
        schema_version=SCHEMA_VERSION,
        name="untrained",
        version="1.0",
        members=members,
        recipe=composition.recipe,
        requires={},
        built_with={},
        files={},
    )
    write_bundle(stage, description)
    bundle = ModelBundle(stage)
    if not golden:
        return bundle
    lead = bundle.lead
    save_file(golden_tensors(EagerNetworks(lead, torch.device("cpu")), lead.folds), lead.folder / GOLDEN_FILE)
    write_bundle(stage, description)
    return ModelBundle(stage)
