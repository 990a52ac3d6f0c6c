"""A student that a trained ensemble teaches, from the first image to the served answer: minutes on a CPU.

The teacher is a trained model folder of brain tissue (T1; fluid, grey matter, white matter). The student has its plans
with a quarter of the features and one convolution in a stage, an eighth of the work of a patch. It is trained on warps
of one anatomy, once on labels alone and once on the teacher's probabilities too, with the same weights to begin with,
the same batches and steps. Both, the teacher and one of its folds predict cases that nobody was trained on; the taught
student is archived and served, and what the server answers is compared with what nnU-Net predicts.

Run ``python trainers/recipes/distill_brain_tissue.py HOME``. Each step is a command of nnU-Net's or of this project's,
or is told in a function below; one whose result is there is left alone, so that the same line goes on where it ended.
Delete HOME to begin anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnunet_torchserve_tools import launcher
from steps import Command, RecipeError, Steps
from warped_heads import TISSUES, write_heads

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model" / "Dataset811_BrainTissueDemo"
CONFIGURATION, TEACHER_PLANS, STUDENT_PLANS = "3d_fullres", "nnUNetPlans", "nnUNetPlansStudent"
TRAINED = f"nnUNetTrainer__{TEACHER_PLANS}__{CONFIGURATION}"

TRAINING_SEEDS, HELD_OUT_SEEDS = range(15), range(1000, 1006)
"""nnU-Net's fold 0 keeps a fifth of the former for its validation."""

FEATURES, CONVOLUTIONS = "0.25", "1"
"""Share of each stage's features, of which shrink-plans leaves 4 at least; convolutions in a stage."""

FOLD = "0"
NAME = "student"
"""Of the student on its server."""

EPOCHS_VARIABLE, ITERATIONS_VARIABLE = "NNUNET_TORCHSERVE_BRIEF_EPOCHS", "NNUNET_TORCHSERVE_BRIEF_ITERATIONS"
"""``external/brief_trainers.py`` reads them."""

TEACHER, ONE_FOLD = "teacher, all folds", "teacher, one fold"
ALONE, TAUGHT = "student without distillation", "student with distillation"
TRAINERS = {ALONE: "nnUNetTrainerBrief", TAUGHT: "nnUNetTrainerBriefDistill"}

Dice = dict[str, dict[str, dict[str, float]]]
"""Of each model, of each case, of each structure."""


