"""Checkpoints that name the trainer whose network they hold.

nnU-Net builds the network of a checkpoint by the trainer that it names. A trainer that changes something else has the
network of the class that it inherits ``build_network_architecture`` from; if that is one of nnU-Net's own, its name
lets everybody predict, export and serve the model without the other trainer's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Trainer
else:
    Trainer = object

_PACKAGE = "nnunetv2."
_BUILDER = "build_network_architecture"


class StockNameMixin(Trainer):  # type: ignore[misc]
    """Names nnU-Net's trainer in the checkpoints of a trainer that has its network.

    The results folder keeps the name of the trainer that was asked for. A trainer with a network of its own is named as
    ever.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a mixin that is named behind its trainer: Python would take the trainer's methods, and say nothing.

        Raises:
            TypeError: it is.
        """
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if nnUNetTrainer in order and order.index(nnUNetTrainer) < order.index(StockNameMixin):
            late = [base.__name__ for base in cls.__bases__ if nnUNetTrainer not in base.__mro__]
            msg = f"{cls.__name__}: name {', '.join(late)} before the trainer; behind it, it does nothing"
            raise TypeError(msg)

    def save_checkpoint(self, filename: str) -> None:
        """As the trainer's that is inherited from; then a file with the other name takes its place, at once."""
        super().save_checkpoint(filename)
        file, name = Path(filename), network_trainer_name(type(self))
        if name is not None and self.local_rank == 0 and file.is_file():
            _rename_trainer(file, type(self).__name__, name)


def network_trainer_name(trainer: type) -> str | None:
    """The trainer of nnU-Net whose network a trainer has; ``None`` if that is its own, or another one's."""
    owner = next(each for each in trainer.__mro__ if _BUILDER in vars(each))
    is_of_nobody_else = isinstance(vars(owner)[_BUILDER], staticmethod)  # a subclass cannot change what it builds
    return owner.__name__ if is_of_nobody_else and owner.__module__.startswith(_PACKAGE) else None


def _rename_trainer(file: Path, expected: str, name: str) -> None:
    """Change the trainer's name in a checkpoint, unless it is another one already."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)  # this training wrote it
    if checkpoint["trainer_name"] != expected:
        return
    part = file.with_name(f"{file.name}.part")
    torch.save(checkpoint | {"trainer_name": name}, part)
    part.replace(file)
