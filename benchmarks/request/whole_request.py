"""A whole request of a network with many classes: the server, the command ``nnUNetv2_predict``, and stock's predictor.

With 40 classes the time of a case goes to other stages than with three: to accumulating the patches and to the export.
All three go from an image file to a segmentation file, in turns, and must give the same labels. The predictor is in
this process and its network is loaded, so what it lacks against the server is only what happens to a case; the command
also starts Python and loads the network.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import torch

from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import FOLD, Material, describe_image
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Answer, Client, serving, stage_medians
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.harness.stock_command import copy_to, run_command
from benchmarks.models import many_classes
from support import stock

_CASE = "case"


class Side(StrEnum):
    """Who answers."""

    SERVER = "server"
    COMMAND = "command"
    PREDICTOR = "predictor, loaded"


def ask_predictor(predictor: Any, image: Path, answer: Path) -> float:
    """Seconds that stock's predictor takes from file to file."""
    started = time.perf_counter()
    reader = predictor.plans_manager.image_reader_writer_class()
    data, properties = reader.read_images([str(image)])
    reader.write_seg(predictor.predict_single_npy_array(data, properties), str(answer), properties)
    return time.perf_counter() - started


def measure(
    client: Client, predictor: Any, material: Material, image: Path, repeats: int, scratch: Path, *, quick: bool
) -> dict[str, Any]:
    """All three in turns, each first as often as the others, after one answer each that is not counted."""
    scratch.mkdir()
    inputs, outputs = scratch / "inputs", scratch / "outputs"
    copy_to(image, inputs, f"{_CASE}_0000.nii.gz")
    files = {
        Side.SERVER: scratch / "server.nii.gz",
        Side.COMMAND: outputs / f"{_CASE}.nii.gz",
        Side.PREDICTOR: scratch / "predictor.nii.gz",
    }
    answers: list[Answer] = []

    def ask_server() -> float:
        answers.append(client.segment(image, files[Side.SERVER]))
        return answers[-1].seconds

    ask: dict[Side, Callable[[], float]] = {
        Side.SERVER: ask_server,
        Side.COMMAND: partial(run_command, material, inputs, outputs, scratch),
        Side.PREDICTOR: partial(ask_predictor, predictor, image, files[Side.PREDICTOR]),
    }
    ask[Side.SERVER](), ask[Side.PREDICTOR]()
    answers.clear()
    seconds: dict[Side, list[float]] = {side: [] for side in Side}
    different = dict.fromkeys((Side.COMMAND, Side.PREDICTOR), 0)
    for number in range(repeats):
        for turn in range(len(Side)):
            side = list(Side)[(number + turn) % len(Side)]
            if not quick:
                wait_for_quiet()
            seconds[side].append(ask[side]())
        for side in different:
            different[side] += different_voxels(files[Side.SERVER], files[side])
        files[Side.COMMAND].unlink()  # or a command that wrote nothing would not be noticed
        print(f"  {number + 1}/{repeats}: " + ", ".join(f"{side} {seconds[side][-1]:.2f} s" for side in Side))
    return {
        "image": describe_image(image),
        "seconds_of_repeats": seconds,
        "seconds": {side: spread(each) for side, each in seconds.items()},
        "server_stage_medians_ms": stage_medians(answers),
        "ratio_to_server": {
            side: spread([theirs / ours for theirs, ours in zip(seconds[side], seconds[Side.SERVER], strict=True)])
            for side in different
        },
        "different_voxels": different,
    }


def main() -> int:
    """Measure, write ``results/whole_request.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=two_or_more, default=7)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine; write no results")
    arguments = parser.parse_args()
    model = many_classes.model_folder(many_classes.CACHE)
    measured = {}
    with tempfile.TemporaryDirectory(prefix="bench-whole-request-") as folder:
        scratch = Path(folder)
        images = {f"{size:g} mm": many_classes.write_template(scratch, size) for size in (2.0, 1.0)}
        material = Material(
            source=f"{model.parent.name} (benchmarks/models/many_classes.py), and the ICBM152 template of nilearn",
            model_folder=model,
            fine=images["1 mm"],
            coarse=images["2 mm"],
        )
        predictor = stock.loaded(model, folds=(FOLD,), use_mirroring=False)
        with serving(material, scratch) as client:
            for name, image in images.items():
                print(name)
                place = scratch / name.replace(" ", "-")
                measured[name] = measure(
                    client, predictor, material, image, arguments.repeats, place, quick=arguments.quick
                )

    different = sum(voxels for each in measured.values() for voxels in each["different_voxels"].values())
    targets = [Target("the same labels in every repetition: voxels that differ", different, different == 0)]
    for name, each in measured.items():
        ratios = {side: ratio["median"] for side, ratio in each["ratio_to_server"].items()}
        print(f"{name}: times the server's seconds: " + ", ".join(f"{side} {r:.2f}" for side, r in ratios.items()))
    if arguments.quick:
        print(f"voxels that differ: {different}")
        return 0 if different == 0 else 1
    return write_results("whole_request", material, {"threads": torch.get_num_threads(), "cases": measured}, targets)


if __name__ == "__main__":
    sys.exit(main())
