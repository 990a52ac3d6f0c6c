"""A student that an ensemble teaches: what it costs beside its teacher, and how well it segments.

Two steps, which can be run apart:

* train: the recipe ``trainers/recipes/distill_brain_tissue.py``, whose results stay in ``.nnunet-torchserve/distill``;
  it goes on where it ended, and does nothing if it is done. The teacher is the trained model of the material, with all
  of its folds; beside the recipe's held-out cases the images of the material are predicted.
* measure: Dice of teacher, one of its folds and both students on the held-out cases, as the recipe found it; forward
  operations; patches a second of a fold and of the student, in turns; seconds of a warm request to servers of both, in
  turns; bytes of the archives; seconds of an epoch of each training, in turns.

All cases, those of training and those held out, are warps of one anatomy. So Dice says how well a network does with
other forms and noise, and nothing of other people.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.harness.child import last_line_of
from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import CONFIGURATION, MATERIAL_VARIABLE, Material, describe_image, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, print_targets, save_results
from benchmarks.harness.served import serving
from benchmarks.harness.spread import spread, two_or_more
from distill_brain_tissue import (
    FOLD,
    ONE_FOLD,
    STUDENT_PLANS,
    TAUGHT,
    TEACHER,
    TRAINERS,
    Dice,
    Recipe,
    dice_of,
    follow,
    means_of,
)
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.smaller_plans import cost
from support import stock

HOME = ROOT / ".nnunet-torchserve" / "distill"
STEPS = ("train", "measure")

REPEATS, EPOCH_REPEATS, QUICK_REPEATS = 15, 3, 2
PATCHES = 12
"""That are timed together."""

BATCHES = (1, 4)
"""Patches in a forward pass: as a server on a CPU has them unless told otherwise, and several."""

QUICK_EPOCHS, QUICK_ITERATIONS = 1, 2
WARM_UP = 2

MOST_OPERATIONS_SHARE = 0.25
LEAST_RATIO = 3.0
MOST_DICE_LOSS = 0.01
MOST_TRAINING_S = 20 * 60

WARPS = "the training cases and the held-out cases are warps of one anatomy"


def measure_dice(dice: Dice) -> dict[str, Any]:
    """Means over the held-out cases of each model, with the cases that they are of."""
    found: dict[str, Any] = {}
    for model, cases in dice.items():
        structures = means_of(cases)
        rounded = {name: round(value, 4) for name, value in structures.items()}
        found[model] = {"structures": rounded, "mean": round(statistics.fmean(structures.values()), 4), "cases": cases}
    return found


def measure_costs(recipe: Recipe) -> dict[str, Any]:
    """Parameters, and operations of one patch forward, of a fold and of the student."""
    dataset = json.loads((recipe.raw / "dataset.json").read_text())
    found: dict[str, Any] = {}
    for model, plans_file in ((ONE_FOLD, recipe.teacher / "plans.json"), (TAUGHT, recipe.student_plans)):
        plans = json.loads(plans_file.read_text())
        costs = cost(plans, dataset, CONFIGURATION)
        patch, spacing = (plans["configurations"][CONFIGURATION][name] for name in ("patch_size", "spacing"))
        found[model] = {
            "parameters": costs.parameters,
            "operations": costs.operations,
            "patch": patch,
            "spacing_mm": spacing,
        }
    return found | {"operations_share": round(found[TAUGHT]["operations"] / found[ONE_FOLD]["operations"], 4)}


def measure_patches(recipe: Recipe, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Patches a second, each network in turns, on all of PyTorch's threads: one by one, and in batches."""
    predictors = {}
    for model in (ONE_FOLD, TAUGHT):
        folder, folds = recipe.models()[model]
        predictors[model] = stock.loaded(folder, folds=list(map(int, folds)), use_mirroring=False)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "batches": {}}
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {model: [] for model in predictors}
        for number in range(-1, repeats):
            for model in tuple(predictors) if number % 2 else tuple(predictors)[::-1]:
                if not quick:
                    wait_for_quiet()
                took = seconds_of_patches(predictors[model], batch)
                if number >= 0:  # the first is not warm
                    seconds[model].append(took)
        ratios = [theirs / mine for theirs, mine in zip(seconds[ONE_FOLD], seconds[TAUGHT], strict=True)]
        found["batches"][str(batch)] = {
            "patches_per_second": {model: spread([PATCHES / each for each in took]) for model, took in seconds.items()},
            "ratio": spread(ratios),
        }
    return found


