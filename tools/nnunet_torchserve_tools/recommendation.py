"""What nnU-Net found to be the best of a dataset's models, and what of it is there.

``nnUNetv2_find_best_configuration`` compares configurations and their ensembles by cross-validation, and writes which
was the best into ``inference_information.json`` beside the models. The paths in it are those of the machine where it
ran; only the names of folders in them are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from nnunet_torchserve.options import FoldName

from .errors import ToolError, UsageError
from .harmless import printable
from .postprocessing_file import FoundPostprocessing, postprocessing_in
from .trained import previous_stage_of

INFORMATION_FILE = "inference_information.json"

COMPARED = "checkpoint_final.pth"
"""With whose predictions nnU-Net compares models; with those of ``checkpoint_best.pth`` after ``--val_best``."""

_NOT_COMPARED = (
    f"not the ones that nnU-Net compared ({COMPARED}, unless nnUNetv2_train had --val_best): the choice of models, the "
    "Dice and the postprocessing may be others for them"
)
_MOST_BYTES = 2**24
_MOST_SHOWN = 3


def _folder_name(text: str) -> str:
    if not text or not text.isprintable() or set(text) & set("/\\"):
        msg = "this cannot be part of a folder's name"
        raise ValueError(msg)
    return text


_Name = Annotated[str, AfterValidator(_folder_name)]
_Fold = Annotated[int, Field(ge=0)] | Literal["all"]


class _Considered(BaseModel):
    configuration: _Name
    trainer: _Name
    plans: _Name


class _Selected(BaseModel):
    configuration: _Name
    trainer: _Name
    plans_identifier: _Name

    @property
    def folder_name(self) -> str:
        return f"{self.trainer}__{self.plans_identifier}__{self.configuration}"


class _Best(BaseModel):
    result_on_crossval_pre_pp: float | None = None
    result_on_crossval_post_pp: float | None = None
    postprocessing_file: str
    selected_model_or_models: Annotated[tuple[_Selected, ...], Field(min_length=1)]


class _Information(BaseModel):
    """What ``find_best_configuration`` saves, as far as it is needed."""

    folds: Annotated[tuple[_Fold, ...], Field(min_length=1)]
    considered_models: tuple[_Considered, ...] = ()
    ensembling_allowed: bool = True
    best_model_or_ensemble: _Best


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What nnU-Net recommends.

    Attributes:
        dataset: the name of its folder.
        models: TRAINER__PLANS__CONFIGURATION of one model, or of those of an ensemble in nnU-Net's order.
        folds: which the cross-validation had, and its inference shall have.
        evaluated: the folder below the dataset's that has the cross-validated predictions and the postprocessing.
        dice: the mean of the foreground's in cross-validation, before and after postprocessing; ``None`` if not said.
        command: of nnU-Net, that determines all this again.
    """

    dataset: str
    models: tuple[str, ...]
    folds: tuple[FoldName, ...]
    evaluated: str
    dice: tuple[float | None, float | None]
    command: str

    def first_stages(self, results: Path) -> dict[str, str]:
        """Cascade -> its first stage, as the plans of those models say that are there.

        Raises:
            UsageError, ToolError: as :func:`~.trained.previous_stage_of`.
        """
        there = [folder for name in self.models if (folder := results / self.dataset / name).is_dir()]
        first_of = {folder.name: previous_stage_of(folder) for folder in there}
        return {name: first.name for name, first in first_of.items() if first is not None}

    def postprocessing(self, results: Path) -> FoundPostprocessing:
        """What nnU-Net determined to be done to the labels.

        Raises:
            UsageError: it is not there.
            ToolError: as :func:`~.postprocessing_file.read_postprocessing`.
        """
        folder = results / self.dataset / self.evaluated
        if (found := postprocessing_in(folder)) is None:
            msg = (
                f"{folder} holds no postprocessing, which nnU-Net recommends: copy it from where it was determined, or "
                f"run {self.command}; --postprocessing none leaves it out"
            )
            raise UsageError(msg)
        return found

    def lines(
        self, first_stages: dict[str, str], checkpoint: str, *, leaves_out_postprocessing: bool
    ) -> tuple[str, ...]:
        """For people: what is packaged, and in what that is not what nnU-Net recommends.

        Args:
            first_stages: cascade -> its first stage.
            checkpoint: file name of the weights.
            leaves_out_postprocessing: because somebody wants none.
        """
        before, after = self.dice
        dice = "" if before is None else f", with a mean Dice of {before:.4f} in cross-validation"
        if before is not None and after is not None:
            dice += f" and {after:.4f} after postprocessing"
        what = "the mean of" if len(self.models) > 1 else "one model"
        steps = {name: f", whose first stage is {first}" for name, first in first_stages.items()}
        return (
            f"nnU-Net recommends for {self.dataset}{dice}: {what}",
            *(f"  {name}{steps.get(name, '')}" for name in self.models),
            f"  folds: {_spoken(self.folds)}",
            *(["  postprocessing: left out"] if leaves_out_postprocessing else []),
            *([] if checkpoint == COMPARED else [f"  weights: {checkpoint}, {_NOT_COMPARED}"]),
        )