@dataclass(frozen=True)
class Recipe:
    """What is made of what.

    Attributes:
        home: folder for all of it.
        teacher: a trained model folder of brain tissue, ``TRAINER__PLANS__CONFIGURATION``.
        held_out: a folder with further cases that nobody was trained on: images, and ``labels`` in it.
        epochs, iterations: of each training; ``None`` is the trainer's own.
    """

    home: Path
    teacher: Path
    held_out: Path | None = None
    epochs: int | None = None
    iterations: int | None = None

    @cached_property
    def dataset(self) -> str:
        """Name of the teacher's dataset, which the student's has too."""
        return str(json.loads((self.teacher / "plans.json").read_text())["dataset_name"])

    @property
    def number(self) -> str:
        """Of the dataset."""
        return str(int(self.dataset[len("Dataset") :].split("_")[0]))

    @cached_property
    def folds(self) -> list[str]:
        """Of the teacher."""
        found = (file.parent.name.removeprefix("fold_") for file in self.teacher.glob("fold_*/checkpoint_final.pth"))
        return sorted(fold for fold in found if fold.isdigit())

    @property
    def raw(self) -> Path:
        """nnU-Net's folder of the dataset's images."""
        return self.home / "raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        """nnU-Net's folder of its plans and preprocessed cases."""
        return self.home / "preprocessed" / self.dataset

    @property
    def student_plans(self) -> Path:
        """Plans of the student."""
        return self.preprocessed / f"{STUDENT_PLANS}.json"

    @property
    def archives(self) -> Path:
        """Where the student's archive is."""
        return self.home / "model_store"

    def student(self, model: str) -> Path:
        """The trained model folder of a student."""
        return self.home / "results" / self.dataset / f"{TRAINERS[model]}__{STUDENT_PLANS}__{CONFIGURATION}"

    def models(self) -> dict[str, tuple[Path, list[str]]]:
        """Model folder and folds of all that predict."""
        students = {model: (self.student(model), [FOLD]) for model in TRAINERS}
        return {TEACHER: (self.teacher, self.folds), ONE_FOLD: (self.teacher, self.folds[:1]), **students}

    def predictions(self, model: str) -> Path:
        """Folder of a model's label maps of the held-out cases."""
        return self.home / "predictions" / model.replace(", ", "_").replace(" ", "_")

    def environment(self) -> dict[str, str]:
        """Variables of all commands."""
        counts = {EPOCHS_VARIABLE: self.epochs, ITERATIONS_VARIABLE: self.iterations}
        return {
            **{f"nnUNet_{name}": str(self.home / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_extTrainer": str(Path(__file__).with_name("external")),
            "nnUNet_n_proc_DA": "0",  # so that the seeds decide, and both trainings see the same
            "nnUNet_def_n_proc": str(os.cpu_count() or 1),
            **{name: str(count) for name, count in counts.items() if count is not None},
        }

    def settings(self) -> dict[str, object]:
        """What the steps' results depend on, beside the code."""
        return {
            "teacher": str(self.teacher),
            "held_out": str(self.held_out),
            "epochs": self.epochs,
            "iterations": self.iterations,
            "features": FEATURES,
            "convolutions": CONVOLUTIONS,
        }


def follow(recipe: Recipe) -> Dice:
    """Do what is not done yet.

    Returns:
        How well all predict the held-out cases.

    Raises:
        RecipeError: a step failed; the same call goes on with it.
    """
    steps = Steps(recipe.home, recipe.environment())
    with steps.alone(recipe.settings()):
        steps.do("cases", lambda: write_cases(recipe))
        processes: Command = ["-np", str(os.cpu_count() or 1)]
        steps.do("fingerprint", ["nnUNetv2_extract_fingerprint", "-d", recipe.number, *processes])
        steps.do("plans", lambda: copy_plans(recipe), _shrink(recipe))
        steps.do(
            "preprocess",
            ["nnUNetv2_preprocess", "-d", recipe.number, "-plans_name", STUDENT_PLANS, "-c", CONFIGURATION, *processes],
        )
        steps.do("soft targets", _soft_targets(recipe))
        for model in TRAINERS:
            steps.do(f"train {model}", _train(recipe, model))
        for model in recipe.models():
            steps.do(f"predict by {model}", _predict(recipe, model), _evaluate(recipe, model))
        steps.do("archive", _archive(recipe))
        state = recipe.home / "server"
        stop: Command = ["nnunet-torchserve", "stop", "--state-dir", state]
        steps.do("serve", stop, *_serve(recipe, state), lambda: compare_served(recipe), finally_=stop)
    return dice_of(recipe)


def write_cases(recipe: Recipe) -> None:
    """The dataset: training cases, and held-out ones in ``imagesTs`` and ``labelsTs``.

    Raises:
        RecipeError: the teacher does not segment what these cases show.
    """
    dataset = json.loads((recipe.teacher / "dataset.json").read_text())
    if list(dataset["labels"].values()) != list(range(1 + len(TISSUES))) or len(dataset["channel_names"]) != 1:
        msg = f"{recipe.teacher} must segment {', '.join(TISSUES)} (1, 2, 3) in one T1 image"
        raise RecipeError(msg)
    shutil.rmtree(recipe.raw, ignore_errors=True)
    folders = {name: recipe.raw / name for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")}
    write_heads(folders["imagesTr"], folders["labelsTr"], "head", TRAINING_SEEDS)
    write_heads(folders["imagesTs"], folders["labelsTs"], "held_out", HELD_OUT_SEEDS)
    if recipe.held_out is not None:
        for image in sorted(recipe.held_out.glob("*_0000.nii.gz")):
            labels = recipe.held_out / "labels" / image.name.replace("_0000.nii.gz", ".nii.gz")
            shutil.copyfile(image, folders["imagesTs"] / image.name)
            shutil.copyfile(labels, folders["labelsTs"] / labels.name)
    dataset |= {"numTraining": len(TRAINING_SEEDS), "file_ending": ".nii.gz"}
    (recipe.raw / "dataset.json").write_text(json.dumps(dataset, indent=2))


def copy_plans(recipe: Recipe) -> None:
    """The teacher's plans, which a trained model folder holds, become those of the dataset."""
    shutil.copyfile(recipe.teacher / "plans.json", recipe.preprocessed / f"{TEACHER_PLANS}.json")
    shutil.copyfile(recipe.raw / "dataset.json", recipe.preprocessed / "dataset.json")
    recipe.student_plans.unlink(missing_ok=True)  # of an attempt that was ended


def _shrink(recipe: Recipe) -> Command:
    plans = recipe.preprocessed / f"{TEACHER_PLANS}.json"
    more = ("--convolutions", CONVOLUTIONS)
    return ["nnunet-torchserve", "shrink-plans", plans, "--name", STUDENT_PLANS, "--features", FEATURES, *more]


def _soft_targets(recipe: Recipe) -> Command:
    command: Command = ["nnunet-torchserve", "soft-targets", recipe.student_plans]
    return [*command, "--configuration", CONFIGURATION, "--teacher", recipe.teacher, "--device", "cpu", "--disable-tta"]


def _train(recipe: Recipe, model: str) -> Command:
    """``--c`` begins a training too, if there is none to continue."""
    command: Command = ["nnUNetv2_train", recipe.number, CONFIGURATION, FOLD, "-p", STUDENT_PLANS]
    return [*command, "-tr", TRAINERS[model], "-device", "cpu", "--c"]


def _predict(recipe: Recipe, model: str) -> Command:
    folder, folds = recipe.models()[model]
    command: Command = ["nnUNetv2_predict_from_modelfolder", "-i", recipe.raw / "imagesTs"]
    command += ["-o", recipe.predictions(model), "-m", folder, "-f", *folds]
    return [*command, "--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1"]


def _evaluate(recipe: Recipe, model: str) -> Command:
    folder = recipe.predictions(model)
    command: Command = ["nnUNetv2_evaluate_folder", recipe.raw / "labelsTs", folder]
    return [*command, "-djfile", recipe.raw / "dataset.json", "-pfile", recipe.student_plans]


def _archive(recipe: Recipe) -> Command:
    command: Command = ["nnunet-torchserve", "archive", recipe.student(TAUGHT), "--folds", FOLD]
    return [*command, "--name", NAME, "--output", recipe.archives]


def _serve(recipe: Recipe, state: Path) -> list[Command]:
    """Start a server, and ask it for the held-out cases."""
    ports = launcher.free_ports()
    flags: Command = ["--state-dir", state, "--model-store", recipe.archives, "--device", "cpu", "--workers", "1"]
    for name in ("inference", "management", "metrics", "grpc_inference", "grpc_management"):
        flags += [f"--{name.replace('_', '-')}-port", str(getattr(ports, name))]
    ask: Command = ["-i", recipe.raw / "imagesTs", "-o", recipe.predictions("served"), "-f", FOLD]
    ask += ["--server", f"http://127.0.0.1:{ports.inference}", "--model", NAME, "--disable_tta"]
    return [["nnunet-torchserve", "serve", *flags], ["nnunet-torchserve", "predict", *ask]]


def compare_served(recipe: Recipe) -> None:
    """The server's label maps of the taught student against nnU-Net's.

    Raises:
        RecipeError: a voxel differs.
    """
    for expected in sorted(recipe.predictions(TAUGHT).glob("*.nii.gz")):
        maps = (np.asarray(nib.load(folder / expected.name).dataobj) for folder in _served_and_predicted(recipe))
        if (different := int(np.count_nonzero(np.not_equal(*maps)))) > 0:
            msg = f"{expected.name}: {different} voxels of the server's answer are not those that nnU-Net predicts"
            raise RecipeError(msg)


def _served_and_predicted(recipe: Recipe) -> tuple[Path, Path]:
    return recipe.predictions("served"), recipe.predictions(TAUGHT)


def dice_of(recipe: Recipe) -> Dice:
    """What ``nnUNetv2_evaluate_folder`` found."""
    names = {
        str(label): name
        for name, label in json.loads((recipe.raw / "dataset.json").read_text())["labels"].items()
        if label
    }
    found: Dice = {}
    for model in recipe.models():
        summary: dict[str, Any] = json.loads((recipe.predictions(model) / "summary.json").read_text())
        found[model] = {
            Path(case["reference_file"]).name.removesuffix(".nii.gz"): {
                names[label]: round(values["Dice"], 4) for label, values in case["metrics"].items()
            }
            for case in summary["metric_per_case"]
        }
    return found


def means_of(cases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean over cases of each structure's Dice."""
    structures = next(iter(cases.values()))
    return {name: sum(case[name] for case in cases.values()) / len(cases) for name in structures}


def main(arguments: list[str]) -> int:
    """Follow the recipe, and print how well all predict the held-out cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, help="folder for all that is made; created if missing")
    parser.add_argument(
        "--teacher", type=Path, default=DEMO_MODEL / TRAINED, help="trained model folder; default: the demo's"
    )
    parser.add_argument(
        "--held-out", type=Path, help="folder with more cases that nobody was trained on: images, and labels/ in it"
    )
    parser.add_argument("--epochs", type=int, help="of each training")
    parser.add_argument("--iterations", type=int, help="of each epoch")
    asked = parser.parse_args(arguments)
    held_out = None if asked.held_out is None else asked.held_out.resolve()
    recipe = Recipe(asked.home.resolve(), asked.teacher.resolve(), held_out, asked.epochs, asked.iterations)
    try:
        dice = follow(recipe)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\nDice, mean of {len(dice[TEACHER])} held-out cases, which are warps of one anatomy:")
    for model, cases in dice.items():
        of_structures = means_of(cases)
        mean = sum(of_structures.values()) / len(of_structures)
        print(f"  {model:30}{''.join(f'{name} {value:.3f}  ' for name, value in of_structures.items())}mean {mean:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
