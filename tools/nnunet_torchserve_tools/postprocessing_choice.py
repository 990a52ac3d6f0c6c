"""Which postprocessing goes into an archive, and whether it fits the model that is packed.

nnU-Net determines it for certain models with certain folds. An archive of other folds of them must not get it unless
somebody names its file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_torchserve.options import FoldName
from nnunet_torchserve.postprocessing import Postprocessing
from nnunet_torchserve.recipe import Ensemble

from .composition import Composition
from .errors import ModelWarning, ToolError, UsageError
from .postprocessing_file import (
    FoundPostprocessing,
    postprocessing_of_ensemble,
    postprocessing_of_folds,
    read_postprocessing,
)
from .trained import TrainedModel

_SHORTEST_RANGE = 3
_MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PostprocessingChoice:
    """What was asked for.

    Attributes:
        source: nnU-Net's file; ``"auto"``: what nnU-Net determined for exactly the packed models and folds; ``None``:
            nothing.
        folds: for which nnU-Net determined what the file says: archives of others get that of their own, as with
            ``"auto"``. ``None``: whatever is packed gets it.
        folders: ``TRAINER__PLANS__CONFIGURATION`` of the model, or of those of an ensemble.
    """

    source: Path | Literal["auto"] | None
    folds: tuple[FoldName, ...] | None
    folders: tuple[Path, ...]

    def of(self, composition: Composition) -> FoundPostprocessing | None:
        """For an archive of that.

        Raises:
            UsageError: there is none, or no such file.
            ToolError: it is damaged, cannot be served, or is of another model.
        """
        if self.source is None:
            return None
        found = self._found(self.source, composition)
        _check_fits(found, composition.lead)
        return found

    def of_folds(self, archives: dict[str, Composition]) -> dict[str, FoundPostprocessing | None]:
        """For archives of one fold each.

        Args:
            archives: name -> what it holds.

        Raises:
            UsageError, ToolError: as :meth:`of`; not if nnU-Net determined none for a fold alone.

        Warns:
            ModelWarning: that is so.
        """
        found: dict[str, FoundPostprocessing | None] = {}
        lacking: list[str] = []
        for name, composition in archives.items():
            try:
                found[name] = self.of(composition)
            except UsageError:
                if self._is_file_for(composition):
                    raise
                found[name] = None
                lacking.append(name)
        if lacking:
            msg = f"without postprocessing, as nnU-Net determined none for one fold alone: {', '.join(lacking)}"
            warnings.warn(msg, ModelWarning, stacklevel=3)
        return found

    def told(self, name: str, found: FoundPostprocessing) -> str:
        """For people: what an archive has, and whence.

        Args:
            name: the archive's.
            found: of this choice.
        """
        file, dataset = found.file.absolute(), self.folders[0].absolute().parent
        place = file.relative_to(dataset) if file.is_relative_to(dataset) else found.file
        return f"{name}: postprocessing: {in_words(found.postprocessing)} ({place})"

    def _is_file_for(self, composition: Composition) -> bool:
        named = isinstance(self.source, Path)
        return named and (self.folds is None or set(self.folds) == set(composition.lead.folds))

    def _found(self, source: Path | Literal["auto"], composition: Composition) -> FoundPostprocessing:
        if isinstance(source, Path) and self._is_file_for(composition):
            return FoundPostprocessing(source, read_postprocessing(source))
        folds = composition.lead.folds
        if not isinstance(composition.recipe, Ensemble):
            return postprocessing_of_folds(self.folders[0], folds)
        if len({frozenset(model.folds) for model in composition.members.values()}) > 1:
            msg = "--postprocessing auto: the models have different folds; choose with --folds, or name a file"
            raise UsageError(msg)
        return postprocessing_of_ensemble(self.folders, folds)


def in_words(postprocessing: Postprocessing) -> str:
    """For people: its steps, in their order."""
    steps = postprocessing.steps
    if not steps:
        return "none, as no step improved the Dice"
    count = "1 step" if len(steps) == 1 else f"{len(steps)} steps"
    kept = [_ranges(step.labels) for step in steps[:_MOST_SHOWN]]
    more = "" if len(steps) <= _MOST_SHOWN else f", and {len(steps) - _MOST_SHOWN} more"
    return f"{count}: only the largest component stays of {', then of '.join(kept)}{more}"


def _ranges(labels: Sequence[int]) -> str:
    """As in "1-4, 7"; numbers in their order."""
    starts = [0, *(place for place, (one, other) in enumerate(pairwise(labels), 1) if other != one + 1), len(labels)]
    runs = [labels[start:end] for start, end in pairwise(starts)]
    spoken = [[f"{run[0]}-{run[-1]}"] if len(run) >= _SHORTEST_RANGE else map(str, run) for run in runs if run]
    return ", ".join(text for texts in spoken for text in texts) or "nothing"


def _check_fits(found: FoundPostprocessing, model: TrainedModel) -> None:
    """Refuse steps that are another model's: of labels that this one does not have, or more than nnU-Net makes."""
    labels = model.manager().get_label_manager(model.dataset)
    if type(labels) is not LabelManager:
        return  # what somebody's own paints is not known here
    steps = found.postprocessing.steps
    order = labels.regions_class_order if labels.has_regions else None
    known = {0, *map(int, labels.all_labels), *map(int, order or ())}
    named = {label for step in steps for label in (*step.labels, step.background)}
    if unknown := sorted(named - known):
        msg = (
            f"{found.file} is of another model: it has steps for {_labels(unknown)}, this model has "
            f"{_labels(sorted(known))}"
        )
        raise ToolError(msg)
    most = 1 + len(labels.foreground_regions if labels.has_regions else labels.foreground_labels)
    if len(steps) > most:
        msg = f"{found.file} is of another model: it has {len(steps)} steps, nnU-Net determines at most {most} for this"
        raise ToolError(msg)


def _labels(values: Sequence[int]) -> str:
    return f"the label{'s' if len(values) > 1 else ''} {_ranges(values)}"
