"""One of several processes that train together on CPUs: ``python -m support.ddp_steps FOLDER RANK RANKS OUTPUT``.

nnU-Net's own trainer wants a GPU for each process there: it takes CUDA for its device and gives its number to DDP. So
it is initialized alone here, and its network is then wrapped for gloo. Loaders, loss, steps and what is gathered are
its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed

from nnunet_torchserve_trainers.distill_trainers import nnUNetTrainerDistill
from nnunet_torchserve_trainers.region_trainers import nnUNetTrainerRegionBitmask, nnUNetTrainerRegionLabelmap

from .training import IGNORE, REGIONS, Home, Task, batches, same_everywhere, seed


class Untaught(nnUNetTrainerDistill):
    """Hears its teacher, and does not care."""

    distillation_weight = 0.0


LABELS, PACKED = "labels", "regions, some ignored"
TASKS = {
    LABELS: Task({"background": 0, "one": 1, "two": 2}, (16, 12), batch_size=4),
    PACKED: Task(REGIONS | IGNORE, (16, 12), batch_size=4, batch_dice=True),
}
"""A folder of :func:`main`'s holds a home of each, by these names, with soft targets."""

TRAINERS: dict[str, tuple[type, ...]] = {
    LABELS: (nnUNetTrainer, Untaught, nnUNetTrainerDistill),
    PACKED: (nnUNetTrainer, nnUNetTrainerRegionLabelmap, nnUNetTrainerRegionBitmask, Untaught),
}


def alone(home: Home, kind: type) -> Any:
    """A trainer that knows of no other process yet, with the same weights in each."""
    trainer = home.trainer(kind)
    seed(7)
    trainer.initialize()
    return trainer


def together(trainer: Any, rank: int) -> dict[str, Any]:
    """What one process sees of two steps of training and two of validation."""
    trainer.is_ddp, trainer.local_rank = True, rank
    trainer._set_batch_size_and_oversample()
    trainer.network = torch.nn.parallel.DistributedDataParallel(trainer.network)
    trainer.loss = trainer._build_loss()
    first, second, *validation = batches(trainer, rank)  # other images everywhere
    trainer.network.train()
    trained = [trainer.train_step(batch) for batch in (first, second)]
    trainer.network.eval()
    with torch.no_grad():
        validated = [trainer.validation_step(batch) for batch in validation]
    trainer.on_train_epoch_end(trained)
    trainer.on_validation_epoch_end(validated)
    logged = ("train_losses", "val_losses", "mean_fg_dice")
    return {
        "batches": [first, second],
        "keys": [list(batch["keys"]) for batch in (first, second, *validation)],
        "weight_factors": getattr(trainer.loss, "labels", trainer.loss).weight_factors,
        "losses": [float(step["loss"]) for step in trained + validated],
        "logged": [float(trainer.logger.get_value(name, step=-1)) for name in logged],
        "weights": list(trainer.network.module.state_dict().values()),
    }


def main(folder: Path, rank: int, ranks: int, output: Path) -> None:
    """Train with each trainer in turn, and write what this process saw of it."""
    torch.set_num_threads(1)
    same_everywhere(pytest.MonkeyPatch())
    store = f"file://{output}.store"
    seen: dict[str, dict[str, Any]] = {}
    for name, task in TASKS.items():
        home = Home(folder / name, task)
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in home.variables().items():
                patch.setenv(variable, value)
            trainers = [alone(home, kind) for kind in TRAINERS[name]]
            distributed.init_process_group("gloo", init_method=f"{store}.{len(seen)}", rank=rank, world_size=ranks)
            seen[name] = {type(trainer).__name__: together(trainer, rank) for trainer in trainers}
            distributed.destroy_process_group()
    torch.save(seen, f"{output}.{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
