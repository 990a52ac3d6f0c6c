"""More configurations of a dataset that has one, for recipes: made of the trained network, not trained.

What a recipe costs depends on grids, patches, classes and how rough the logits are, not on how good the labels are. A
``3d_lowres`` is the trained network on a coarser grid; a ``3d_cascade_fullres`` is the trained network whose first
convolution got an input for each label of the first stage, with small weights. So the logits are a trained network's:
confident inside, ambiguous along every border.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from benchmarks.harness.material import CONFIGURATION, FOLD, PLANS, TRAINER

LOWRES, CASCADE = "3d_lowres", "3d_cascade_fullres"

COARSER = 1.4
"""Times the spacing of ``3d_fullres``; nnU-Net makes its lowres grids coarser until a patch sees a quarter of them."""

_INPUT_WEIGHT = 0.05
"""Standard deviation of a weight that looks at a label of the first stage; trained ones of images are about 0.2."""

_CHECKPOINT = "checkpoint_final.pth"
Weights = dict[str, torch.Tensor]


def results_with_more(trained: Path, home: Path) -> Path:
    """A dataset's folder of nnU-Net results with three configurations.

    Args:
        trained: a trained model folder of ``3d_fullres``.
        home: becomes nnU-Net's results folder.

    Returns:
        The trained model folder there, beside which are the other two.
    """
    plans = json.loads((trained / "plans.json").read_text())
    configurations = plans["configurations"]
    fullres = configurations[CONFIGURATION]
    configurations[LOWRES] = copy.deepcopy(fullres) | {
        "data_identifier": f"{PLANS}_{LOWRES}",
        "spacing": [COARSER * size for size in fullres["spacing"]],
        "next_stage": CASCADE,
    }
    configurations[CASCADE] = {"inherits_from": CONFIGURATION, "previous_stage": LOWRES}
    dataset = json.loads((trained / "dataset.json").read_text())
    labels = len(PlansManager(plans).get_label_manager(dataset).foreground_labels)
    changes: Mapping[str, Callable[[Weights], Weights]] = {
        CONFIGURATION: dict,
        LOWRES: dict,
        CASCADE: lambda weights: _with_more_inputs(weights, labels),
    }
    folder = home / trained.parent.name
    checkpoint = torch.load(trained / f"fold_{FOLD}" / _CHECKPOINT, map_location="cpu", weights_only=False)
    for name, change in changes.items():
        _write(folder / f"{TRAINER}__{PLANS}__{name}", plans, dataset, checkpoint, name, change)
    return folder / trained.name


def _write(
    folder: Path,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    configuration: str,
    change: Callable[[Weights], Weights],
) -> None:
    (folder / f"fold_{FOLD}").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    changed = dict(checkpoint) | {
        "network_weights": change(checkpoint["network_weights"]),
        "init_args": checkpoint["init_args"] | {"configuration": configuration},
    }
    torch.save(changed, folder / f"fold_{FOLD}" / _CHECKPOINT)


def _with_more_inputs(weights: Weights, more: int) -> Weights:
    """The first convolution, under each of its names, takes ``more`` channels than it did."""
    first = weights["encoder.stages.0.0.convs.0.conv.weight"]
    generator = torch.Generator().manual_seed(0)
    added = _INPUT_WEIGHT * torch.randn((first.shape[0], more, *first.shape[2:]), generator=generator)
    wider = torch.cat([first, added], dim=1)
    return {
        name: wider if tensor.shape == first.shape and torch.equal(tensor, first) else tensor
        for name, tensor in weights.items()
    }
