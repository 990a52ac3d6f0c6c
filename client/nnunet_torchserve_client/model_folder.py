"""What a trained model folder of this machine says it is, read without nnU-Net and without opening a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import MissingFolder, Path_
from .description import Description, ServedModel
from .errors import UnreadableFile, WrongModel, WrongUse

Folds = tuple[int | str, ...]

_NAME_PARTS = 3


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder.

    Attributes:
        dataset, plans: names that its plans.json gives.
        trainer, configuration: from the folder's name; ``None`` if that was changed, for only a checkpoint has them
            otherwise.
        folds: those with the checkpoint in them, by number.
    """

    dataset: str
    plans: str
    trainer: str | None
    configuration: str | None
    folds: Folds

    @classmethod
    def read(cls, folder: Path_, checkpoint: str) -> ModelFolder:
        """Read it.

        Raises:
            MissingFolder: ``dataset.json`` or ``plans.json`` is not there.
            UnreadableFile: one of them is not nnU-Net's.
        """
        home = Path(folder)
        _document(home / "dataset.json")
        plans = _document(home / "plans.json")
        parts = home.resolve().name.split("__")
        trainer, _, configuration = parts if len(parts) == _NAME_PARTS else (None, None, None)
        numbers = sorted(
            int(each.name.removeprefix("fold_"))
            for each in home.glob("fold_*")
            if each.name.removeprefix("fold_").isdigit() and (each / checkpoint).is_file()
        )
        return cls(str(plans.get("dataset_name")), str(plans.get("plans_name")), trainer, configuration, tuple(numbers))

    def check(self, description: Description, checkpoint: str, folds: Folds | None) -> None:
        """Raise unless a served model is this one.

        Args:
            description: the server's.
            checkpoint: file name that was asked for.
            folds: that were asked for; ``None`` if any.

        Raises:
            WrongModel: another dataset, trainer, plans, configuration or checkpoint, it lacks a fold, or it is an
                ensemble.
        """
        model = description.model
        names = ("dataset", "plans", "configuration")
        wrong = [
            f"{name} {getattr(model, name)}, not {wanted}"
            for name in names
            if (wanted := getattr(self, name)) is not None and wanted != getattr(model, name)
        ]
        if self.trainer is not None and not model.is_of_trainer(self.trainer):
            wrong.append(f"trainer {model.trained_by}, not {self.trainer}")
        if checkpoint != model.checkpoint:
            wrong.append(f"checkpoint {model.checkpoint}, not {checkpoint}")
        if model.is_ensemble:
            wrong.append(f"an {model.made_of}, not one folder's model")
        missing = [fold for fold in folds or () if fold not in model.folds]
        if missing:
            wrong.append(f"folds {_listed(model.folds)}, without {_listed(tuple(missing))}")
        if wrong:
            others = ", ".join(_named(each) for each in description.served or ())
            msg = f"the served model has {'; '.join(wrong)}" + (f". This server has {others}" if others else "")
            raise WrongModel(msg)


def as_folds(given: int | str | Sequence[int | str] | None) -> Folds | None:
    """As nnU-Net takes them: numbers, texts of numbers, ``"all"``, one of them or several."""
    if given is None:
        return None
    several = [given] if isinstance(given, int | str) else list(given)
    try:
        folds = tuple(fold if fold == "all" else int(fold) for fold in several)
    except (TypeError, ValueError) as error:
        msg = f"use_folds is numbers or 'all', not {given!r}"
        raise WrongUse(msg) from error
    return folds or None


def _listed(folds: Folds) -> str:
    return ", ".join(map(str, folds)) or "none"


def _named(model: ServedModel) -> str:
    return f"{model.name} {model.version} ({model.dataset}, {model.made_of})"


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        msg = f"{os.fspath(path)} is not there; a trained model folder has it. A server needs none: leave the call out"
        raise MissingFolder(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{os.fspath(path)} cannot be read as JSON"
        raise UnreadableFile(msg) from error
    if not isinstance(document, dict):
        msg = f"{os.fspath(path)} is not nnU-Net's"
        raise UnreadableFile(msg)
    return document
