"""A cascade and an ensemble: one request, nnU-Net's commands one after another, and its predictors loaded in memory.

All go from an image file to a segmentation file, in turns, and must give the same labels. The cascade is two stages of
few classes: ``nnUNetv2_predict`` with the first, and again with the second and ``-prev_stage_predictions``. The
ensemble is two configurations of 40 classes: ``nnUNetv2_predict --save_probabilities`` with each, then
``nnUNetv2_ensemble``. The predictors are in this process, their networks are loaded, and nothing goes through files
between the models; so what they lack against the server is only what happens to a case.

Only one configuration of each dataset was trained. The others are made of it (``benchmarks/models/configurations.py``).

The result file is written after each recipe; one that a run leaves out stays as it is.

Memory is that of a server's first case, and of a fresh process with two loaded predictors: how much the resident sets
grow at most, of the server those of Java, workers and engines together, whose shared memory counts for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.harness import provenance
from benchmarks.harness.child import last_line_of
from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import CONFIGURATION, FOLD, PLANS, TRAINER, Material, describe_image, find_material
from benchmarks.harness.memory import extra_memory_of, with_extra_memory
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, print_targets, save_results
from benchmarks.harness.served import Answer, Client, serving, stage_medians
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.harness.stock_command import copy_to, run_command, run_ensemble
from benchmarks.models import many_classes
from benchmarks.models.configurations import CASCADE, LOWRES, results_with_more
from support import stock
from support.chaos import family

_CASE = "case"


class Side(StrEnum):
    """Who answers."""

    SERVER = "server"
    COMMANDS = "commands"
    PREDICTORS = "predictors, loaded"


class Kind(StrEnum):
    """Which recipe."""

    CASCADE = "cascade"
    ENSEMBLE = "ensemble"


LEAST_RATIO = {Kind.CASCADE: 3.0, Kind.ENSEMBLE: 5.0}
"""Times sooner than the commands."""

MOST_MEMORY = 0.25
"""Of stock's extra memory, for the ensemble."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe and its image.

    Attributes:
        kind: what is made of the two models.
        title: for people.
        material: the trained model, beside which are the others, and its images.
        image: what is asked.
        configurations: of the models, in nnU-Net's order.
    """

    kind: Kind
    title: str
    material: Material
    image: Path
    configurations: tuple[str, str]

    @property
    def folders(self) -> tuple[Path, Path]:
        """Of the models."""
        one, two = (self.material.model_folder.with_name(f"{TRAINER}__{PLANS}__{c}") for c in self.configurations)
        return one, two

    def serving(self, scratch: Path) -> Any:
        """A live server of it."""
        one, two = self.folders
        if self.kind is Kind.CASCADE:
            return serving(two, scratch, previous_stages=(one,))
        return serving(one, scratch, others=(two,))


def by_commands(recipe: Recipe, inputs: Path, scratch: Path) -> tuple[float, Path]:
    """Seconds that nnU-Net's commands take together, and the file that the last one writes."""
    outputs = [scratch / name for name in ("first", "second", "merged")]
    for folder in outputs:
        shutil.rmtree(folder, ignore_errors=True)  # or a command that wrote nothing would not be noticed
    first, second, merged = outputs
    options: list[Sequence[str | Path]]
    if recipe.kind is Kind.CASCADE:
        options = [[], ["-prev_stage_predictions", first]]
    else:
        options = [["--save_probabilities"], ["--save_probabilities"]]
    seconds = sum(
        run_command(recipe.material, inputs, folder, scratch, configuration=configuration, options=added)
        for configuration, folder, added in zip(recipe.configurations, (first, second), options, strict=True)
    )
    if recipe.kind is Kind.ENSEMBLE:
        seconds += run_ensemble([first, second], merged)
        return seconds, merged / f"{_CASE}.nii.gz"
    return seconds, second / f"{_CASE}.nii.gz"


