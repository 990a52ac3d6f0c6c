"""What an archive is to be made of, how it is named, and how it is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.options import FoldName

from .serving_settings import ServingSettings
from .validation_cases import Validation


@dataclass(frozen=True, slots=True)
class ArchiveRequest:
    """What to package.

    Attributes:
        model_folder: nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder.
        output: where the archives go.
        others: more such folders, which are an ensemble with the first.
        previous_stages: the folders of the first stages of the cascades among them.
        postprocessing: nnU-Net's file, or ``"auto"`` for the one of exactly these models and folds, for each archive.
        postprocessing_folds: for which nnU-Net determined what the file says, so that archives of others do not get it;
            ``None``: every archive gets it.
        folds: ``None`` takes every numbered fold.
        per_fold: also make one archive for each fold.
        name: ``None`` makes one of dataset and configuration.
        version: TorchServe model version.
        checkpoint: file name within each fold's folder.
        trust_checkpoint: open checkpoints as ordinary pickles.
        trainer_files: somebody's own code, which the models need and every server of the archive runs.
        requires: what that needs, as ``PACKAGE==VERSION``.
        input_orientation: nibabel's letters of the orientation that the model was trained in, every image is brought
            into it; ``None``: images are taken as they are sent, as nnU-Net takes them.
        segments: JSON with what the model's structures are, in codes, see :mod:`nnunet_torchserve.segments`.
        backend: that the archive is made for beside eager, and served with unless somebody says otherwise.
        calibration: folders and files of the images that int8 is calibrated on; as in :class:`.Validation`.
        validation: on what that backend is compared with eager before the archive is written; the archive gets the
            report. ``None`` compares the golden patch only.
        serving: what goes to model-config.yaml.
    """

    model_folder: Path
    output: Path
    others: tuple[Path, ...] = ()
    previous_stages: tuple[Path, ...] = ()
    postprocessing: Path | Literal["auto"] | None = None
    postprocessing_folds: tuple[FoldName, ...] | None = None
    folds: tuple[FoldName, ...] | None = None
    per_fold: bool = False
    name: str | None = None
    version: str = "1.0"
    checkpoint: str = "checkpoint_final.pth"
    trust_checkpoint: bool = False
    trainer_files: tuple[Path, ...] = ()
    requires: tuple[str, ...] = ()
    input_orientation: str | None = None
    segments: Path | None = None
    backend: Backend = Backend.EAGER
    calibration: tuple[Path, ...] = ()
    validation: Validation | None = None
    serving: ServingSettings = field(default_factory=ServingSettings)