def seconds_of_patches(predictor: Any, batch: int) -> float:
    """What a network takes for so many patches, that many in each batch."""
    network, patch = predictor.network.eval(), predictor.configuration_manager.patch_size
    images = torch.randn(batch, 1, *patch, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    with torch.inference_mode():
        for _ in range(PATCHES // batch):
            network(images)
    return time.perf_counter() - began


def measure_requests(recipe: Recipe, material: Material, scratch: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Warm requests to a server of the teacher and one of the student, in turns; the archives' bytes."""
    folders = {side: scratch / side for side in ("teacher", "student")}
    everything: dict[str, Any] = {"requests": {}}
    with (
        serving(recipe.teacher, folders["teacher"], folds=tuple(map(int, recipe.folds)), workers=1) as teacher,
        serving(recipe.student(TAUGHT), folders["student"], folds=(int(FOLD),), workers=1) as student,
    ):
        folds = list(map(int, recipe.folds))
        sides = {TEACHER: (teacher, folds), ONE_FOLD: (teacher, folds[:1]), TAUGHT: (student, [int(FOLD)])}
        for name, image in (("2 mm", material.coarse), ("1 mm", material.fine)):
            seconds: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(-1, repeats):
                for side in tuple(sides) if number % 2 else tuple(sides)[::-1]:
                    if not quick:
                        wait_for_quiet()
                    client, of_folds = sides[side]
                    options = {"folds": of_folds, "use_mirroring": False}
                    answer = client.segment(image, scratch / "answer.nii.gz", options)
                    if number >= 0:  # the first is not warm
                        seconds[side].append(answer.seconds)
            everything["requests"][name] = {
                "image": describe_image(image),
                "seconds": {side: spread(found) for side, found in seconds.items()},
                "ratio_to_one_fold": spread(
                    [theirs / mine for theirs, mine in zip(seconds[ONE_FOLD], seconds[TAUGHT], strict=True)]
                ),
            }
    [one] = make_archives(ArchiveRequest(recipe.teacher, scratch / "one", folds=(folds[0],), name="one"))
    files = {TEACHER: _archive_in(folders["teacher"]), ONE_FOLD: one, TAUGHT: _archive_in(folders["student"])}
    return everything | {"archive_bytes": {side: file.stat().st_size for side, file in files.items()}}


def _archive_in(folder: Path) -> Path:
    [archive] = (folder / "model_store").glob("*.mar")
    return archive


def measure_epochs(recipe: Recipe, scratch: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """An epoch of each student's training in turns, in fresh processes, and what a whole training takes by it."""
    seconds: dict[str, list[float]] = {model: [] for model in TRAINERS}
    environment = json.dumps(recipe.environment() | {"nnUNet_results": str(scratch / "results")})
    epochs = 0
    for number in range(repeats):
        for model in tuple(TRAINERS) if number % 2 else tuple(TRAINERS)[::-1]:
            if not quick:
                wait_for_quiet()
            module = "benchmarks.training.distill"
            found = json.loads(last_line_of(module, "--be-an-epoch", environment, recipe.dataset, TRAINERS[model]))
            epochs = found["epochs"]
            seconds[model].append(found["seconds"])
    return {
        model: {
            "epoch_seconds": spread(seconds[model]),
            "epochs": epochs,
            "training_seconds": round(epochs * statistics.median(seconds[model])),
            "logged_seconds": logged_seconds(recipe, model),
        }
        for model in TRAINERS
    }


def logged_seconds(recipe: Recipe, model: str) -> int:
    """What the epochs of a student's training took, as its own log has it, whatever else the machine did meanwhile."""
    file = recipe.student(model) / f"fold_{FOLD}" / "checkpoint_final.pth"
    log = torch.load(file, map_location="cpu", weights_only=False)["logging"]  # the recipe's own
    spans = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    return round(sum(float(end - start) for start, end in spans))


def be_an_epoch(environment: str, dataset: str, trainer_name: str) -> int:
    """Train for an epoch and print how long it took, and how many a training has."""
    os.environ |= json.loads(environment)
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(os.cpu_count() or 1)  # as nnUNetv2_train
    trainer = get_trainer_from_args(dataset, CONFIGURATION, 0, trainer_name, STUDENT_PLANS, device=torch.device("cpu"))
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    for _ in range(WARM_UP):
        trainer.train_step(next(trainer.dataloader_train))
    began = time.perf_counter()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    steps = range(trainer.num_iterations_per_epoch)
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train)) for _ in steps])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        steps = range(trainer.num_val_iterations_per_epoch)
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val)) for _ in steps])
    trainer.on_epoch_end()
    print(json.dumps({"seconds": round(time.perf_counter() - began, 3), "epochs": trainer.num_epochs}))
    return 0