def by_predictors(kind: Kind, predictors: Sequence[Any], image: Path, answer: Path) -> None:
    """What the commands do, with loaded predictors and without files between them."""
    one, two = predictors
    reader = one.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(image)])
    if kind is Kind.CASCADE:
        first = one.predict_single_npy_array(array, dict(properties), None, None, False)
        labels = two.predict_single_npy_array(array, dict(properties), first.astype(np.float32)[None], None, False)
    else:
        _, mean = one.predict_single_npy_array(array, dict(properties), None, None, True)
        mean += two.predict_single_npy_array(array, dict(properties), None, None, True)[1]
        mean /= 2
        labels = one.label_manager.convert_probabilities_to_segmentation(mean)
    reader.write_seg(labels, str(answer), properties)


def loaded(recipe: Recipe) -> list[Any]:
    """The two predictors."""
    return [stock.loaded(folder, folds=(FOLD,), use_mirroring=False) for folder in recipe.folders]


def measure(recipe: Recipe, repeats: int, scratch: Path, *, quick: bool) -> dict[str, Any]:
    """Memory of the first case, then all sides in turns, each first as often as the others."""
    scratch.mkdir()
    inputs = scratch / "inputs"
    copy_to(recipe.image, inputs, f"{_CASE}_0000.nii.gz")
    ours, theirs = scratch / "server.nii.gz", scratch / "predictors.nii.gz"
    predictors = loaded(recipe)
    answers: list[Answer] = []
    seconds: dict[Side, list[float]] = {side: [] for side in Side}
    different = dict.fromkeys((Side.COMMANDS, Side.PREDICTORS), 0)
    with recipe.serving(scratch) as client:
        our_bytes = memory_of_first_case(client, recipe.image, ours)

        def ask_server() -> float:
            answers.append(client.segment(recipe.image, ours))
            return answers[-1].seconds

        def ask_predictors() -> float:
            started = time.perf_counter()
            by_predictors(recipe.kind, predictors, recipe.image, theirs)
            return time.perf_counter() - started

        def ask_commands() -> float:
            spent, written = by_commands(recipe, inputs, scratch)
            different[Side.COMMANDS] += different_voxels(ours, written)
            return spent

        ask: Mapping[Side, Callable[[], float]] = {
            Side.SERVER: ask_server,
            Side.COMMANDS: ask_commands,
            Side.PREDICTORS: ask_predictors,
        }
        ask_predictors()  # as the server's first case, not counted
        for number in range(repeats):
            for turn in range(len(Side)):
                side = list(Side)[(number + turn) % len(Side)]
                if not quick:
                    wait_for_quiet()
                seconds[side].append(ask[side]())
            different[Side.PREDICTORS] += different_voxels(ours, theirs)
            print(f"  {number + 1}/{repeats}: " + ", ".join(f"{side} {seconds[side][-1]:.2f} s" for side in Side))
    stock_bytes = int(
        last_line_of(
            "benchmarks.request.recipes", "--be-a-process", recipe.kind, *map(str, recipe.folders), str(inputs)
        )
    )
    return {
        "title": recipe.title,
        "date": provenance.now(),
        **provenance.commit(),
        **provenance.cpu(),
        "image": describe_image(recipe.image),
        "models": recipe.material.source,
        "configurations": recipe.configurations,
        "seconds_of_repeats": seconds,
        "seconds": {side: spread(each) for side, each in seconds.items()},
        "server_stage_medians_ms": stage_medians(answers),
        "ratio_to_server": {
            side: spread([other / own for other, own in zip(seconds[side], seconds[Side.SERVER], strict=True)])
            for side in different
        },
        "different_voxels": different,
        "our_extra_bytes": our_bytes,
        "stock_extra_bytes": stock_bytes,
        "memory_share": our_bytes / stock_bytes,
    }


def memory_of_first_case(client: Client, image: Path, answer: Path) -> int:
    """Bytes that a server's processes grow by at most, all together."""
    processes = [each.pid for each in family(client.runtime)]
    _, extra = extra_memory_of(processes, lambda: client.segment(image, answer))
    return extra


def be_a_process(kind: Kind, folders: Sequence[Path], inputs: Path) -> int:
    """Predict the one image of ``inputs`` once, and print how many bytes that took."""
    [image] = inputs.iterdir()
    predictors = [stock.loaded(folder, folds=(FOLD,), use_mirroring=False) for folder in folders]
    with tempfile.TemporaryDirectory(prefix="bench-recipes-") as folder:
        answer = Path(folder) / "answer.nii.gz"
        _, extra = with_extra_memory(lambda: by_predictors(kind, predictors, image, answer))
    print(extra)
    return 0


