"""A folder of mixed cases: the folder command against stock's, and four parts at once against one call.

Stock's command ``nnUNetv2_predict_from_modelfolder`` loads the model for every call; the server is warm. Each goes from
a folder of image files to a folder of label maps, in turns, and every label map must be the same. Stock writes its
files in place, ours appear whole: a first result is a file that is there.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.client.commands import ENDING, Run, predict_command, run
from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import find_material
from benchmarks.harness.mixture import Size, cut, sizes_of
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import serving
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.harness.stock_command import modelfolder_command

LEAST_RATIO = 1.5
LEAST_FIRST_RATIO = 5.0
MOST_PARTS_RATIO = 1.05
PARTS = 4


class Side(StrEnum):
    """Who predicts the folder."""

    STOCK = "nnUNetv2_predict_from_modelfolder"
    ONE = "nnunet-torchserve predict"
    PARTS = "the same, four parts at once"


def main() -> int:
    """Measure, write ``results/folder.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=two_or_more, default=16)
    parser.add_argument("--rounds", type=two_or_more, default=5)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    runs: dict[Side, list[Run]] = {side: [] for side in Side}
    different = missing = 0
    with tempfile.TemporaryDirectory(prefix="bench-folder-") as name:
        scratch = Path(name)
        material = find_material(scratch)
        images = scratch / "images"
        images.mkdir()
        cut(material, [images / f"case_{number:03}_0000{ENDING}" for number in range(arguments.cases)])
        with serving(material, scratch, workers=arguments.workers) as client:
            url = client.live.server.inference_url
            outputs = {side: scratch / side.name for side in Side}
            commands: dict[Side, Callable[[], list[list[str | Path]]]] = {
                Side.STOCK: lambda: [modelfolder_command(material, images, outputs[Side.STOCK])],
                Side.ONE: lambda: [predict_command(url, images, outputs[Side.ONE])],
                Side.PARTS: lambda: [
                    predict_command(url, images, outputs[Side.PARTS], "-num_parts", str(PARTS), "-part_id", str(part))
                    for part in range(PARTS)
                ],
            }
            run(commands[Side.ONE](), outputs[Side.ONE])  # each worker's first case takes longer
            for number in range(arguments.rounds):
                order = list(Side) if number % 2 == 0 else list(Side)[::-1]
                for side in order:
                    shutil.rmtree(outputs[side], ignore_errors=True)
                    outputs[side].mkdir()
                    if not arguments.quick:
                        wait_for_quiet()
                    runs[side].append(run(commands[side](), outputs[side]))
                for side in (Side.ONE, Side.PARTS):
                    for image in sorted(outputs[Side.STOCK].glob(f"*{ENDING}")):
                        ours = outputs[side] / image.name
                        missing += not ours.exists()
                        different += different_voxels(ours, image) if ours.exists() else 0
                    missing += arguments.cases - len(list(outputs[side].glob(f"*{ENDING}")))
                print(
                    f"  {number + 1}/{arguments.rounds}: "
                    + ", ".join(f"{runs[side][-1].seconds:.1f} s" for side in Side)
                )
    return write_results("folder", material, _measured(arguments, runs), _targets(runs, different, missing))


def _measured(arguments: argparse.Namespace, runs: dict[Side, list[Run]]) -> dict[str, Any]:
    return {
        "cases": {str(size): sizes_of(arguments.cases).count(size) for size in Size},
        "workers": arguments.workers,
        "sides": {
            str(side): {
                "seconds": spread([each.seconds for each in found]),
                "first_result_seconds": spread([each.first_s or 0.0 for each in found]),
                "rounds": [{"seconds": each.seconds, "first_s": each.first_s} for each in found],
            }
            for side, found in runs.items()
        },
        "ratio": spread(_ratios(runs, Side.STOCK, Side.ONE)),
        "ratio_of_first_results": spread(_first_ratios(runs)),
        "ratio_of_parts_to_one_call": spread(_ratios(runs, Side.PARTS, Side.ONE)),
    }


def _ratios(runs: dict[Side, list[Run]], one: Side, other: Side) -> list[float]:
    return [first.seconds / second.seconds for first, second in zip(runs[one], runs[other], strict=True)]


def _first_ratios(runs: dict[Side, list[Run]]) -> list[float]:
    pairs = zip(runs[Side.STOCK], runs[Side.ONE], strict=True)
    return [stock.first_s / ours.first_s for stock, ours in pairs if stock.first_s and ours.first_s]


def _targets(runs: dict[Side, list[Run]], different: int, missing: int) -> list[Target]:
    ratio = statistics.median(_ratios(runs, Side.STOCK, Side.ONE))
    first = statistics.median(_first_ratios(runs))
    parts = statistics.median(_ratios(runs, Side.PARTS, Side.ONE))
    return [
        Target(f"the folder at least {LEAST_RATIO:g} times sooner than stock's command", ratio, ratio >= LEAST_RATIO),
        Target(f"its first result at least {LEAST_FIRST_RATIO:g} times sooner", first, first >= LEAST_FIRST_RATIO),
        Target(
            f"four parts at once take at most {MOST_PARTS_RATIO:g} times one call's time",
            parts,
            parts <= MOST_PARTS_RATIO,
        ),
        Target("label maps that are missing", missing, missing == 0),
        Target("voxels that differ from stock's", different, different == 0),
    ]


if __name__ == "__main__":
    sys.exit(main())
