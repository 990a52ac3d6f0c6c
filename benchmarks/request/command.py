"""One request to a warm server against one run of the command ``nnUNetv2_predict``.

The command starts Python, imports torch, loads the model and starts worker processes for every run; the server has
done so before. Both go from an image file to a segmentation file, in turns, and must give the same labels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import Material, describe_image, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Client, serving, stage_medians
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.harness.stock_command import copy_to, run_command

LEAST_RATIO_2MM = 4.0
_CASE = "case"


def measure(client: Client, material: Material, image: Path, count: int, scratch: Path) -> dict[str, Any]:
    """Run both ``count`` times in turns, after one request that is not counted."""
    inputs, outputs = scratch / "inputs", scratch / "outputs"
    copy_to(image, inputs, f"{_CASE}_0000.nii.gz")
    ours, stock = scratch / "server.nii.gz", outputs / f"{_CASE}.nii.gz"
    client.segment(image, ours)

    answers, command_s, different = [], [], []
    for number in range(1, count + 1):
        wait_for_quiet()
        answers.append(client.segment(image, ours))
        wait_for_quiet()
        command_s.append(run_command(material, inputs, outputs, scratch))
        different.append(different_voxels(ours, stock))
        print(f"  {number}/{count}: request {answers[-1].seconds:.2f} s, command {command_s[-1]:.2f} s")
        stock.unlink()
    server_s = [answer.seconds for answer in answers]
    return {
        "image": describe_image(image),
        "repetitions": [
            {"server": asdict(answer), "command_seconds": seconds, "different_voxels": voxels}
            for answer, seconds, voxels in zip(answers, command_s, different, strict=True)
        ],
        "server_seconds": spread(server_s),
        "server_stage_medians_ms": stage_medians(answers),
        "command_seconds": spread(command_s),
        "ratio_of_medians": statistics.median(command_s) / statistics.median(server_s),
        "ratio": spread([theirs / mine for theirs, mine in zip(command_s, server_s, strict=True)]),
        "different_voxels": sum(different),
    }


def main() -> int:
    """Measure, write ``results/command.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions-2mm", type=two_or_more, default=7)
    parser.add_argument("--repetitions-1mm", type=two_or_more, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-command-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        cases = {
            "2 mm": (material.coarse, arguments.repetitions_2mm),
            "1 mm": (material.fine, arguments.repetitions_1mm),
        }
        measured = {}
        with serving(material, scratch) as client:
            for name, (image, count) in cases.items():
                print(name)
                measured[name] = measure(client, material, image, count, scratch)

    ratio = measured["2 mm"]["ratio_of_medians"]
    different = sum(case["different_voxels"] for case in measured.values())
    targets = [
        Target(f"2 mm: at least {LEAST_RATIO_2MM:g} times sooner than the command", ratio, ratio >= LEAST_RATIO_2MM),
        Target("the same labels in every repetition: voxels that differ", different, different == 0),
    ]
    return write_results("command", material, {"cases": measured}, targets)


if __name__ == "__main__":
    sys.exit(main())
