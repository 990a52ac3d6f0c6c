"""Whether the members of a recipe belong together, as nnU-Net's own files say.

Whoever makes an archive asks it of trained folders, and whoever loads one of its members: ``bundle.json`` is a text
that anybody can edit, and a first stage of another training, or a mean over classes of different meaning, would be an
answer like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import BundleError
from .options import FoldName
from .painting import integers
from .recipe import Cascade, Ensemble, Single

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained configuration, as far as others must agree with it. Its files are read when something is asked.

    Attributes:
        called: in messages: its folder, or its name in the archive.
        plans: nnU-Net's view of plans.json.
        dataset: nnU-Net's dataset.json.
        configuration, trainer: nnU-Net's names.
        folds: that it has.
        orientation: into which every image is brought for it, in nibabel's letters; ``None``: as sent.
    """

    called: str
    plans: PlansManager
    dataset: Mapping[str, Any]
    configuration: str
    trainer: str
    folds: tuple[FoldName, ...]
    orientation: str | None = None

    @property
    def previous_stage(self) -> str | None:
        """The configuration whose labels it sees, as the plans name it; ``None``: it sees none."""
        configuration = self._read("plans.json", lambda: self.plans.get_configuration(self.configuration))
        name: str | None = configuration.previous_stage_name
        return name

    def training(self) -> dict[str, object]:
        """What the stages of a cascade have in common beside what :meth:`question` has."""
        return {
            "trainer": self.trainer,
            "plans": self._read("plans.json", lambda: str(self.plans.plans["plans_name"])),
            "dataset": self._read("plans.json", lambda: str(self.plans.plans["dataset_name"])),
            "folds": sorted(map(str, self.folds)),
        }

    def question(self) -> dict[str, object]:
        """What is asked of it, about which images: all members of a recipe have that in common."""
        return {
            "labels": self._read("dataset.json: labels", self._labels),
            "regions_class_order": self._read("dataset.json: regions_class_order", self._order),
            "channels": self._read("dataset.json: channel_names", self._channels),
            "image reader": self._read("plans.json", lambda: str(self.plans.plans["image_reader_writer"])),
            "label manager": self._read("plans.json", self._label_manager),
            "input orientation": self.orientation,
        }

    def _labels(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(str(name), tuple(integers(label))) for name, label in self.dataset["labels"].items()]

    def _order(self) -> list[int] | None:
        order: Any = self.dataset.get("regions_class_order")
        has_regions = self.plans.get_label_manager(self.dataset).has_regions
        return [int(value) for value in order or ()] if has_regions else None

    def _channels(self) -> list[str]:
        names: Any = self.dataset.get("modality") or self.dataset.get("channel_names") or {}
        return [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]

    def _label_manager(self) -> str:
        kind = self.plans.label_manager_class
        return f"{kind.__module__}.{kind.__qualname__}"

    def _read(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except BundleError:
            raise
        except Exception as error:  # somebody's own label manager may raise anything
            msg = f"{self.called}: {what} cannot be read: {type(error).__name__} {error}"
            raise BundleError(msg) from error


def why_no_first_stage(first: Trained, last: Trained) -> str | None:
    """Why one model cannot be the first stage of another; ``None`` if it is.

    A cascade's stages are of one training: the plans name the first, and it has the same folds.

    Raises:
        BundleError: a file of theirs cannot be read.
    """
    has = {"configuration": first.configuration} | first.training() | first.question()
    needs = {"configuration": last.previous_stage} | last.training() | last.question()
    for what, value in has.items():
        if value != needs[what]:
            return f"{first.called} is no first stage of {last.called}: it has the {what} {value}, not {needs[what]}"
    return None


def why_no_ensemble(one: Trained, other: Trained) -> str | None:
    """Why the probabilities of two models have no mean; ``None`` if they have: they answer one question.

    Raises:
        BundleError: a file of theirs cannot be read.
    """
    ours, theirs = one.question(), other.question()
    for what, value in ours.items():
        if value != theirs[what]:
            return f"{one.called} and {other.called} are no ensemble: their {what} differ, {value} and {theirs[what]}"
    return None


def check_recipe(recipe: Single | Cascade | Ensemble, members: Mapping[str, Trained]) -> None:
    """Refuse a recipe that its members do not bear out.

    Args:
        recipe: of the archive.
        members: name -> what it names.

    Raises:
        BundleError: a member has no fold, or one twice; what is taken for a cascade is none, or the other way round; a
            first stage is another's, or is missing in an ensemble; the models of an ensemble do not answer one
            question. Or a file cannot be read.
    """
    for member in members.values():
        if not member.folds or len(set(member.folds)) != len(member.folds):
            msg = f"{member.called} has the folds {list(member.folds)}; it needs one at least, and none twice"
            raise BundleError(msg)
    models = recipe.of if isinstance(recipe, Ensemble) else (recipe,)
    for model in models:
        if isinstance(model, Single):
            _check_alone(members[model.member], "and the recipe gives it none")
        else:
            _check_cascade(model, members, is_whole=model is recipe)
    one = members[models[0].member]
    for place, model in enumerate(models[1:], 1):
        if any(model.member == before.member for before in models[:place]):
            msg = f"the ensemble names {members[model.member].called} twice; it is of different models"
            raise BundleError(msg)
        if (reason := why_no_ensemble(one, members[model.member])) is not None:
            raise BundleError(reason)


def _check_alone(member: Trained, but: str) -> None:
    if (previous := member.previous_stage) is not None:
        msg = f"{member.called} is the second stage of a cascade: it needs the labels of {previous}, {but}"
        raise BundleError(msg)


def _check_cascade(model: Cascade, members: Mapping[str, Trained], *, is_whole: bool) -> None:
    last = members[model.member]
    if last.previous_stage is None:
        msg = f"{last.called} is no second stage of a cascade: its plans name no previous stage"
        raise BundleError(msg)
    if model.first is not None:
        first = members[model.first.member]
        if (reason := why_no_first_stage(first, last)) is not None:
            raise BundleError(reason)
        _check_alone(first, "and a first stage gets none")
    elif not is_whole:
        _check_alone(last, "and requests bring none to an ensemble")
