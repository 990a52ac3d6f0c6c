"""What plans.json and a checkpoint may name.

nnU-Net imports the classes and functions that plans.json names (``pydoc.locate("os.system")`` would do as well).
Everything so named must be what it claims to be: a network part from torch.nn, dynamic_network_architectures or
nnunetv2, or a function or class of nnunetv2.
"""

from __future__ import annotations

import inspect
import pydoc
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nnunet_torchserve.bundle import NetworkBuilder

from .errors import ToolError

_NETWORK_PART = re.compile(r"(torch\.nn|dynamic_network_architectures|nnunetv2)(\.[A-Za-z_]\w*)+")
_NETWORK_PACKAGES = ("torch", "dynamic_network_architectures", "nnunetv2")
_READERS = (
    "SimpleITKIO",
    "SimpleITKIOWithReorient",
    "NibabelIO",
    "NibabelIOWithReorient",
    "NaturalImage2DIO",
    "Tiff3DIO",
)


def check_plans(plans: Mapping[str, Any], configuration_name: str) -> None:
    """Refuse plans that would import anything else.

    Args:
        plans: the content of plans.json.
        configuration_name: the configuration to be served.

    Raises:
        ToolError: a name outside the allow-list, a reader or a configuration that cannot be served yet.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    try:
        manager = PlansManager(dict(plans))
        if configuration_name not in manager.available_configurations:
            msg = f"plans.json has no configuration {configuration_name}; it has {manager.available_configurations}"
            raise ToolError(msg)
        raw = manager._internal_resolve_configuration_inheritance(configuration_name)  # noqa: SLF001
        _check_architecture(raw.get("architecture", {}))
        configuration = manager.get_configuration(configuration_name)
        _check_architecture(configuration.configuration["architecture"])
        reader = plans["image_reader_writer"]
        if reader not in _READERS:
            msg = f"plans.json names the image reader {reader!r}; only {', '.join(_READERS)} can be served"
            raise ToolError(msg)
        if configuration.previous_stage_name is not None:
            msg = f"{configuration_name} is the second stage of a cascade, which cannot be served yet"
            raise ToolError(msg)
        _check_lookups(manager, configuration)
        _check_numbers(manager, configuration)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        msg = f"plans.json is not complete: {type(error).__name__} {error}"
        raise ToolError(msg) from error


def _check_architecture(architecture: Mapping[str, Any]) -> None:
    arguments = architecture.get("arch_kwargs", {})
    names = [architecture.get("network_class_name")]
    names += [arguments.get(key) for key in architecture.get("_kw_requires_import", ())]
    for name in names:
        if name is not None:
            _check_network_part(name)


def _check_network_part(name: Any) -> None:
    part = pydoc.locate(name) if isinstance(name, str) and _NETWORK_PART.fullmatch(name) else None
    belongs = inspect.isclass(part) and part.__module__.split(".")[0] in _NETWORK_PACKAGES
    if not (belongs and issubclass(part, torch.nn.Module)):  # type: ignore[arg-type]
        msg = (
            f"plans.json names {name!r} to be imported; only network parts (torch.nn.Module classes) of "
            "torch.nn, dynamic_network_architectures and nnunetv2 are allowed"
        )
        raise ToolError(msg)


def _check_lookups(manager: Any, configuration: Any) -> None:
    """Names that nnU-Net looks up within its own package must lead to code of that package."""
    found: dict[str, Callable[[], Any]] = {
        "preprocessor_name": lambda: configuration.preprocessor_class,
        "resampling_fn_data": lambda: configuration.resampling_fn_data.func,
        "resampling_fn_seg": lambda: configuration.resampling_fn_seg.func,
        "resampling_fn_probabilities": lambda: configuration.resampling_fn_probabilities.func,
        "image_reader_writer": lambda: manager.image_reader_writer_class,
        "label_manager": lambda: manager.label_manager_class,
    }
    for scheme in configuration.normalization_schemes:
        found[f"normalization scheme {scheme}"] = lambda scheme=scheme: _normalization(scheme)  # type: ignore[misc]
    for key, look_up in found.items():
        try:
            target = look_up()
        except (RuntimeError, TypeError):
            target = None
        if not getattr(target, "__module__", "").startswith("nnunetv2."):
            msg = f"plans.json names a {key} that nnunetv2 does not have"
            raise ToolError(msg)


def _check_numbers(manager: Any, configuration: Any) -> None:
    """Axis orders must be permutations and inverses, sizes and spacings positive."""
    forward, backward = list(manager.transpose_forward), list(manager.transpose_backward)
    dimensions = len(configuration.patch_size)
    sound = (
        sorted(forward) == [0, 1, 2]
        and [forward[axis] for axis in backward] == [0, 1, 2]
        and dimensions in (2, 3)
        and len(configuration.spacing) == dimensions
        and all(int(size) == size and size > 0 for size in configuration.patch_size)
        and all(0 < float(size) < float("inf") for size in configuration.spacing)
    )
    if not sound:
        msg = (
            f"plans.json: transpose {forward} and {backward}, patch {configuration.patch_size}, spacing "
            f"{configuration.spacing} do not describe a grid"
        )
        raise ToolError(msg)


def check_mirroring(axes: tuple[int, ...] | None, dimensions: int) -> None:
    """Raise :class:`ToolError` unless a checkpoint's mirroring axes are distinct axes of its patch."""
    if axes is not None and (len(set(axes)) != len(axes) or not set(axes) <= set(range(dimensions))):
        msg = f"the checkpoint mirrors along axes {axes}, which a patch of {dimensions} axes does not have"
        raise ToolError(msg)


def _normalization(scheme: str) -> Any:
    from pathlib import Path

    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "preprocessing" / "normalization"
    return recursive_find_python_class(str(folder), scheme, "nnunetv2.preprocessing.normalization")


def network_builder(trainer_name: str) -> NetworkBuilder:
    """Who builds this trainer's network.

    The server does not import trainer classes that build their network as ``nnUNetTrainer`` does.

    Raises:
        ToolError: no such trainer, or one outside nnunetv2 that builds its own network.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    if not trainer_name.isidentifier():
        msg = f"the checkpoint names the trainer {trainer_name!r}, which is no class name"
        raise ToolError(msg)
    try:
        trainer = recursive_find_trainer_class_by_name(trainer_name)
    except (RuntimeError, AssertionError) as error:
        msg = f"the trainer {trainer_name} is not installed; set nnUNet_extTrainer to the folder that has it"
        raise ToolError(msg) from error
    if trainer.build_network_architecture is nnUNetTrainer.build_network_architecture:
        return NetworkBuilder.PLANS
    if trainer.__module__.startswith("nnunetv2."):
        return NetworkBuilder.TRAINER
    msg = f"the trainer {trainer_name} builds its own network and is not part of nnunetv2: it cannot be served yet"
    raise ToolError(msg)
