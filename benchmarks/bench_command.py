"""One request to a warm server against one run of the command ``nnUNetv2_predict``.

The command starts Python, imports torch, loads the model and starts worker processes for every run; the server has
done so before. Both go from an image file to a segmentation file, in turns, and must give the same labels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._common import Client, Material, Target

from benchmarks import _common

LEAST_RATIO_2MM = 4.0
_CASE = "case"


def measure(client: Client, material: Material, image: Path, count: int, scratch: Path) -> dict[str, Any]:
    """Run both ``count`` times in turns, after one request that is not counted."""
    inputs, outputs = scratch / "inputs", scratch / "outputs"
    _common.copy_to(image, inputs, f"{_CASE}_0000.nii.gz")
    ours, stock = scratch / "server.nii.gz", outputs / f"{_CASE}.nii.gz"
    client.segment(image, ours)

    answers, command_s, different = [], [], []
    for number in range(1, count + 1):
        _common.wait_for_quiet()
        answers.append(client.segment(image, ours))
        _common.wait_for_quiet()
        command_s.append(run_command(material, inputs, outputs, scratch))
        different.append(_common.different_voxels(ours, stock))
        print(f"  {number}/{count}: request {answers[-1].seconds:.2f} s, command {command_s[-1]:.2f} s")
        stock.unlink()
    server_s = [answer.seconds for answer in answers]
    return {
        "image": _common.describe_image(image),
        "repetitions": [
            {"server": asdict(answer), "command_seconds": seconds, "different_voxels": voxels}
            for answer, seconds, voxels in zip(answers, command_s, different, strict=True)
        ],
        "server_seconds": _common.spread(server_s),
        "server_stage_medians_ms": _common.stage_medians(answers),
        "command_seconds": _common.spread(command_s),
        "ratio_of_medians": statistics.median(command_s) / statistics.median(server_s),
        "ratio": _common.spread([theirs / mine for theirs, mine in zip(command_s, server_s, strict=True)]),
        "different_voxels": sum(different),
    }


def run_command(material: Material, inputs: Path, outputs: Path, scratch: Path) -> float:
    """Seconds that the stock command takes for the one image of ``inputs``.

    Raises:
        RuntimeError: it failed.
    """
    dataset = material.model_folder.parent.resolve()
    results = scratch / "results"
    results.mkdir(exist_ok=True)
    if not (results / dataset.name).exists():
        (results / dataset.name).symlink_to(dataset)
    folders = {"nnUNet_raw": scratch, "nnUNet_preprocessed": scratch, "nnUNet_results": results}
    command: list[str | Path] = [Path(sys.executable).parent / "nnUNetv2_predict", "-i", inputs, "-o", outputs]
    command += ["-d", str(int(dataset.name[7:10])), "-c", _common.CONFIGURATION, "-f", str(_common.FOLD)]
    command += ["-tr", _common.TRAINER, "-p", _common.PLANS, "--disable_tta", "-device", "cpu"]
    command += ["-npp", "1", "-nps", "1"]
    environment = os.environ | {name: str(folder) for name, folder in folders.items()}
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if ended.returncode != 0:
        msg = f"nnUNetv2_predict ended with {ended.returncode}:\n{ended.stderr[-2000:]}"
        raise RuntimeError(msg)
    return seconds


def main() -> int:
    """Measure, write ``results/command.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions-2mm", type=_common.two_or_more, default=7)
    parser.add_argument("--repetitions-1mm", type=_common.two_or_more, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-command-") as folder:
        scratch = Path(folder)
        material = _common.find_material(scratch)
        cases = {
            "2 mm": (material.coarse, arguments.repetitions_2mm),
            "1 mm": (material.fine, arguments.repetitions_1mm),
        }
        measured = {}
        with _common.serving(material, scratch) as client:
            for name, (image, count) in cases.items():
                print(name)
                measured[name] = measure(client, material, image, count, scratch)

    ratio = measured["2 mm"]["ratio_of_medians"]
    different = sum(case["different_voxels"] for case in measured.values())
    targets = [
        Target(f"2 mm: at least {LEAST_RATIO_2MM:g} times sooner than the command", ratio, ratio >= LEAST_RATIO_2MM),
        Target("the same labels in every repetition: voxels that differ", different, different == 0),
    ]
    return _common.write_results("command", material, {"cases": measured}, targets)


if __name__ == "__main__":
    sys.exit(main())
