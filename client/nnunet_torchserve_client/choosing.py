"""Which served model is meant, where nnU-Net's commands say dataset, trainer, plans and configuration.

A server tells which models it has, but it is asked through one of them: TorchServe's inference port has no list. So the
question goes to the name that was given, or else to those that ``nnunet-torchserve archive`` gives by itself.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from .cases import Path_
from .description import Description, ServedModel
from .errors import WrongModel, WrongUse

Folds = tuple[int | str, ...]

NNUNET_FOLDERS = ("nnUNet_results", "nnUNet_preprocessed", "nnUNet_raw")
"""Environment variables of nnU-Net that name folders with a folder for each dataset."""

_NUMBER = re.compile(r"Dataset(\d+)(?:_|$)")
_FOLDER_PARTS = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model must be made of; ``None`` is anything.

    Attributes:
        dataset: nnU-Net's name or number of it.
        trainer: of the folder that nnU-Net would look for, or of the checkpoints in it.
        plans, configuration: nnU-Net's names.
        checkpoint: file name that the weights came from.
    """

    dataset: str | None = None
    trainer: str | None = None
    plans: str | None = None
    configuration: str | None = None
    checkpoint: str | None = None

    def fits(self, model: ServedModel) -> bool:
        """Whether a served model is one of these."""
        return not self.differences(model)

    def differences(self, model: ServedModel) -> list[str]:
        """What a served model has otherwise, in words."""
        names = {field.name: getattr(model, field.name) for field in fields(self)} | {"trainer": model.trained_by}
        wrong = [
            f"{name} {has}, not {wanted}"
            for name, has in names.items()
            if (wanted := getattr(self, name)) is not None
            and wanted != has
            and not (name == "trainer" and model.is_of_trainer(wanted))
            and not (name == "dataset" and wanted.isdigit() and int(wanted) == _number(model.dataset))
        ]
        if model.is_ensemble and self.configuration is not None:
            wrong.append(f"an {model.made_of}, not {self.configuration} alone (--model without it takes that)")
        return wrong

    def __str__(self) -> str:
        known = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ", ".join(f"{name} {value}" for name, value in known if value is not None) or "any model"


def wanted_of_folder(folder: Path_, checkpoint: str | None) -> Wanted:
    """What a trained model folder holds, by its names: nnU-Net's ``DATASET/TRAINER__PLANS__CONFIGURATION``.

    The folder need not be on this machine: a server has the model. Where it is, its plans.json says the dataset, for a
    copy may lie anywhere.

    Raises:
        WrongUse: it is no such name.
    """
    path = Path(folder).absolute()
    parts = path.name.split("__")
    if len(parts) != _FOLDER_PARTS:
        msg = f"{folder}: nnU-Net's folder of a trained model is named TRAINER__PLANS__CONFIGURATION; or give --model"
        raise WrongUse(msg)
    dataset: str | None = path.parent.name if _number(path.parent.name) is not None else None
    try:
        dataset = str(json.loads((path / "plans.json").read_text())["dataset_name"])
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path / 'plans.json'} is not nnU-Net's"
        raise WrongUse(msg) from error
    if dataset is None:
        msg = f"{folder} is not there, and its name does not say which dataset it is of; give --model"
        raise WrongUse(msg)
    trainer, plans, configuration = parts
    return Wanted(dataset, trainer, plans, configuration, checkpoint)


def archive_name(dataset: str, configuration: str) -> str:
    """What ``nnunet-torchserve archive`` calls a model that nobody named."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", f"{dataset}_{configuration}")


def likely_names(wanted: Wanted) -> Iterator[str]:
    """Names under which the wanted model may be served, as far as nobody named it."""
    if wanted.dataset is None or wanted.configuration is None:
        return
    for dataset in _names_of_dataset(wanted.dataset):
        yield archive_name(dataset, wanted.configuration)


def choose(wanted: Wanted, folds: Folds | None, version: str | None, described: Description) -> ServedModel:
    """The served model that is meant.

    Args:
        wanted: what it must be made of.
        folds: that it must have; ``None`` for any.
        version: that it must have; ``None`` for any.
        described: any model of the server.

    Raises:
        WrongModel: none fits, or more than one does.
    """
    served = described.served or ()
    fitting = [
        model
        for model in served
        if wanted.fits(model) and set(folds or ()) <= set(model.folds) and version in (None, model.version)
    ]
    if not fitting:
        also = f", with folds {listed_folds(folds)}" if folds else ""
        msg = f"no served model is of {wanted}{also}. This server has {_listed(served) or 'none'}"
        raise WrongModel(msg)
    fitting = [model for model in fitting if model.trained_by == wanted.trainer] or fitting  # as nnU-Net's folders
    if len({model.digest for model in fitting}) > 1:
        msg = f"more than one served model is of {wanted}: {_listed(fitting)}. Choose with --model and --version"
        raise WrongModel(msg)
    return fitting[0]


def check(wanted: Wanted, folds: Folds | None, described: Description) -> None:
    """Raise unless a model that was chosen by its name is what is wanted.

    Raises:
        WrongModel: it is of another dataset, trainer, plans, configuration or checkpoint, lacks a fold, or is an
            ensemble where one configuration is wanted.
    """
    wrong = wanted.differences(described.model)
    missing = [fold for fold in folds or () if fold not in described.model.folds]
    if missing:
        wrong.append(f"folds {listed_folds(described.model.folds)}, without {listed_folds(missing)}")
    if wrong:
        others = f". This server has {_listed(described.served)}" if described.served else ""
        msg = f"the served model has {'; '.join(wrong)}{others}"
        raise WrongModel(msg)


def listed_folds(folds: Sequence[int | str]) -> str:
    """For messages."""
    return ", ".join(map(str, folds)) or "none"


def _listed(models: Sequence[ServedModel]) -> str:
    return "; ".join(
        f"{model.name} {model.version} ({model.dataset}, {model.made_of}, {model.checkpoint}, "
        f"folds {listed_folds(model.folds)})"
        for model in models
    )


def _number(dataset: str) -> int | None:
    match = _NUMBER.match(dataset)
    return int(match[1]) if match else None


def _names_of_dataset(name_or_number: str) -> list[str]:
    """Names of a dataset: its own, or those that nnU-Net's folders of this machine have for its number."""
    if not name_or_number.isdigit():
        return [name_or_number]
    homes = [Path(home) for variable in NNUNET_FOLDERS if (home := os.environ.get(variable))]
    names = {each.name for home in homes if home.is_dir() for each in home.glob("Dataset*") if each.is_dir()}
    return sorted(name for name in names if _number(name) == int(name_or_number))
