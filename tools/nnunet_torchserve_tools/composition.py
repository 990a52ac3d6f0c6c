"""Trained models become the members of one archive, and the recipe that makes one answer of them.

What cannot be combined is refused, by name: a first stage that is not the one of the plans, models whose labels,
channels or readers are not the same (:mod:`nnunet_torchserve.agreement`, which whoever loads an archive asks too).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_torchserve.agreement import check_recipe, why_no_first_stage
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.options import FoldName
from nnunet_torchserve.recipe import Cascade, Ensemble, Recipe, Single, last_stage

from .errors import ModelWarning, ToolError, UsageError
from .trained import TrainedModel

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Composition:
    """What an archive holds.

    Attributes:
        members: name -> model, in the order in which the recipe needs them.
        recipe: what is made of them.
    """

    members: Mapping[str, TrainedModel]
    recipe: Recipe

    @property
    def lead(self) -> TrainedModel:
        """See :class:`~nnunet_torchserve.bundle.ModelBundle`."""
        return self.members[last_stage(self.recipe)]

    def of_fold(self, fold: FoldName) -> Composition:
        """A single model with one of its folds."""
        return Composition({name: model.of_folds((fold,)) for name, model in self.members.items()}, self.recipe)

    @property
    def name(self) -> str:
        """What the configuration is called in the archive's own name."""
        if isinstance(self.recipe, Ensemble):
            return "ensemble"
        return self.members[self.recipe.member].configuration


def compose(models: Sequence[TrainedModel], first_stages: Sequence[TrainedModel] = ()) -> Composition:
    """Put models together.

    Args:
        models: one, or those of an ensemble in nnU-Net's order.
        first_stages: of the cascades among them; each takes the one that fits it.

    Raises:
        UsageError: a model is named twice; a first stage that no model has, or one that is missing in an ensemble.
        ToolError: models that do not fit together.

    Warns:
        ModelWarning: the models of an ensemble have different folds.
    """
    folders = [model.folder.resolve() for model in models]
    if len(set(folders)) != len(folders):
        msg = "an ensemble is of different models: a folder is named twice"
        raise UsageError(msg)
    try:
        return _composed(models, first_stages)
    except BundleError as error:
        raise ToolError(str(error)) from error


def _composed(models: Sequence[TrainedModel], first_stages: Sequence[TrainedModel]) -> Composition:
    first_of = _first_of(models, first_stages)
    everybody = _with_first_stages(models, first_of)
    names = _names(everybody)

    def stage(model: TrainedModel) -> Single | Cascade:
        folder = model.folder.resolve()
        if not _is_cascade(model):
            return Single(member=names[folder])
        first = first_of.get(folder)
        return Cascade(
            first=None if first is None else Single(member=names[first.folder.resolve()]), member=names[folder]
        )

    recipes = [stage(model) for model in models]
    recipe = recipes[0] if len(recipes) == 1 else Ensemble(of=tuple(recipes))
    members = {names[model.folder.resolve()]: model for model in everybody}
    check_recipe(recipe, {name: model.trained() for name, model in members.items()})
    _warn_of_folds(models)
    return Composition(members, recipe)


def _is_cascade(model: TrainedModel) -> bool:
    return model.trained().previous_stage is not None


def _first_of(models: Sequence[TrainedModel], first_stages: Sequence[TrainedModel]) -> dict[Path, TrainedModel]:
    """A cascade's folder -> its first stage."""
    cascades = [model for model in models if _is_cascade(model)]
    if first_stages and not cascades:
        msg = f"--previous-stage {_spoken(first_stages)}: {_spoken(models)} has no previous stage in its plans"
        raise UsageError(msg)
    if not first_stages:
        if cascades and len(models) > 1:
            msg = f"{_spoken(cascades)} is the second stage of a cascade: name the first with --previous-stage"
            raise UsageError(msg)
        return {}
    own = {first.folder.resolve() for first in first_stages} & {cascade.folder.resolve() for cascade in cascades}
    if own:
        msg = "--previous-stage is the model's own folder; name that of the first stage"
        raise UsageError(msg)
    found: dict[Path, TrainedModel] = {}
    for cascade in cascades:
        reasons = [why_no_first_stage(first.trained(), cascade.trained()) for first in first_stages]
        if None not in reasons:
            raise ToolError("; ".join(reason for reason in reasons if reason))
        found[cascade.folder.resolve()] = first_stages[reasons.index(None)]
    used = {first.folder for first in found.values()}
    if unused := [first for first in first_stages if first.folder not in used]:
        msg = f"--previous-stage {_spoken(unused)}: no model needs it"
        raise UsageError(msg)
    return found


def _with_first_stages(models: Sequence[TrainedModel], first_of: Mapping[Path, TrainedModel]) -> list[TrainedModel]:
    """All of them, each once, a first stage before the first cascade."""
    found: dict[Path, TrainedModel] = {}
    for model in models:
        first = first_of.get(model.folder.resolve())
        for each in (model,) if first is None else (first, model):
            found.setdefault(each.folder.resolve(), each)
    return list(found.values())


def _names(models: Sequence[TrainedModel]) -> dict[Path, str]:
    """A name for each folder: the configuration, or what else tells models of one configuration apart."""
    spellings = (
        lambda model: model.configuration,
        lambda model: f"{model.trainer}__{model.plans_name}__{model.configuration}",
        lambda model: f"{model.dataset_name}__{model.trainer}__{model.plans_name}__{model.configuration}",
    )
    for spell in spellings:
        names = [_NOT_IN_NAMES.sub("_", spell(model))[-_LONGEST_NAME:] for model in models]
        if len(set(names)) == len(names):
            break
    else:
        names = [f"model_{number}" for number in range(len(models))]
    return {model.folder.resolve(): name for model, name in zip(models, names, strict=True)}


def _warn_of_folds(models: Sequence[TrainedModel]) -> None:
    """Each model is the mean of its own folds: one that lacks some is easily forgotten."""
    if len({frozenset(model.folds) for model in models}) < 2:  # noqa: PLR2004
        return
    folds = {"/".join(model.folder.resolve().parts[-2:]): ", ".join(map(str, model.folds)) for model in models}
    told = "; ".join(f"{name} has {its}" for name, its in folds.items())
    msg = (
        f"the models of the ensemble have different folds, and each model counts as one: {told}. Choose folds that all "
        "of them have with --folds, or train the others."
    )
    warnings.warn(msg, ModelWarning, stacklevel=5)


def _spoken(models: Sequence[TrainedModel]) -> str:
    return ", ".join(str(model.folder) for model in models)
