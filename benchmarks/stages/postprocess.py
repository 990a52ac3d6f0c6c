"""All but the largest component removed from a label map: nnU-Net's own function beside ours, on the same labels.

They take turns, and who goes first alternates too; what counts is the lower quartile of the ratios of the pairs. The
steps are the most that nnU-Net ever determines: all foreground, then each of 40 labels. One label map is made up of
organs with strays; the other one is a real T1 image cut into 40 ranges of intensity, which has components by the
thousand. Both sides get 8-bit labels; nnU-Net's own command gives its function floating-point ones, which take longer.

Memory is measured in fresh processes that hold nothing but the labels: how much the resident set grows at most. Stock
returns a copy, ours changes what it is given. A third label map, in which every voxel is a component of its own, is the
worst that there is: a case is charged for that much (``memory_bytes``).

The result file is written after each case; cases that a run leaves out stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)
from scipy.ndimage import zoom

from benchmarks import RESULTS
from benchmarks.harness import provenance
from benchmarks.harness.child import last_line_of
from benchmarks.harness.material import Material, find_material
from benchmarks.harness.memory import with_extra_memory
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, print_targets, save_results
from benchmarks.harness.spread import spread, two_or_more
from nnunet_torchserve.export.postprocessing import memory_bytes, postprocess
from nnunet_torchserve.postprocessing import KeepLargest, Postprocessing

SEED = 20261129
REPEATS, QUICK_REPEATS = 3, 2

SHAPE = (300, 512, 512)
QUICK_SHAPE = (60, 128, 128)
LABELS = 40
LEAST_RATIO = 3.0

_STRAYS = 8
"""Of each organ."""

_OUTSIDE = 0.05
"""Of the image's largest value."""

Labels = npt.NDArray[np.uint8]

STEPS: tuple[tuple[int, ...], ...] = (tuple(range(1, LABELS + 1)), *((label,) for label in range(1, LABELS + 1)))


class Side(StrEnum):
    """Whose function it is."""

    STOCK = "stock"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Case:
    """One label map.

    Attributes:
        title: for people.
        make: makes it of a material and a shape (Z, Y, X).
        is_timed: beside stock; else only our memory is measured.
    """

    title: str
    make: Callable[[Material, tuple[int, int, int]], Labels]
    is_timed: bool = True