def targets_of(measured: Mapping[Kind, Mapping[str, Any]]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for kind, found in measured.items():
        ratio, least = found["ratio_to_server"][Side.COMMANDS]["median"], LEAST_RATIO[kind]
        targets.append(Target(f"{kind}: at least {least:g} times sooner than the commands", ratio, ratio >= least))
        voxels = sum(found["different_voxels"].values())
        targets.append(Target(f"{kind}: the same labels in every repetition: voxels that differ", voxels, voxels == 0))
    if Kind.ENSEMBLE in measured:
        share = measured[Kind.ENSEMBLE]["memory_share"]
        claim = f"{Kind.ENSEMBLE}: at most {MOST_MEMORY:g} of the extra memory of stock's loaded predictors"
        targets.append(Target(claim, share, share <= MOST_MEMORY))
    return targets


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/recipes.json``."""
    if list(arguments[:1]) == ["--be-a-process"]:
        kind, one, two, inputs = arguments[1:]
        return be_a_process(Kind(kind), (Path(one), Path(two)), Path(inputs))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats-cascade", type=two_or_more, default=5)
    parser.add_argument("--repeats-ensemble", type=two_or_more, default=3)
    parser.add_argument("--cases", nargs="+", choices=list(Kind), type=Kind, default=list(Kind), metavar="CASE")
    parser.add_argument(
        "--quick", action="store_true", help="2 mm, and do not wait for an idle machine; write no results"
    )
    chosen = parser.parse_args(arguments)
    measured = {} if chosen.quick else measured_before()
    different = 0
    with tempfile.TemporaryDirectory(prefix="bench-recipes-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        for kind in chosen.cases:
            print(kind)
            recipe = _RECIPES[kind](scratch, material, quick=chosen.quick)
            repeats = chosen.repeats_cascade if kind is Kind.CASCADE else chosen.repeats_ensemble
            measured[kind] = measure(recipe, repeats, scratch / kind, quick=chosen.quick)
            different += sum(measured[kind]["different_voxels"].values())
            for side, ratio in measured[kind]["ratio_to_server"].items():
                print(f"  {side}: {ratio['median']:.2f} times the server's seconds")
            print(f"  extra memory: {measured[kind]['memory_share']:.3f} of stock's; {different} voxels differ")
            if not chosen.quick:
                document = {"threads": torch.get_num_threads(), "cases": measured}
                save_results("recipes", material, document, targets_of(measured))
    return int(different != 0) if chosen.quick else print_targets(targets_of(measured))


def measured_before() -> dict[Kind, dict[str, Any]]:
    """The recipes of the result file."""
    file = RESULTS / "recipes.json"
    cases = json.loads(file.read_text())["cases"] if file.exists() else {}
    return {kind: cases[kind] for kind in Kind if kind in cases}


def _cascade(scratch: Path, material: Material, *, quick: bool) -> Recipe:
    model = results_with_more(material.model_folder, scratch / "cascade-results")
    own = Material(f"{material.source}; both stages made of it, not trained", model, material.fine, material.coarse)
    image = material.coarse if quick else material.fine
    return Recipe(Kind.CASCADE, f"cascade of {LOWRES} and {CASCADE}", own, image, (LOWRES, CASCADE))


def _ensemble(scratch: Path, _material: Material, *, quick: bool) -> Recipe:
    model = results_with_more(many_classes.model_folder(many_classes.CACHE), scratch / "ensemble-results")
    image = many_classes.write_template(scratch, 2.0 if quick else 1.0)
    source = (
        f"{model.parent.name} (benchmarks/models/many_classes.py), {LOWRES} made of {CONFIGURATION}, not trained, and "
        "the ICBM152 template of nilearn"
    )
    own = Material(source, model, image, image)
    return Recipe(Kind.ENSEMBLE, "ensemble of two configurations, 40 classes", own, image, (CONFIGURATION, LOWRES))


_RECIPES: Mapping[Kind, Callable[..., Recipe]] = {Kind.CASCADE: _cascade, Kind.ENSEMBLE: _ensemble}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
