"""A trained configuration as nnU-Net left it in a folder: read, checked, and written into an archive as a member."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from safetensors.torch import save_file

from nnunet_torchserve.agreement import Trained
from nnunet_torchserve.label_manager import output_names
from nnunet_torchserve.member_description import DATASET_FILE, PLANS_FILE, FoldDescription, MemberDescription
from nnunet_torchserve.names import Names
from nnunet_torchserve.options import FoldName
from nnunet_torchserve.own_code import Kind
from nnunet_torchserve.stored_tensors import ALIASES_KEY

from .checkpoint import Checkpoint, without_aliases
from .errors import ToolError
from .folds import numbered_folds, read_checkpoints
from .json_files import read_object
from .model_folders import check_model_folder, no_model_folder
from .plans_check import check_mirroring, check_plans, network_builder
from .trainer_files import NO_FILES, TrainerFiles, wanted_names, warn_of_copies


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What an archive needs of a ``TRAINER__PLANS__CONFIGURATION`` folder.

    Attributes:
        folder: nnU-Net's.
        checkpoint: file name within each fold's folder.
        plans, dataset: the content of nnU-Net's files.
        checkpoints: of the chosen folds, in their order.
        network_class: see :class:`~nnunet_torchserve.member_description.MemberDescription`.
        names: what the names in its files mean.
    """

    folder: Path
    checkpoint: str
    plans: dict[str, Any]
    dataset: dict[str, Any]
    checkpoints: Mapping[FoldName, Checkpoint]
    network_class: str | None
    names: Names

    @property
    def folds(self) -> tuple[FoldName, ...]:
        """The chosen folds."""
        return tuple(self.checkpoints)

    @property
    def configuration(self) -> str:
        """nnU-Net's name of it."""
        return self._first.configuration

    @property
    def trainer(self) -> str:
        """The class that trained it."""
        return self._first.trainer

    @property
    def plans_name(self) -> str:
        """nnU-Net's name of the plans."""
        return str(self.plans["plans_name"])

    @property
    def dataset_name(self) -> str:
        """nnU-Net's name of the dataset."""
        return str(self.plans["dataset_name"])

    @property
    def _first(self) -> Checkpoint:
        return next(iter(self.checkpoints.values()))

    def manager(self) -> PlansManager:
        """nnU-Net's view of the plans."""
        return self.names.plans(self.plans)

    def settings(self) -> ConfigurationManager:
        """nnU-Net's view of the configuration."""
        return self.manager().get_configuration(self.configuration)

    def trained(self) -> Trained:
        """As far as others must agree with it."""
        return Trained(str(self.folder), self.manager(), self.dataset, self.configuration, self.trainer, self.folds)

    def of_folds(self, folds: tuple[FoldName, ...]) -> TrainedModel:
        """The same with some of its folds."""
        checkpoints = {fold: self.checkpoints[fold] for fold in folds}
        return replace(self, checkpoints=checkpoints)

    def describe(self, name: str, input_orientation: str | None) -> MemberDescription:
        """As a member of that name."""
        builder, network_trainer = network_builder(self.trainer, self.names)
        return MemberDescription(
            name=name,
            dataset=self.dataset_name,
            trainer=self.trainer,
            plans=self.plans_name,
            configuration=self.configuration,
            network_builder=builder,
            folds=tuple(
                FoldDescription(fold=fold, mirroring_axes=each.mirroring_axes, checkpoint_sha256=each.sha256)
                for fold, each in self.checkpoints.items()
            ),
            source={"folder": "/".join(self.folder.resolve().parts[-2:]), "checkpoint": self.checkpoint},
            input_orientation=input_orientation,
            network_class=self.network_class,
            network_trainer=network_trainer,
            output_names=self._output_names(),
        )

    def _output_names(self) -> tuple[str, ...] | None:
        """Written down where nobody could tell them without running somebody's code."""
        if not self.names.has(Kind.LABEL_MANAGER, self.plans.get("label_manager")):
            return None
        return tuple(output_names(self.dataset, self.manager().get_label_manager(self.dataset)))

    def write(self, folder: Path, description: MemberDescription) -> None:
        """Write a member's folder: nnU-Net's files and the weights."""
        folder.mkdir(parents=True)
        (folder / PLANS_FILE).write_text(json.dumps(self.plans, indent=1))
        # nnU-Net numbers its classes in the order of this file's labels: keep it
        (folder / DATASET_FILE).write_text(json.dumps(self.dataset, indent=1))
        for fold in description.folds:
            tensors, aliases = without_aliases(self.checkpoints[fold.fold].weights)
            metadata = {ALIASES_KEY: json.dumps(aliases, sort_keys=True)}
            save_file(tensors, folder / fold.weights_file, metadata=metadata)


def read_trained_model(
    folder: Path, folds: tuple[FoldName, ...] | None, checkpoint: str, *, trust: bool, files: TrainerFiles = NO_FILES
) -> TrainedModel:
    """Read and check a trained model folder.

    Args:
        folder: nnU-Net's.
        folds: ``None`` takes every numbered fold.
        checkpoint: file name within each fold's folder.
        trust: open checkpoints as ordinary pickles.
        files: somebody's own code.

    Raises:
        UsageError: the folder or a fold does not exist or cannot be meant.
        ToolError: a checkpoint or plans.json is damaged, disagrees with another, or names what it must not.
    """
    check_model_folder(folder)
    plans, dataset = _read_json(folder / PLANS_FILE), _read_json(folder / DATASET_FILE)
    chosen = folds or numbered_folds(folder, checkpoint)
    checkpoints = read_checkpoints(folder, chosen, checkpoint, trust=trust)
    first = next(iter(checkpoints.values()))
    wanted = list(wanted_names(plans, _raw_configuration(plans, first.configuration), first.trainer))
    names = files.names(wanted)
    network_class = check_plans(plans, first.configuration, names)
    warn_of_copies(wanted, names)
    patch = names.plans(plans).get_configuration(first.configuration).patch_size
    for each in checkpoints.values():
        check_mirroring(each.mirroring_axes, len(patch))
    return TrainedModel(folder, checkpoint, plans, dataset, checkpoints, network_class, names)


def _raw_configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration as plans.json has it, with what it inherits; empty if that cannot be said."""
    try:
        return dict(PlansManager(plans)._internal_resolve_configuration_inheritance(name))  # noqa: SLF001
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {}  # check_plans says why


def previous_stage_of(folder: Path) -> Path | None:
    """Where nnU-Net has the first stage of a cascade: beside its last, of the same trainer and plans.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION``; its plans.json is read, and no more.

    Returns:
        The folder, which need not be there; ``None`` if the plans name none, or the folder has another name.

    Raises:
        UsageError: there is no plans.json.
        ToolError: it is damaged, or names what can be no folder.
    """
    match folder.name.split("__", 2):
        case [trainer, plans_name, configuration]:
            pass
        case _:
            return None
    plans = _read_json(folder / PLANS_FILE)
    try:
        name = PlansManager(plans)._internal_resolve_configuration_inheritance(configuration).get("previous_stage")  # noqa: SLF001
        return None if name is None else folder.with_name(f"{trainer}__{plans_name}__{name}")
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        msg = f"{folder / PLANS_FILE} does not describe the configuration {configuration}: {error}"
        raise ToolError(msg) from error


def _read_json(file: Path) -> dict[str, Any]:
    return read_object(file, no_model_folder(file.parent, file.name))
