"""nnU-Net's trainer for minutes on a CPU, alone and with a teacher: same weights to begin with, same batches.

nnU-Net finds it through ``nnUNet_extTrainer``. Beside the number of steps, the optimizer is another one: a thousand
steps are too few for SGD with momentum 0.99. Every epoch begins with a seed of its own, so that a training that was
ended goes on with the batches that it would have had, and the two trainers see the same. That holds where nnU-Net
augments in the training's own process (``nnUNet_n_proc_DA=0``).
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_torchserve_trainers.distillation import DistillMixin
from nnunet_torchserve_trainers.stock_name import StockNameMixin

EPOCHS_VARIABLE, ITERATIONS_VARIABLE = "NNUNET_TORCHSERVE_BRIEF_EPOCHS", "NNUNET_TORCHSERVE_BRIEF_ITERATIONS"
"""Environment variables, if it shall be others than the recipe's."""

EPOCHS, ITERATIONS, VALIDATION_ITERATIONS = 45, 40, 4
LEARNING_RATE = 5e-3
SEED = 20261129


class nnUNetTrainerBrief(StockNameMixin, nnUNetTrainer):  # type: ignore[misc]
    """Few steps, with AdamW."""

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature, which it looks at)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get(EPOCHS_VARIABLE, EPOCHS))
        self.num_iterations_per_epoch = int(os.environ.get(ITERATIONS_VARIABLE, ITERATIONS))
        self.num_val_iterations_per_epoch = VALIDATION_ITERATIONS
        self.initial_lr = LEARNING_RATE
        self.save_every = 1

    def initialize(self) -> None:
        """As nnU-Net's, with a seed for the weights."""
        _seed(SEED)
        super().initialize()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW, with nnU-Net's polynomial decay."""
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def on_epoch_start(self) -> None:
        """As nnU-Net's, with a seed for the epoch's batches."""
        super().on_epoch_start()
        _seed(SEED + 1 + self.current_epoch)


class nnUNetTrainerBriefDistill(DistillMixin, nnUNetTrainerBrief):
    """Few steps, with a teacher's probabilities beside the labels.

    Their weight is a tenth of the mixin's own. The labels here are exact and the teacher's probabilities are not: the
    larger the weight, the lower was the Dice on the cases that nnU-Net keeps for validation.
    """

    distillation_weight = 0.1


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
