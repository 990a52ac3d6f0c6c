"""Train a small nnU-Net on a CPU with nnU-Net's own planner, preprocessor and trainer.

The demo model and the models that the tests serve come from here, so they are what a user's models are: folders
that ``nnUNetTrainer`` wrote. Only sizes differ from an automatic run: the planned networks are shrunk, the epochs
are few, and the optimizer is AdamW (a few hundred steps are too few for SGD with momentum 0.99).

nnU-Net reads its three folders from the environment when it is imported, so a training runs in a process of its
own: ``python small_training.py WORKDIR RECIPE.json`` with ``nnUNet_raw`` already written below ``WORKDIR/raw``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to train on one raw dataset.

    Attributes:
        dataset: nnU-Net's folder name, ``DatasetNNN_Name``.
        configuration: ``2d`` or ``3d_fullres``.
        folds: fold numbers; each is trained with its own number as the random seed.
        patch_size: voxels per axis of the network's patch, in the plan's axis order.
        features: feature maps per stage; its length is the number of stages.
        strides: per stage and axis; nnU-Net's kernel sizes are set to 3 in every stage.
        epochs, iterations: optimizer steps are ``epochs * iterations``.
        learning_rate: AdamW's first learning rate, then nnU-Net's polynomial decay.
        batch_size: patches a step.
        strip: drop optimizer state and log from the checkpoints (a third of the size).
        convolutions: in a stage of the encoder; a stage of the decoder has one.
    """

    dataset: str
    configuration: str
    folds: tuple[int, ...]
    patch_size: tuple[int, ...]
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    epochs: int
    iterations: int
    learning_rate: float = 5e-3
    batch_size: int = 2
    strip: bool = False
    convolutions: int = 2


def run(workdir: Path, recipe: Recipe) -> Path:
    """Train ``recipe`` on ``workdir/raw`` in a process of its own.

    Returns:
        The trained model folder ``workdir/results/DATASET/nnUNetTrainer__nnUNetPlans__CONFIGURATION``.

    Raises:
        RuntimeError: the training failed; the end of its output is in the message.
    """
    recipe_file = workdir / f"{recipe.dataset}_{recipe.configuration}.json"
    recipe_file.write_text(json.dumps(asdict(recipe)))
    trained = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), str(workdir), str(recipe_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if trained.returncode != 0:
        msg = f"training {recipe.dataset} failed:\n{trained.stdout[-4000:]}"
        raise RuntimeError(msg)
    return workdir / "results" / recipe.dataset / f"nnUNetTrainer__nnUNetPlans__{recipe.configuration}"


def _plan_and_preprocess(recipe: Recipe) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    identifier = int(recipe.dataset[len("Dataset") :].split("_")[0])
    plans_file = Path(os.environ["nnUNet_preprocessed"]) / recipe.dataset / "nnUNetPlans.json"
    extract_fingerprints([identifier], num_processes=1, verbose=False, show_progress_bar=False)
    plan_experiments([identifier])
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"][recipe.configuration]
    configuration["patch_size"] = list(recipe.patch_size)
    configuration["batch_size"] = recipe.batch_size
    stages = len(recipe.features)
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": stages,
        "features_per_stage": list(recipe.features),
        "kernel_sizes": [[3] * len(recipe.patch_size)] * stages,
        "strides": [list(stride) for stride in recipe.strides],
        "n_conv_per_stage": [recipe.convolutions] * stages,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }
    plans_file.write_text(json.dumps(plans, indent=4))
    preprocess([identifier], configurations=(recipe.configuration,), num_processes=(1,), show_progress_bar=False)


def _train_fold(recipe: Recipe, fold: int) -> None:
    import numpy as np
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    random.seed(fold)
    np.random.seed(fold)
    torch.manual_seed(fold)
    trainer = get_trainer_from_args(
        recipe.dataset, recipe.configuration, fold, "nnUNetTrainer", "nnUNetPlans", device=torch.device("cpu")
    )
    trainer.num_epochs = recipe.epochs
    trainer.num_iterations_per_epoch = recipe.iterations
    trainer.num_val_iterations_per_epoch = 1
    trainer.initial_lr = recipe.learning_rate
    trainer.save_every = 10**6

    def adamw() -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = torch.optim.AdamW(trainer.network.parameters(), recipe.learning_rate, weight_decay=3e-5)
        return optimizer, PolyLRScheduler(optimizer, recipe.learning_rate, recipe.epochs)

    trainer.configure_optimizers = adamw
    trainer.run_training()
    fold_folder = Path(trainer.output_folder)
    if recipe.strip:
        checkpoint_file = fold_folder / "checkpoint_final.pth"
        checkpoint = torch.load(checkpoint_file, map_location="cpu", weights_only=False)
        checkpoint |= {"optimizer_state": None, "grad_scaler_state": None, "logging": None}
        torch.save(checkpoint, checkpoint_file)


def _main() -> None:
    workdir, recipe_file = Path(sys.argv[1]), Path(sys.argv[2])
    fields: dict[str, Any] = json.loads(recipe_file.read_text())
    recipe = Recipe(**fields)
    for variable, folder in (("raw", "raw"), ("preprocessed", "preprocessed"), ("results", "results")):
        (workdir / folder).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{variable}"] = str(workdir / folder)
    os.environ["nnUNet_n_proc_DA"] = "1"  # the planner hands this number to torch.set_num_threads
    _plan_and_preprocess(recipe)
    os.environ["nnUNet_n_proc_DA"] = "0"  # augment in this process, so that the seeds decide
    for fold in recipe.folds:
        _train_fold(recipe, fold)


if __name__ == "__main__":
    _main()
