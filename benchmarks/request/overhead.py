"""What serving costs: a live server against stock's predictor, loaded, in this process.

Both go from an image file to a segmentation file, in turns, with the same number of threads, and must give the same
labels. Stock is also timed without its files, from array to array.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import torch

from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import FOLD, describe_image, find_material, resampled
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Answer, Client, serving, stage_medians
from benchmarks.harness.spread import spread, two_or_more
from support import stock

MOST_SECONDS_2MM = 0.15
MOST_SECONDS_LARGE_BODY = 1.0
LARGE_BODY_SPACING_MM = 0.56
"""The template then has 50 million voxels, 99 MB of int16; the network's grid stays that of the other cases."""


@dataclass(frozen=True, slots=True)
class Case:
    """An image, how often it is measured, and by how many seconds the server may be later."""

    name: str
    image: Path
    count: int
    most_seconds: float | None


def measure(client: Client, predictor: Any, case: Case, scratch: Path) -> dict[str, Any]:
    """Run all three ``case.count`` times in turns, after one round that is not counted.

    Every other round goes the other way round. Stock writes the file type that the server answers in: the input's.
    """
    suffix = ".nii.gz" if case.image.suffix == ".gz" else ".nii"
    ours, theirs = scratch / f"server{suffix}", scratch / f"stock{suffix}"
    reader = predictor.plans_manager.image_reader_writer_class()
    array, properties = reader.read_images([str(case.image)])

    def file_to_file() -> None:
        data, data_properties = reader.read_images([str(case.image)])
        reader.write_seg(predictor.predict_single_npy_array(data, data_properties), str(theirs), data_properties)

    def array_to_array() -> None:
        predictor.predict_single_npy_array(array, dict(properties))

    answers: list[Answer] = []
    file_s: list[float] = []
    array_s: list[float] = []
    different: list[int] = []
    steps: list[Callable[[], None]] = [
        lambda: answers.append(client.segment(case.image, ours)),
        lambda: file_s.append(_seconds(file_to_file)),
        lambda: array_s.append(_seconds(array_to_array)),
    ]
    for number in range(case.count + 1):
        for step in steps if number % 2 else reversed(steps):
            wait_for_quiet()
            step()
        different.append(different_voxels(ours, theirs))
        print(f"  {number}/{case.count}: server {answers[-1].seconds:.3f} s, stock {file_s[-1]:.3f} s")
    del answers[0], file_s[0], array_s[0]
    server_s = [answer.seconds for answer in answers]
    return {
        "image": describe_image(case.image),
        "repetitions": [
            {"server": asdict(answer), "stock_seconds": from_file, "stock_without_files_seconds": from_array}
            for answer, from_file, from_array in zip(answers, file_s, array_s, strict=True)
        ],
        "server_seconds": spread(server_s),
        "server_stage_medians_ms": stage_medians(answers),
        "stock_seconds": spread(file_s),
        "stock_without_files_seconds": spread(array_s),
        "difference_seconds": _differences(server_s, file_s),
        "difference_without_files_seconds": _differences(server_s, array_s),
        "ratio": spread([mine / stocks for mine, stocks in zip(server_s, file_s, strict=True)]),
        "different_voxels": sum(different),
    }


def main() -> int:
    """Measure, write ``results/overhead.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions-2mm", type=two_or_more, default=15)
    parser.add_argument("--repetitions-1mm", type=two_or_more, default=9)
    parser.add_argument("--repetitions-large-body", type=two_or_more, default=7)
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the server's worker inherits it
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        large = scratch / "large.nii"
        nib.save(resampled(nib.load(material.fine), LARGE_BODY_SPACING_MM), large)
        cases = [
            Case("2 mm", material.coarse, arguments.repetitions_2mm, MOST_SECONDS_2MM),
            Case("1 mm", material.fine, arguments.repetitions_1mm, None),
            Case("100 MB", large, arguments.repetitions_large_body, MOST_SECONDS_LARGE_BODY),
        ]
        predictor = stock.loaded(material.model_folder, folds=(FOLD,), use_mirroring=False)
        measured = {}
        with serving(material, scratch) as client:
            for case in cases:
                print(case.name)
                measured[case.name] = measure(client, predictor, case, scratch)

    targets = []
    for case in cases:
        late = measured[case.name]["difference_seconds"]["median"]
        if case.most_seconds is not None:
            claim = f"{case.name}: at most {case.most_seconds:g} s later than the loaded stock predictor"
            targets.append(Target(claim, late, late <= case.most_seconds))
    different = sum(case["different_voxels"] for case in measured.values())
    targets.append(Target("the same labels in every repetition: voxels that differ", different, different == 0))
    return write_results("overhead", material, {"threads": threads, "cases": measured}, targets)


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _differences(server_s: list[float], stock_s: list[float]) -> dict[str, float]:
    return spread([mine - stocks for mine, stocks in zip(server_s, stock_s, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