def organs(_material: Material, shape: tuple[int, int, int]) -> Labels:
    """An ellipsoid for each label, and small ones anywhere."""
    generator = np.random.default_rng(SEED)
    labels = np.zeros(shape, np.uint8)
    for label in range(1, LABELS + 1):
        for part in range(1 + _STRAYS):
            smallest, largest = (20, 8) if part == 0 else (100, 40)
            radii = [int(generator.integers(max(1, n // smallest), max(3, n // largest))) for n in shape]
            centre = [int(generator.integers(r, n - r)) for r, n in zip(radii, shape, strict=True)]
            box = tuple(slice(c - r, c + r + 1) for c, r in zip(centre, radii, strict=True))
            axes = np.ogrid[tuple(slice(-r, r + 1) for r in radii)]
            distance = sum((axis / r) ** 2 for axis, r in zip(axes, radii, strict=True))
            labels[box][np.asarray(distance) <= 1] = label
    return labels


def head(material: Material, shape: tuple[int, int, int]) -> Labels:
    """A real image in 40 ranges of intensity that have as many voxels each."""
    image = np.asarray(nib.load(material.fine).dataobj, np.float32).T
    image = zoom(image, [new / old for new, old in zip(shape, image.shape, strict=True)], order=1)
    inside = image > _OUTSIDE * image.max()
    limits = np.quantile(image[inside], np.linspace(0, 1, LABELS + 1)[1:-1])
    labels = np.zeros(shape, np.uint8)
    labels[inside] = 1 + np.searchsorted(limits, image[inside])
    return labels


def crystal(_material: Material, shape: tuple[int, int, int]) -> Labels:
    """Eight labels, such that no voxel has a neighbour of its own."""
    z, y, x = np.ogrid[tuple(slice(0, n) for n in shape)]
    labels: Labels = (1 + 4 * (z % 2) + 2 * (y % 2) + x % 2).astype(np.uint8)
    return labels


CASES = {
    "organs": Case("organs and strays", organs),
    "head": Case("a head in ranges of intensity", head),
    "crystal": Case("every voxel on its own", crystal, is_timed=False),
}


def by(side: Side, labels: Labels, steps: Sequence[tuple[int, ...]] = STEPS) -> Labels:
    """What one side makes of the labels, which ours changes."""
    if side is Side.OURS:
        postprocessing = Postprocessing(steps=tuple(KeepLargest(labels=step) for step in steps))
        ours: Any = postprocess(postprocessing, labels)
        return np.asarray(ours)
    functions = [remove_all_but_largest_component_from_segmentation] * len(steps)
    arguments: list[dict[str, Any]] = [
        {"labels_or_regions": list(step) if len(step) > 1 else step[0]} for step in steps
    ]
    stock: Labels = apply_postprocessing(labels, functions, arguments)
    return stock


def measure(name: str, labels: Labels, repeats: int, scratch: Path, *, quick: bool) -> dict[str, Any]:
    """Time both sides in turns, compare their results, measure their memory."""
    case = CASES[name]
    file = scratch / "labels.npy"
    np.save(file, labels)
    found: dict[str, Any] = {
        "title": case.title,
        "date": provenance.now(),
        **provenance.commit(),
        **provenance.cpu(),
        "shape": labels.shape,
        "steps": len(STEPS),
        "foreground_share": round(np.count_nonzero(labels) / labels.size, 4),
        "label_map_bytes": labels.nbytes,
        "our_extra_bytes": extra_bytes(Side.OURS, file),
        "charged_bytes": memory_bytes(labels.size),
    }
    if not case.is_timed:
        return found
    seconds: dict[Side, list[float]] = {side: [] for side in Side}
    results: dict[Side, Labels] = {}
    small = labels[:2, :9, :9].copy()
    for side in Side:
        by(side, small.copy())  # the first of each is not counted
    for number in range(repeats):
        for side in tuple(Side) if number % 2 else tuple(Side)[::-1]:
            given = labels.copy()
            if not quick:
                wait_for_quiet()
            began = time.perf_counter()
            results[side] = by(side, given)
            seconds[side].append(time.perf_counter() - began)
    stock_s, ours_s = seconds[Side.STOCK], seconds[Side.OURS]
    stock_bytes = extra_bytes(Side.STOCK, file)
    return found | {
        "pairs_seconds": [
            {"stock": round(theirs, 4), "ours": round(mine, 4)} for theirs, mine in zip(stock_s, ours_s, strict=True)
        ],
        "stock_seconds": spread(stock_s),
        "our_seconds": spread(ours_s),
        "ratio": spread([theirs / mine for theirs, mine in zip(stock_s, ours_s, strict=True)]),
        "removed_voxels": int(np.count_nonzero(results[Side.STOCK] != labels)),
        "different_voxels": int(np.count_nonzero(results[Side.STOCK] != results[Side.OURS])),
        "stock_extra_bytes": stock_bytes,
        "memory_share": found["our_extra_bytes"] / stock_bytes,
    }


def extra_bytes(side: Side, file: Path) -> int:
    """Bytes that a fresh process needs at most beside the labels; of stock's steps, all alike, three are done."""
    return int(last_line_of("benchmarks.stages.postprocess", "--be-a-process", side.value, str(file)))


def be_a_process(side: Side, file: Path) -> int:
    """Do it once and print how many bytes that took."""
    labels = np.load(file)
    by(side, labels[:2, :9, :9].copy())
    _, extra = with_extra_memory(partial(by, side, labels, STEPS if side is Side.OURS else STEPS[:3]))
    print(extra)
    return 0


def targets_of(measured: dict[str, dict[str, Any]]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for found in measured.values():
        title = found["title"]
        if "ratio" in found:
            ratio, different = found["ratio"]["q1"], found["different_voxels"]
            claim = f"{title}: at least {LEAST_RATIO:g} times sooner than stock (lower quartile)"
            targets.append(Target(claim, ratio, ratio >= LEAST_RATIO))
            targets.append(Target(f"{title}: voxels that differ from stock's", different, different == 0))
        share = found["our_extra_bytes"] / found["charged_bytes"]
        targets.append(
            Target(f"{title}: extra memory in parts of what a case is charged, at most 1", share, share <= 1)
        )
    return targets


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/postprocess.json``."""
    if list(arguments[:1]) == ["--be-a-process"]:
        side, file = arguments[1:]
        return be_a_process(Side(side), Path(file))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=two_or_more, default=REPEATS)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small label maps, fewer repetitions, and do not wait for an idle machine; write no results",
    )
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    measured = {} if quick else measured_before()
    with tempfile.TemporaryDirectory(prefix="bench-postprocess-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        for name in chosen.cases:
            labels = CASES[name].make(material, QUICK_SHAPE if quick else SHAPE)
            measured[name] = measure(name, labels, QUICK_REPEATS if quick else chosen.repeats, scratch, quick=quick)
            print(f"  {name}: {measured[name].get('ratio', 'memory only')}")
            if not quick:
                save_results("postprocess", material, {"cases": measured}, targets_of(measured))
    return print_targets(targets_of(measured))


def measured_before() -> dict[str, dict[str, Any]]:
    """The cases of the result file."""
    file = RESULTS / "postprocess.json"
    cases = json.loads(file.read_text())["cases"] if file.exists() else {}
    return {name: cases[name] for name in CASES if name in cases}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
