"""The models that a server was started with: ``serve`` writes them down, workers tell whoever asks for a description.

The file lies in the server's private directory (:mod:`.draining`), is written before TorchServe starts and never
after. A model that is registered later is not in it; neither is any of a TorchServe that ``serve`` did not start.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from .bundle import SCHEMA_VERSION
from .member_description import folder_trainer
from .options import FoldName

SERVED_FILE = "served.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One version of one model. What its archive does not say is ``None``.

    Attributes:
        name, version: TorchServe's.
        dataset, trainer, plans, configuration: nnU-Net's names.
        folds: in the archive.
        checkpoint: file name of the checkpoints that it was made of.
        digest: of the archive, as ``X-Nnunet-Model`` has it.
        recipe: of the archive, whose last stage's names these are; of an ensemble, those of its first model.
        folder_trainer: the trainer that nnU-Net's folder was named after; ``trainer`` is the checkpoints' word.
    """

    name: str
    version: str
    dataset: str | None
    trainer: str | None
    plans: str | None
    configuration: str | None
    folds: tuple[FoldName, ...]
    checkpoint: str | None
    digest: str
    recipe: dict[str, Any] | None = field(default=None, hash=False)
    folder_trainer: str | None = None


class _Loose(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Fold(_Loose):
    fold: FoldName


class _Source(_Loose):
    checkpoint: str | None = None
    folder: str | None = None


class _Trained(_Loose):
    """A member; or a whole archive, as far as it says the same in the same words."""

    name: str | None = None
    dataset: str | None = None
    trainer: str | None = None
    plans: str | None = None
    configuration: str | None = None
    folds: tuple[_Fold, ...] = ()
    source: _Source = _Source()


class _Archive(_Trained):
    """``bundle.json`` of whatever schema.

    An archive brings its own serving core, which may be another one than this: what only one of them knows is no
    reason to refuse it.
    """

    schema_version: int | None = None


class _Bundle(_Loose):
    """``bundle.json`` of this core's schema."""

    members: tuple[_Trained, ...] = ()
    recipe: dict[str, Any] = {}

    @property
    def lead(self) -> _Trained:
        """See :class:`~.bundle.ModelBundle`."""
        stage = self.recipe
        while isinstance(of := stage.get("of"), list) and of:
            stage = of[0]
        named = [member for member in self.members if member.name == stage.get("member")]
        return named[0] if named else _Trained()


def served_model(name: str, version: str, bundle: bytes) -> ServedModel:
    """What an archive says of itself.

    Args:
        name: TorchServe's.
        version: TorchServe's.
        bundle: the archive's ``bundle.json``.

    Raises:
        ValueError: that is none.
    """
    archive = _Archive.model_validate_json(bundle)
    ours = _Bundle.model_validate_json(bundle) if archive.schema_version == SCHEMA_VERSION else None
    described = archive if ours is None else ours.lead
    return ServedModel(
        name,
        version,
        described.dataset,
        described.trainer,
        described.plans,
        described.configuration,
        tuple(fold.fold for fold in described.folds),
        described.source.checkpoint,
        f"sha256:{hashlib.sha256(bundle).hexdigest()}",
        None if ours is None else ours.recipe,
        folder_trainer(described.source.folder, described.plans, described.configuration) or described.trainer,
    )


def write_served(folder: Path, models: Sequence[ServedModel]) -> None:
    """Write them into a server's private directory."""
    (folder / SERVED_FILE).write_text(json.dumps([asdict(model) for model in models], indent=2))


def read_served(folder: Path | None) -> list[dict[str, Any]] | None:
    """The models as :class:`ServedModel` has them; ``None`` if ``serve`` did not start this server."""
    if folder is None:
        return None
    try:
        models: list[dict[str, Any]] = json.loads((folder / SERVED_FILE).read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("the list of served models cannot be read: %s", type(error).__name__)
        return None
    return models
