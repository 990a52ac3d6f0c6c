"""What plans.json and a checkpoint may name.

nnU-Net imports the classes and functions that plans.json names (``pydoc.locate("os.system")`` would do as well).
Everything so named must be what it claims to be: a network part from torch.nn, dynamic_network_architectures or
nnunetv2, or a function or class of nnunetv2; or of a file that the user named with ``--trainer-file``.
"""

from __future__ import annotations

import importlib.util
import inspect
import pydoc
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import dynamic_network_architectures
import torch
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.member_description import NetworkBuilder
from nnunet_torchserve.names import NNUNETV2_ONLY, Names
from nnunet_torchserve.own_code import Kind

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


_PACK_IT = "pack the file that has it with --trainer-file FILE.py"


def check_plans(plans: Mapping[str, Any], configuration_name: str, names: Names = NNUNETV2_ONLY) -> str | None:
    """Refuse plans that would import anything else.

    Args:
        plans: the content of plans.json.
        configuration_name: the configuration to be served.
        names: what its names mean.

    Returns:
        The full name of the network's class; see :func:`network_class`.

    Raises:
        ToolError: a name outside the allow-list, a reader or a configuration that cannot be served yet.
    """
    try:
        manager = names.plans(dict(plans))
        if configuration_name not in manager.available_configurations:
            msg = f"plans.json has no configuration {configuration_name}; it has {manager.available_configurations}"
            raise ToolError(msg)
        raw = manager._internal_resolve_configuration_inheritance(configuration_name)  # noqa: SLF001
        _check_architecture(raw.get("architecture", {}), names)
        configuration = manager.get_configuration(configuration_name)
        found = _check_architecture(configuration.configuration["architecture"], names)
        reader = plans["image_reader_writer"]
        if reader not in _READERS:
            msg = (
                f"plans.json names the image reader {reader!r}; only {', '.join(_READERS)} can be served: a reader "
                "opens files by their names, and a server has none"
            )
            raise ToolError(msg)
        _check_lookups(manager, configuration, names)
        _check_numbers(manager, configuration)
    except BundleError as error:
        raise ToolError(str(error)) from error
    except (*_INCOMPLETE, pydoc.ErrorDuringImport) as error:
        msg = f"plans.json is not complete: {type(error).__name__} {error}"
        raise ToolError(msg) from error
    return found


def _check_architecture(architecture: Mapping[str, Any], names: Names) -> str | None:
    found = network_class(architecture, names)
    arguments = architecture.get("arch_kwargs", {})
    for key in architecture.get("_kw_requires_import", ()):
        if names.has(Kind.NETWORK, name := arguments.get(key)):
            _check_own_part(name, names)
        elif name is not None:
            known = isinstance(name, str) and _NETWORK_PART.fullmatch(name)
            _check_network_part(name, pydoc.locate(name) if known else None)
    return found


def _check_own_part(name: str, names: Names) -> None:
    part = names.find(Kind.NETWORK, name)
    if not (inspect.isclass(part) and issubclass(part, torch.nn.Module)):
        msg = f"plans.json names {name!r} to be imported; what --trainer-file has of that name is no torch.nn.Module"
        raise ToolError(msg)


def network_class(architecture: Mapping[str, Any], names: Names = NNUNETV2_ONLY) -> str | None:
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
    if names.has(Kind.NETWORK, name):
        _check_own_part(name, names)
        return str(name)
    found = installed_network(name)
    _check_network_part(name, found)
    is_there = _NETWORK_PART.fullmatch(name) and pydoc.locate(name) is found
    return str(name) if is_there else f"{found.__module__}.{found.__qualname__}"


def installed_network(name: Any) -> Any:
    """The class that nnU-Net takes, if that can be found out without importing what is not allowed; else ``None``."""
    found: Any = None
    if isinstance(name, str):
        package = name.split(".")[0] if "." in name else ""
        if _NETWORK_PART.fullmatch(name) and (found := pydoc.locate(name)) is not None:
            return found
        if package in ("", *_NETWORK_PACKAGES) or not _is_installed(package):  # nothing to import
            found = _moved_network(name.rpartition(".")[2])
    return found


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
            f"torch.nn, dynamic_network_architectures and nnunetv2 are allowed; if it is your own, {_PACK_IT}"
        )
        raise ToolError(msg)


