"""From logits to labels: nnU-Net's own export beside ours, on the same logits, one after the other.

Both take logits on the network's grid and give the label map on the image's, which must be the same in every voxel.
They take turns, and who goes first alternates too; what counts is the lower quartile of the ratios of the pairs.

Memory is measured in fresh processes that hold nothing but the logits: how much the resident set grows at most while
the export runs, less the label map that is returned. Both have exported an eighth of the voxels before, so that no
import and no first use of a library counts. How threads share their heaps differs a little from run to run, so the
median of a few processes counts.

Logits are made up (ellipsoids and a little noise, white noise) and real: of the trained models of the material folder,
which the environment names, and of a 40-class network that is trained in minutes when it is first needed. The largest
case does not fit stock into the memory of the machine: there stock's seconds are those for one class, times the
classes, and with ``--full`` stock's function resamples every class, one at a time, for a comparison voxel by voxel.

The result file is written after each case. Cases that a run leaves out stay as they are; each has its date, commit and
processor. So the whole takes as many commands as one likes: ``--resume`` goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.harness import provenance
from benchmarks.harness.material import MATERIAL_VARIABLE, Material, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, print_targets, save_results
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.models import many_classes
from benchmarks.stages.export.cases import CASES, GB, Case, Sources
from benchmarks.stages.export.exported import Export, Labels, Side
from benchmarks.stages.export.memory import PROCESSES, extra_memory
from nnunet_torchserve.options import ExportMethod

REPEATS = 7

_FLOAT64_BYTES, _HALF_BYTES = 8, 2
_RESULT_FILE = RESULTS / "export.json"


def measure(case: Case, sources: Sources, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Time, memory and labels of a case."""
    folder = sources.scratch / "export"
    case.make(sources).save(folder)
    export = Export.load(folder)
    found: dict[str, Any] = {
        "title": case.title,
        "date": provenance.now(),
        **provenance.commit(),
        **provenance.cpu(),
        "logits": list(export.logits.shape),
        "output": list(export.shape),
        "mixed_share": export.mixed_share(),
    }
    for side in Side:
        export.thinned().by(side)
    found |= (measure_times if case.stock_fits else measure_times_by_class)(export, repeats, quick=quick)
    if case.approximate:
        found["approximate"] = measure_approximate(export, repeats, quick=quick)
    del export
    gc.collect()
    sides = tuple(Side) if case.stock_fits else (Side.OURS,)
    processes = {side: [extra_memory(folder, side) for _ in range(PROCESSES)] for side in sides}
    shutil.rmtree(folder)
    extra = {side: statistics.median(each) for side, each in processes.items()}
    found |= {"extra_bytes_of_processes": processes, "extra_bytes": extra}
    if case.stock_fits:
        found["memory_share"] = extra[Side.OURS] / max(extra[Side.STOCK], 1)
    return found


