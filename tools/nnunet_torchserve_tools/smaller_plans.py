"""Plans for a lighter network: nnU-Net's own, with fewer features in each stage, and fewer convolutions if asked for.

Everything but the network stays, above all how images are preprocessed, so that nothing is preprocessed again. Another
spacing is nnU-Net's own to plan (``nnUNetv2_plan_experiment -overwrite_target_spacing``): patches and pooling depend on
it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ToolError, UsageError
from .json_files import read_object

Json = dict[str, Any]

DATASET_FILE = "dataset.json"

_NAME = re.compile(r"[A-Za-z0-9-]+(_[A-Za-z0-9-]+)*")
"""nnU-Net joins it with others by two underscores, and takes such names apart there."""

_ARCHITECTURE, _FEATURES = "architecture", "features_per_stage"
_OLD_FEATURES = ("UNet_base_num_features", "unet_max_num_features")
"""Of plans before nnU-Net 2.3: the first stage's, which double up to the most."""

_CONVOLUTIONS = (
    "n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder", "n_conv_per_stage_encoder",
)  # fmt: skip
"""Convolutions of a stage, or its residual blocks; the last is of plans before nnU-Net 2.3."""

_MULTIPLE = 8
"""Tensor cores take so many half-precision channels at a time; stages of twice as many and more are rounded to it."""


_FEWEST = 4
"""No stage is left with fewer features: PyTorch's convolutions are slower with 2 or 3 than with 4 on a CPU."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network takes.

    Attributes:
        parameters: of it.
        operations: floating-point operations of one patch forward, a multiplication and its addition counted as two.
    """

    parameters: int
    operations: int


@dataclass(frozen=True, slots=True)
class Change:
    """What became of a configuration."""

    configuration: str
    before: Cost
    after: Cost

    def line(self) -> str:
        """For people."""
        million = 1e6
        return (
            f"{self.configuration}: {self.before.parameters / million:.3g} -> {self.after.parameters / million:.3g} "
            f"million parameters, {self.after.operations / self.before.operations:.1%} of the operations of a patch"
        )


def write_smaller_plans(
    plans_file: Path, factor: float, name: str, convolutions: int | None = None
) -> tuple[Path, list[Change]]:
    """Write ``NAME.json`` beside nnU-Net's plans, which ``nnUNetv2_train -p NAME`` finds there.

    Args:
        plans_file: of a dataset's folder below ``nnUNet_preprocessed``; dataset.json is beside it.
        factor: of the features, above 0 and below 1.
        name: of the plans.
        convolutions: at most so many in a stage, or residual blocks; ``None`` leaves them.

    Returns:
        The new file, and what became of each configuration.

    Raises:
        UsageError: a factor or a name that cannot be meant, or files that are not there.
        ToolError: plans that are not nnU-Net's, or are of another kind of network.
    """
    if not 0 < factor < 1:
        msg = f"--features {factor:g}: a share between 0 and 1 was expected, as 0.5"
        raise UsageError(msg)
    if not _NAME.fullmatch(name):
        msg = f"--name {name}: letters, digits, - and single _ between them were expected"
        raise UsageError(msg)
    target = plans_file.with_name(f"{name}.json")
    if target.exists():
        msg = f"{target} exists; choose another --name: models that were trained by it need it as it is"
        raise UsageError(msg)
    plans, dataset = _read(plans_file), _read(plans_file.with_name(DATASET_FILE))
    smaller = smaller_plans(plans, factor, name, convolutions)
    changes = [
        Change(configuration, *(cost(each, dataset, configuration) for each in (plans, smaller)))
        for configuration in plans["configurations"]
    ]
    part = target.with_suffix(".part")
    part.write_text(json.dumps(smaller, indent=4))
    part.replace(target)
    return target, changes


def smaller_plans(plans: Mapping[str, Any], factor: float, name: str, convolutions: int | None = None) -> Json:
    """A copy with so many features and convolutions in each stage, of that name.

    Raises:
        ToolError: see :func:`write_smaller_plans`.
    """
    smaller: Json = copy.deepcopy(dict(plans)) | {"plans_name": name}
    configurations = smaller.get("configurations")
    if not isinstance(configurations, dict) or not all(isinstance(each, dict) for each in configurations.values()):
        msg = "these are no plans of nnU-Net's: they have no configurations"
        raise ToolError(msg)
    shrunk = [_shrink(configuration, factor, convolutions) for configuration in configurations.values()]
    if not any(shrunk):
        msg = "these plans have no network"
        raise ToolError(msg)
    return smaller


def _shrink(configuration: Json, factor: float, convolutions: int | None) -> bool:
    """Change a configuration in place; whether it has a network of its own, and does not inherit one."""
    if _ARCHITECTURE in configuration:
        arguments = configuration[_ARCHITECTURE].get("arch_kwargs", {})
        if _FEATURES not in arguments:
            network = configuration[_ARCHITECTURE].get("network_class_name")
            msg = f"the plans name the network {network}, which has no {_FEATURES}: only nnU-Net's U-Nets are shrunk"
            raise ToolError(msg)
        arguments[_FEATURES] = [_fewer(count, factor) for count in arguments[_FEATURES]]
        _cap(arguments, convolutions)
        return True
    old = [key for key in _OLD_FEATURES if key in configuration]
    for key in old:
        configuration[key] = _fewer(configuration[key], factor)
    _cap(configuration, convolutions)
    return bool(old)


def _cap(arguments: Json, most: int | None) -> None:
    """No stage has more convolutions; a number instead of a list is that of all stages."""
    for key in _CONVOLUTIONS:
        if most is not None and (counts := arguments.get(key)) is not None:
            arguments[key] = min(counts, most) if isinstance(counts, int) else [min(count, most) for count in counts]


def _fewer(features: int, factor: float) -> int:
    """At least :data:`_FEWEST`, or what there was."""
    exact = features * factor
    if exact >= 2 * _MULTIPLE:
        return round(exact / _MULTIPLE) * _MULTIPLE
    return max(min(features, _FEWEST), round(exact))


def cost(plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: str) -> Cost:
    """What a configuration's network takes; its weights and activations are never made."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from torch.utils.flop_counter import FlopCounterMode

    manager = PlansManager(copy.deepcopy(dict(plans)))
    settings = manager.get_configuration(configuration)
    inputs = determine_num_input_channels(manager, settings, dataset)
    with torch.device("meta"), torch.no_grad():
        network = get_network_from_plans(
            settings.network_arch_class_name,
            settings.network_arch_init_kwargs,
            settings.network_arch_init_kwargs_req_import,
            inputs,
            manager.get_label_manager(dataset).num_segmentation_heads,
            allow_init=False,
            deep_supervision=False,
        )
        with FlopCounterMode(display=False) as counter:
            network(torch.empty((1, inputs, *settings.patch_size)))
    return Cost(sum(each.numel() for each in network.parameters()), counter.get_total_flops())


def _read(file: Path) -> Json:
    return read_object(file, f"{file} cannot be read; name the plans in the dataset's folder below nnUNet_preprocessed")