def _check_lookups(manager: Any, configuration: Any, names: Names) -> None:
    """Names that nnU-Net looks up within its own package must lead to code of that package, or of the user's files."""
    settings, label_manager = configuration.configuration, manager.plans.get("label_manager", "LabelManager")
    resampling = ("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities")
    lookups: list[tuple[str, Kind, Any, Callable[[], Any]]] = [
        (
            "preprocessor_name",
            Kind.PREPROCESSOR,
            settings["preprocessor_name"],
            lambda: configuration.preprocessor_class,
        ),
        ("label_manager", Kind.LABEL_MANAGER, label_manager, lambda: manager.label_manager_class),
        *((key, Kind.RESAMPLING, settings[key], partial(getattr, configuration, key)) for key in resampling),
        *(
            (
                f"normalization scheme {scheme}",
                Kind.NORMALIZATION,
                scheme,
                partial(names.find, Kind.NORMALIZATION, scheme),
            )
            for scheme in configuration.normalization_schemes
        ),
    ]
    for key, kind, name, look_up in lookups:
        try:
            found = look_up()
        except (RuntimeError, TypeError):
            found = None
        target = found.func if isinstance(found, partial) else found
        is_known = names.has(kind, name) or getattr(target, "__module__", "").startswith("nnunetv2.")
        if not (callable(target) and is_known):
            msg = f"plans.json names a {key} that nnunetv2 does not have: {name!r}; if it is your own, {_PACK_IT}"
            raise ToolError(msg)
    _check_preprocessor(configuration.preprocessor_class)


def _check_preprocessor(kind: Any) -> None:
    """Files are read by ``run_case``; what else somebody's own does there, no server could do."""
    if getattr(kind, "run_case", DefaultPreprocessor.run_case) is not DefaultPreprocessor.run_case:
        msg = (
            f"the preprocessor {kind.__name__} has a run_case of its own, which opens files by their names, and a "
            "server has none: what it does to images belongs into run_case_npy"
        )
        raise ToolError(msg)
    if not callable(getattr(kind, "run_case_npy", None)):
        msg = f"the preprocessor {kind.__name__} has no run_case_npy, which is all that nnU-Net calls for an array"
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


def network_builder(trainer_name: str, names: Names = NNUNETV2_ONLY) -> tuple[NetworkBuilder, str | None]:
    """Who builds this trainer's network.

    The server imports no trainer that builds its network as ``nnUNetTrainer`` does, and of nnunetv2's others only the
    class that has the method that builds it.

    Args:
        trainer_name: of the checkpoint.
        names: what names mean.

    Returns:
        How it is built, and the name of the class that is asked to: of nnunetv2, or of the user's files.

    Raises:
        ToolError: no such trainer; one that is neither nnunetv2's nor in the user's files has that method, or it is a
            method that nnU-Net's predictor cannot call.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer: Any
    if not trainer_name.isidentifier():
        msg = f"the checkpoint names the trainer {trainer_name!r}, which is no class name"
        raise ToolError(msg)
    is_own = names.has(Kind.TRAINER, trainer_name)
    trainer = names.find(Kind.TRAINER, trainer_name) if is_own else _trainer(trainer_name)
    if trainer is None:
        msg = f"the trainer {trainer_name} is not part of nnunetv2; {_PACK_IT}"
        raise ToolError(msg)
    is_trainer = inspect.isclass(trainer) and issubclass(trainer, nnUNetTrainer)
    if not is_trainer:
        msg = f"the trainer {trainer_name} is no class that is derived from nnUNetTrainer, as nnU-Net demands"
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
    if is_own:
        _check_builder(trainer_name, build)
        return NetworkBuilder.TRAINER, trainer_name
    msg = f"the trainer {trainer_name} builds a network of its own and is not part of nnunetv2; {_PACK_IT}"
    with suppress(OSError, TypeError):
        msg = msg.replace("FILE.py", inspect.getfile(inspect.unwrap(build)))
    raise ToolError(msg)


def _check_builder(trainer_name: str, build: Any) -> None:
    """nnU-Net's predictor has no trainer, only its class, which it asks for a network."""
    try:
        signature = inspect.signature(build)
        count = 4 if "plans_manager" in signature.parameters else 5
        signature.bind(*range(count), enable_deep_supervision=False)
    except (TypeError, ValueError) as error:
        msg = (
            f"{trainer_name}.build_network_architecture cannot be called as nnU-Net's predictor calls it, on the class "
            f"({error}): make it a static method or a class method with nnUNetTrainer's arguments"
        )
        raise ToolError(msg) from error


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
