"""What plans.json and a checkpoint may name.

nnU-Net imports the classes and functions that plans.json names (``pydoc.locate("os.system")`` would do as well).
Everything so named must be what it claims to be: a network part from torch.nn, dynamic_network_architectures or
nnunetv2, or a function or class of nnunetv2.
"""

from __future__ import annotations

import importlib.util
import inspect
import pydoc
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dynamic_network_architectures
import torch
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_torchserve.intensities import normalization_class
from nnunet_torchserve.member import NetworkBuilder

from .errors import ToolError

_NETWORK_PART = re.compile(r"(torch\.nn|dynamic_network_architectures|nnunetv2)(\.[A-Za-z_]\w*)+")
_NETWORK_PACKAGES = ("torch", "dynamic_network_architectures", "nnunetv2")
_INCOMPLETE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What nnU-Net raises where plans lack something."""

_READERS = (
    "SimpleITKIO",
    "SimpleITKIOWithReorient",
    "NibabelIO",
    "NibabelIOWithReorient",
    "NaturalImage2DIO",
    "Tiff3DIO",
)


def check_plans(plans: Mapping[str, Any], configuration_name: str) -> str | None:
    """Refuse plans that would import anything else.

    Args:
        plans: the content of plans.json.
        configuration_name: the configuration to be served.

    Returns:
        The full name of the network's class; see :func:`network_class`.

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
        found = _check_architecture(configuration.configuration["architecture"])
        reader = plans["image_reader_writer"]
        if reader not in _READERS:
            msg = f"plans.json names the image reader {reader!r}; only {', '.join(_READERS)} can be served"
            raise ToolError(msg)
        _check_lookups(manager, configuration)
        _check_numbers(manager, configuration)
    except (*_INCOMPLETE, pydoc.ErrorDuringImport) as error:
        msg = f"plans.json is not complete: {type(error).__name__} {error}"
        raise ToolError(msg) from error
    return found


def _check_architecture(architecture: Mapping[str, Any]) -> str | None:
    found = network_class(architecture)
    arguments = architecture.get("arch_kwargs", {})
    for key in architecture.get("_kw_requires_import", ()):
        if (name := arguments.get(key)) is not None:
            known = isinstance(name, str) and _NETWORK_PART.fullmatch(name)
            _check_network_part(name, pydoc.locate(name) if known else None)
    return found


def network_class(architecture: Mapping[str, Any]) -> str | None:
    """The full name of the class that nnU-Net's ``get_network_from_plans`` takes for the one that plans.json names.

    That is the class of this name or, if there is none (any more), the one within
    ``dynamic_network_architectures.architectures`` that has its last part for a name. Nothing outside of the allow-list
    is imported to find that out.

    Returns:
        ``None`` if the plans name no class.

    Raises:
        ToolError: there is no such class, or it is outside of the allow-list.
    """
    name = architecture.get("network_class_name")
    if name is None:
        return None
    found: Any = None
    if isinstance(name, str):
        package = name.split(".")[0] if "." in name else ""
        if _NETWORK_PART.fullmatch(name) and (found := pydoc.locate(name)) is not None:
            _check_network_part(name, found)
            return name
        if package in ("", *_NETWORK_PACKAGES) or not _is_installed(package):  # nothing to import
            found = _moved_network(name.rpartition(".")[2])
    _check_network_part(name, found)
    return f"{found.__module__}.{found.__qualname__}"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module that was not found like others, as __main__
        return True


def _moved_network(name: str) -> Any:
    folder = Path(dynamic_network_architectures.__path__[0], "architectures")
    return recursive_find_python_class(str(folder), name, "dynamic_network_architectures.architectures")


def _check_network_part(name: Any, part: Any) -> None:
    belongs = inspect.isclass(part) and part.__module__.split(".")[0] in _NETWORK_PACKAGES
    if not (belongs and issubclass(part, torch.nn.Module)):
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
        found[f"normalization scheme {scheme}"] = lambda scheme=scheme: normalization_class(scheme)  # type: ignore[misc]
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


def network_builder(trainer_name: str) -> tuple[NetworkBuilder, str | None]:
    """Who builds this trainer's network.

    The server imports no trainer that builds its network as ``nnUNetTrainer`` does, and of the others only the class
    that has the method that builds it.

    Returns:
        How it is built, and that class's name if it is one of nnunetv2's trainers.

    Raises:
        ToolError: no such trainer, or one outside nnunetv2 has that method.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    if not trainer_name.isidentifier():
        msg = f"the checkpoint names the trainer {trainer_name!r}, which is no class name"
        raise ToolError(msg)
    trainer = _trainer(trainer_name)
    if trainer is None:
        msg = f"the trainer {trainer_name} is not installed; set nnUNet_extTrainer to the folder that has it"
        raise ToolError(msg)
    build = trainer.build_network_architecture
    if build is nnUNetTrainer.build_network_architecture:
        return NetworkBuilder.PLANS, None
    inherited = next(each for each in trainer.__mro__ if "build_network_architecture" in vars(each))
    borrowed = getattr(build, "__qualname__", "").split(".")[0]
    for module, owner in ((inherited.__module__, inherited.__name__), (getattr(build, "__module__", ""), borrowed)):
        if module.startswith("nnunetv2.") and owner.isidentifier():
            found = _trainer(owner)
            if found is not None and found.build_network_architecture is build:
                return NetworkBuilder.TRAINER, owner
    msg = f"the trainer {trainer_name} builds its own network and is not part of nnunetv2: it cannot be served yet"
    raise ToolError(msg)


def _trainer(name: str) -> Any:
    """The trainer class of that name as nnU-Net finds it, ``None`` if there is none.

    Raises:
        ToolError: a file beside it, which nnU-Net imports while it looks, cannot be imported.
    """
    try:
        return recursive_find_trainer_class_by_name(name)
    except (RuntimeError, AssertionError, TypeError):  # none, or something else has that name
        return None
    except Exception as error:
        msg = (
            f"nnU-Net imports the files in nnUNet_extTrainer to find the trainer {name}, and one of them fails: "
            f"{type(error).__name__} {error}"
        )
        raise ToolError(msg) from error