def measure_times(export: Export, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Both sides in turns."""
    seconds: dict[Side, list[float]] = {side: [] for side in Side}
    different = []
    for number in range(repeats):
        labels = {}
        for side in list(Side)[:: -1 if number % 2 else 1]:
            labels[side], spent = timed(partial(export.by, side), quick=quick)
            seconds[side].append(spent)
        different.append(int(np.count_nonzero(labels[Side.STOCK] != labels[Side.OURS])))
    return _times(seconds) | {"different_voxels": sum(different)}


def measure_times_by_class(export: Export, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Ours, in turns with stock's resampling of one class, whose time is multiplied by the classes."""
    classes = len(export.logits)
    seconds: dict[Side, list[float]] = {side: [] for side in Side}
    digests = set()
    for number in range(repeats):
        _, one = timed(partial(export.one_class_by_stock, number % classes), quick=quick)
        labels, spent = timed(export.by_us, quick=quick)
        seconds[Side.STOCK].append(classes * one)
        seconds[Side.OURS].append(spent)
        digests.add(digest(labels))
    arithmetic = _FLOAT64_BYTES * export.logits.numel() + _HALF_BYTES * classes * math.prod(export.shape)
    return _times(seconds) | {
        "stock": "its whole export does not fit this machine's memory; its seconds are those of its resampling "
        "function for one class times the classes, without the argmax",
        "stock_extra_bytes_by_arithmetic": arithmetic,  # the float64 copy of all logits, and its half result
        "labels_sha256": sorted(digests),
    }


def _times(seconds: dict[Side, list[float]]) -> dict[str, Any]:
    ratios = [theirs / ours for theirs, ours in zip(seconds[Side.STOCK], seconds[Side.OURS], strict=True)]
    return {
        "seconds_of_repeats": seconds,
        "stock_seconds": spread(seconds[Side.STOCK]),
        "our_seconds": spread(seconds[Side.OURS]),
        "ratio": spread(ratios),
    }


def timed(export: Callable[[], Any], *, quick: bool) -> tuple[Any, float]:
    """The result and its seconds, on an idle machine unless there is no time for that."""
    if not quick:
        wait_for_quiet()
    started = time.perf_counter()
    result = export()
    return result, time.perf_counter() - started


def measure_approximate(export: Export, repeats: int, *, quick: bool) -> dict[str, Any]:
    """How far labels of the faster methods are from stock's, and how much faster they are than our exact ones."""
    stock = export.by_stock()
    found: dict[str, Any] = {}
    for method in ExportMethod:
        labels = export.by_us(method)
        seconds = [timed(partial(export.by_us, method), quick=quick)[1] for _ in range(repeats)]
        scores = many_classes.dice(stock, labels)
        found[method] = {
            "seconds": spread(seconds),
            "changed_share_of_voxels": float(np.mean(labels != stock)),
            "changed_share_of_foreground": float(np.mean((labels != stock)[stock > 0])),
            "mean_dice_with_stock": float(np.mean(scores)),
            "least_dice_with_stock": float(np.min(scores)),
        }
    return found


def compare_class_by_class(export: Export) -> dict[str, Any]:
    """Our labels beside a running argmax over stock's resampled logits; for models without regions and crops."""
    started = time.perf_counter()
    highest = export.one_class_by_stock(0)
    stock = np.zeros(highest.shape, np.uint8)
    for number in range(1, len(export.logits)):
        logits = export.one_class_by_stock(number)
        higher = logits > highest  # not if they are equal: argmax takes the first
        highest[higher] = logits[higher]
        stock[higher] = number
    del highest, logits, higher
    seconds = time.perf_counter() - started
    return {
        "date": provenance.now(),
        "stock_seconds": seconds,
        "stock_labels_sha256": digest(stock),
        "different_voxels": int(np.count_nonzero(stock != export.by_us())),
    }


def digest(labels: Labels) -> str:
    """The sha256 of a label map's bytes and type."""
    return sha256(str(labels.dtype).encode() + labels.tobytes()).hexdigest()


def targets_of(case: Case, found: dict[str, Any]) -> list[Target]:
    """What is promised of a case, and what was measured."""
    promise, title = case.promise, case.title
    if case.stock_fits:
        different = found["different_voxels"]
        targets = [Target(f"{title}: voxels that differ from stock", different, different == 0)]
    else:
        whole = found.get("class_by_class", {})
        others = [each for each in found["labels_sha256"] if each != whole.get("stock_labels_sha256")]
        claim = f"{title}: label maps that are not the one that stock's function gives, class by class"
        targets = [Target(claim, len(others), not others and whole["different_voxels"] == 0)]
    if promise.least_ratio is not None:
        ratio = found["ratio"]["q1"]
        claim = f"{title}: at least {promise.least_ratio:g} times sooner than stock (lower quartile)"
        targets.append(Target(claim, ratio, ratio >= promise.least_ratio))
    if promise.most_memory_share is not None:
        share = found["memory_share"]
        claim = f"{title}: extra memory at most {promise.most_memory_share:g} of stock's (fraction)"
        targets.append(Target(claim, share, share <= promise.most_memory_share))
    if promise.most_seconds is not None:
        seconds = found["our_seconds"]["q3"]
        claim = f"{title}: at most {promise.most_seconds:g} s (upper quartile)"
        targets.append(Target(claim, seconds, seconds <= promise.most_seconds))
    if promise.most_extra_bytes is not None:
        extra = found["extra_bytes"][Side.OURS] / GB
        most = promise.most_extra_bytes / GB
        targets.append(Target(f"{title}: extra memory at most {most:g} GB", extra, extra <= most))
    return targets


class Results:
    """The cases of the result file; those that are not measured again stay, each with its own date and commit."""

    def __init__(self, material: Material, *, of_a_trial: bool) -> None:
        """A trial neither keeps what the file has nor writes to it."""
        self._material, self._saved = material, not of_a_trial
        before = json.loads(_RESULT_FILE.read_text()) if self._saved and _RESULT_FILE.exists() else {}
        self.cases: dict[str, dict[str, Any]] = before.get("cases", {})
        if "transcribed" in before:  # from a log: not all that is needed here
            self.cases = {}

    @property
    def targets(self) -> list[Target]:
        """Of all cases, in their order."""
        return [target for name in CASES if name in self.cases for target in targets_of(CASES[name], self.cases[name])]

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Put a case; what stock's function gave it class by class stays, because no code of ours decides that."""
        kept = {key: each for key, each in self.cases.get(name, {}).items() if key == "class_by_class"}
        self.cases[name] = kept | found
        if self._saved:
            cases = {each: self.cases[each] for each in CASES if each in self.cases}
            shared = {"threads": torch.get_num_threads(), "cases": cases}
            save_results("export", self._material, shared, self.targets)


def say(name: str, found: dict[str, Any]) -> None:
    """Print a case's numbers."""
    extra = ", ".join(f"{side} {size / 2**20:.0f} MiB" for side, size in found["extra_bytes"].items())
    print(
        f"{name}: stock {found['stock_seconds']['median']:.3f} s, ours {found['our_seconds']['median']:.3f} s, ratio "
        f"{found['ratio']['q1']:.2f} to {found['ratio']['q3']:.2f}; extra {extra}; mixed {found['mixed_share']:.2%}; "
        f"different {found.get('different_voxels', 'see class by class')}",
        flush=True,
    )
    for method, each in found.get("approximate", {}).items():
        print(
            f"    {method}: {each['seconds']['median']:.3f} s, {each['changed_share_of_voxels']:.2e} of voxels changed,"
            f" mean Dice {each['mean_dice_with_stock']:.4f}",
            flush=True,
        )


def main() -> int:
    """Measure, write ``results/export.json`` after each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=two_or_more, default=REPEATS)
    parser.add_argument("--full", action="store_true", help="large-117: resample every class by stock's function")
    parser.add_argument("--resume", action="store_true", help="leave out what the result file has already")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine; write no results")
    arguments = parser.parse_args()
    quick, material = arguments.quick, os.environ.get(MATERIAL_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="bench-export-") as folder:
        sources = Sources(Path(material) if material else None, Path(folder))
        results = Results(find_material(sources.scratch), of_a_trial=quick)
        for name in arguments.cases:
            case = CASES[name]
            if case.needs_material and sources.material is None:
                print(f"{name}: left out, because {MATERIAL_VARIABLE} is not set")
                continue
            if not (arguments.resume and name in results.cases):
                results.put(name, measure(case, sources, arguments.repeats, quick=quick))
                say(name, results.cases[name])
            compared = "class_by_class" in results.cases[name]
            if arguments.full and not case.stock_fits and not (arguments.resume and compared):
                whole = compare_class_by_class(case.make(sources))
                results.put(name, results.cases[name] | {"class_by_class": whole})
    return print_targets(results.targets)


if __name__ == "__main__":
    sys.exit(main())