def read_recommendation(dataset_folder: Path) -> Recommendation:
    """Read what ``nnUNetv2_find_best_configuration`` left.

    Args:
        dataset_folder: ``DATASET`` below nnU-Net's results folder.

    Raises:
        UsageError: there is nothing.
        ToolError: it is damaged, or contradicts itself.
    """
    file, dataset = dataset_folder / INFORMATION_FILE, dataset_folder.name
    again = f"nnUNetv2_find_best_configuration {dataset}"
    if not file.is_file():
        msg = (
            f"{dataset_folder} has no {INFORMATION_FILE}: nnU-Net has not said yet which of its models is the best; "
            f"run {again}, or name a model's folder in place of --dataset"
        )
        raise UsageError(msg)
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        msg = f"cannot read {file}: {error.strerror}"
        raise ToolError(msg) from error
    try:
        if len(content) > _MOST_BYTES:
            msg = f"more than {_MOST_BYTES} bytes"
            raise ValueError(msg)
        information = _Information.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = printable(".".join(map(str, first["loc"])))
        msg = f"{file} is damaged or not nnU-Net's ({where}: {first['msg']}); run {again} again"
        raise ToolError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"{file} is damaged; run {again} again"
        raise ToolError(msg) from error
    best = information.best_model_or_ensemble
    models = tuple(model.folder_name for model in best.selected_model_or_models)
    evaluated = _evaluated(models, information.folds)
    found = "/".join(PureWindowsPath(best.postprocessing_file).parts[-3:-1])  # which takes / and \ for separators
    if found != evaluated:
        msg = (
            f"{file} contradicts itself: it recommends {' and '.join(models)} with the folds "
            f"{_spoken(information.folds)}, but the postprocessing of {printable(found)}; run {again} again"
        )
        raise ToolError(msg)
    dice = (best.result_on_crossval_pre_pp, best.result_on_crossval_post_pp)
    return Recommendation(dataset, models, information.folds, evaluated, dice, _command(again, information))


def check_complete(results: Path, recommendation: Recommendation, checkpoint: str, zipped: str | None) -> None:
    """Make sure that every fold of every model is there, first stages among them.

    Args:
        results: nnU-Net's results folder, or what was unpacked of a zip.
        recommendation: what has to be there.
        checkpoint: file name within each fold's folder.
        zipped: the zip's name, if it is one.

    Raises:
        UsageError: something is missing; the message says what, and what would mend that.
    """
    first_stages = recommendation.first_stages(results)
    models = list(dict.fromkeys([*first_stages.values(), *recommendation.models]))
    missing: list[str] = []
    for name in models:
        role = ", the first stage of a cascade," if name in first_stages.values() else ""
        missing += _missing_of(results / recommendation.dataset / name, role, recommendation, checkpoint, zipped)
    if not missing:
        return
    told = "; ".join(missing[:_MOST_SHOWN])
    if len(missing) > _MOST_SHOWN:
        told += f"; and {len(missing) - _MOST_SHOWN} more"
    if zipped is not None:
        commands = dict.fromkeys(_export(zipped, models, name, recommendation) for name in models)
        told += f"; export it whole: {' and '.join(commands)}"
    msg = f"of what nnU-Net recommends for {recommendation.dataset} something is missing: {told}"
    raise UsageError(msg)


def _missing_of(
    folder: Path, role: str, recommendation: Recommendation, checkpoint: str, zipped: str | None
) -> list[str]:
    trainer, plans, configuration = folder.name.split("__", 2)

    def train(fold: object, more: str = "") -> str:
        if zipped is not None:
            return ""
        command = f"nnUNetv2_train {recommendation.dataset} {configuration} {fold} -tr {trainer} -p {plans} --npz{more}"
        return f" (copy it from where it was trained, or run {command})"

    if not folder.is_dir():
        folds = f" with the folds {_spoken(recommendation.folds)}"
        return [f"{folder}{role} does not exist{folds}{train('FOLD')}"]
    missing = []
    for fold in recommendation.folds:
        of_fold = folder / f"fold_{fold}"
        if not of_fold.is_dir():
            missing.append(f"{folder}{role} has no fold_{fold}{train(fold)}")
        elif not (of_fold / checkpoint).is_file():
            there = sorted(file.name for file in of_fold.glob("*.pth"))
            instead = f" but {_spoken(there)}" if there else ""
            missing.append(f"{of_fold} has no {checkpoint}{instead}{train(fold, ' --c' if there else '')}")
    return missing


def _evaluated(models: Sequence[str], folds: Sequence[FoldName]) -> str:
    """As ``accumulate_cv_results`` and ``get_ensemble_name`` name it."""
    joined = "_".join(map(str, folds))
    if len(models) == 1:
        return f"{models[0]}/crossval_results_folds_{joined}"
    return f"ensembles/ensemble___{'___'.join(models)}___{joined}"


def _command(again: str, information: _Information) -> str:
    considered = information.considered_models
    flags = {
        "-c": dict.fromkeys(model.configuration for model in considered),
        "-tr": dict.fromkeys(model.trainer for model in considered),
        "-p": dict.fromkeys(model.plans for model in considered),
        "-f": dict.fromkeys(map(str, information.folds)),
    }
    told = [f"{flag} {' '.join(values)}" for flag, values in flags.items() if values]
    return " ".join([again, *told, *([] if information.ensembling_allowed else ["--disable_ensembling"])])


def _export(file: str, models: Sequence[str], model: str, recommendation: Recommendation) -> str:
    """The command that exports a model, and the others of its trainer and plans."""
    trainer, plans, _ = model.split("__", 2)
    configurations = [name.split("__", 2)[2] for name in models if name.startswith(f"{trainer}__{plans}__")]
    return (
        f"nnUNetv2_export_model_to_zip -d {recommendation.dataset} -o {file} -c {' '.join(configurations)} "
        f"-tr {trainer} -p {plans} -f {' '.join(map(str, recommendation.folds))}"
    )


def _spoken(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))