def targets_of(measured: Mapping[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    dice, share = measured["dice"], measured["costs"]["operations_share"]
    loss = round(dice[ONE_FOLD]["mean"] - dice[TAUGHT]["mean"], 4)
    targets = [
        Target(
            f"the student's forward operations in parts of a fold's, at most {MOST_OPERATIONS_SHARE}",
            share,
            share <= MOST_OPERATIONS_SHARE,
        ),
        *(
            Target(
                f"at least {LEAST_RATIO:g} times a fold's patches a second (lower quartile), {batch} in a forward pass",
                found["ratio"]["q1"],
                found["ratio"]["q1"] >= LEAST_RATIO,
            )
            for batch, found in measured["patches"]["batches"].items()
        ),
        Target(
            f"mean Dice that the student with distillation loses to one fold, at most {MOST_DICE_LOSS}",
            loss,
            loss <= MOST_DICE_LOSS,
        ),
        Target(
            "voxels in which the served student's answers are not nnU-Net's",
            measured["served_different_voxels"],
            measured["served_different_voxels"] == 0,
        ),
    ]
    for model, training in measured["training"].items():
        took = training["training_seconds"]
        targets.append(
            Target(f"{model}: seconds of training, at most {MOST_TRAINING_S}", took, took <= MOST_TRAINING_S)
        )
    return targets


def measure(recipe: Recipe, material: Material, scratch: Path, repeats: int, epochs: int, *, quick: bool) -> Any:
    """All of it."""
    served = recipe.predictions("served")
    return {
        "cases": WARPS,
        "dice": measure_dice(dice_of(recipe)),
        "costs": measure_costs(recipe),
        "patches": measure_patches(recipe, repeats, quick=quick),
        **measure_requests(recipe, material, scratch, repeats, quick=quick),
        "training": measure_epochs(recipe, scratch, epochs, quick=quick),
        "served_different_voxels": sum(
            different_voxels(file, served / file.name) for file in recipe.predictions(TAUGHT).glob("*.nii.gz")
        ),
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/distill.json``."""
    if list(arguments[:1]) == ["--be-an-epoch"]:
        return be_an_epoch(*arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--repeats", type=two_or_more, default=REPEATS, help="of patches and requests")
    parser.add_argument("--epochs", type=two_or_more, default=EPOCH_REPEATS, help="of each training that are timed")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two steps of training and few repetitions in a folder of its own, and do not wait for an idle machine; "
        "write no results",
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-distill-") as temporary:
        scratch = Path(temporary)
        material = find_material(scratch)
        held_out = material.coarse.parent if MATERIAL_VARIABLE in os.environ else None
        recipe = Recipe(HOME, material.model_folder, held_out)
        if chosen.quick:
            recipe = Recipe(scratch / "home", material.model_folder, held_out, QUICK_EPOCHS, QUICK_ITERATIONS)
        if "train" in chosen.steps:
            follow(recipe)
        if "measure" not in chosen.steps:
            return 0
        repeats, epochs = (QUICK_REPEATS, QUICK_REPEATS) if chosen.quick else (chosen.repeats, chosen.epochs)
        measured = measure(recipe, material, scratch, repeats, epochs, quick=chosen.quick)
        targets = targets_of(measured)
        if not chosen.quick:
            save_results("distill", material, measured, targets)
        return print_targets(targets)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
