"""What ``bundle.json`` says of a member, and where the archive keeps its files."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from .options import FoldName

MEMBERS_FOLDER = "members"
PLANS_FILE = "plans.json"
DATASET_FILE = "dataset.json"
GOLDEN_FILE = "golden.safetensors"

MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,100}$")]
"""A folder's name, and what requests and messages call the member."""


class NetworkBuilder(StrEnum):
    """Who builds the network: nnU-Net's ``get_network_from_plans``, or the trainer class's own method."""

    PLANS = "plans"
    TRAINER = "trainer"


class FoldDescription(BaseModel):
    """One trained fold.

    Attributes:
        fold: its number, or ``"all"``.
        mirroring_axes: the checkpoint's ``inference_allowed_mirroring_axes``, spatial axes from 0.
        checkpoint_sha256: of the .pth file it came from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fold: FoldName
    mirroring_axes: tuple[int, ...] | None
    checkpoint_sha256: str

    @property
    def weights_file(self) -> str:
        """Where the archive keeps the weights."""
        return f"fold_{self.fold}.safetensors"


class MemberDescription(BaseModel):
    """What ``bundle.json`` says of a member.

    Attributes:
        name: of its folder.
        dataset, trainer, plans, configuration: nnU-Net's names; ``trainer`` is the checkpoints' word.
        network_class: full name of the network's class, as nnU-Net resolved the name in plans.json when the archive was
            made; ``None`` if the plans name none.
        network_trainer: the class, of nnunetv2 or the archive's own code, whose ``build_network_architecture`` builds
            the network, where the plans alone do not say what is built.
        output_names: of the network's channels, where a label manager of the archive's own code says how many there
            are.
        source: trained model folder (its last two names) and checkpoint file name.
        input_orientation: nibabel's letters of the orientation that every image is brought into; ``None``: as sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: MemberName
    dataset: str
    trainer: str
    plans: str
    configuration: str
    network_builder: NetworkBuilder
    folds: tuple[FoldDescription, ...]
    source: dict[str, str]
    input_orientation: str | None = None
    network_class: str | None = None
    network_trainer: str | None = None
    output_names: tuple[str, ...] | None = None

    @property
    def folder(self) -> str:
        """Where the archive keeps it."""
        return f"{MEMBERS_FOLDER}/{self.name}"

    @property
    def folder_trainer(self) -> str:
        """See :func:`folder_trainer`."""
        return folder_trainer(self.source.get("folder"), self.plans, self.configuration) or self.trainer

    @property
    def files(self) -> list[str]:
        """The archive's files that say what it predicts; the golden patch, which is made of them, is none."""
        return [f"{self.folder}/{name}" for name in (PLANS_FILE, DATASET_FILE, *(f.weights_file for f in self.folds))]


def folder_trainer(folder: str | None, plans: str | None, configuration: str | None) -> str | None:
    """The trainer that nnU-Net's folder of a model is named after, which ``-tr`` of its commands means.

    Checkpoints may name another: the one whose network they hold, so that they predict without the first.

    Args:
        folder: where the model came from, as ``source`` of a member has it: ``DATASET/TRAINER__PLANS__CONFIGURATION``.
        plans: of the model.
        configuration: of the model.

    Returns:
        ``None`` if the folder has been named otherwise.

    >>> folder_trainer("Dataset004_Hippocampus/nnUNetTrainerMine__nnUNetPlans__3d_fullres", "nnUNetPlans", "3d_fullres")
    'nnUNetTrainerMine'
    >>> folder_trainer("models/hippocampus", "nnUNetPlans", "3d_fullres")
    """
    trainer, mark, rest = (folder or "").rpartition("/")[2].partition("__")
    return trainer if trainer.isidentifier() and mark and rest == f"{plans}__{configuration}" else None
