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

Results of cases that a run leaves out are kept from the run before; every case has its date.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import numpy as np
import numpy.typing as npt
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from benchmarks import RESULTS
from benchmarks.harness.child import last_line_of
from benchmarks.harness.material import CONFIGURATION, FOLD, MATERIAL_VARIABLE, PLANS, TRAINER, find_material
from benchmarks.harness.memory import with_extra_memory
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.models import many_classes
from nnunet_torchserve.export import label_map, sparse
from nnunet_torchserve.export.grid import Taps, linear_taps, resampling_of
from nnunet_torchserve.export.rules import MIXED, rule_of
from nnunet_torchserve.options import ExportMethod
from support.logits import ExportModel, export_model, export_model_of, organs, predicted, properties_for, white_noise

SEED = 20261123
REPEATS = 7

_MEMORY_PROCESSES = 3
_GB = 1e9
_FLOAT64_BYTES, _HALF_BYTES = 8, 2
_RESULT_FILE = RESULTS / "export.json"

Labels = npt.NDArray[np.integer[Any]]


class Side(StrEnum):
    """Who exports."""

    STOCK = "stock"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Export:
    """What an export gets.

    Attributes:
        model: plans, configuration and labels.
        logits: float16 (C, z, y, x).
        properties: nnU-Net's ``data_properties``.
    """

    model: ExportModel
    logits: torch.Tensor
    properties: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write everything for :meth:`load`."""
        plans, labels = self.model.plans, self.model.labels
        [configuration] = [
            name
            for name in plans.available_configurations
            if plans.get_configuration(name).configuration == self.model.configuration.configuration
        ]
        dataset = {"labels": labels.label_dict, "regions_class_order": labels.regions_class_order}
        folder.mkdir()
        np.save(folder / "logits.npy", self.logits.numpy())
        described = {"plans": plans.plans, "dataset": dataset, "configuration": configuration}
        (folder / "model.json").write_text(json.dumps(described))
        (folder / "properties.json").write_text(json.dumps(self.properties, default=int))

    @classmethod
    def load(cls, folder: Path) -> Export:
        """What :meth:`save` wrote."""
        logits = torch.from_numpy(np.load(folder / "logits.npy"))
        properties = json.loads((folder / "properties.json").read_text())
        return cls(export_model_of(**json.loads((folder / "model.json").read_text())), logits, properties)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image's grid within the crop box, in the plan's axis order."""
        return tuple(self.properties["shape_after_cropping_and_before_resampling"])

    @property
    def spacings(self) -> tuple[list[float], list[float]]:
        """Of the network's grid and of the image's, mm, in the plan's axis order; as stock's export has them."""
        image = [self.properties["spacing"][axis] for axis in self.model.plans.transpose_forward]
        network = [float(size) for size in self.model.configuration.spacing]
        return (network if len(network) == len(image) else [image[0], *network]), image

    def mixed_share(self) -> float:
        """The share of cells of the network's grid whose corners leave their label open."""
        rule, taps = rule_of(self.model), resampling_of(self.model, self.logits, self.properties).taps
        assert taps is not None
        between = [_neighbours(each) if each.interpolates else linear_taps(each.size, each.size) for each in taps]
        return float(np.mean(sparse.cell_codes(sparse.encode(self.logits, rule)[0], between) == MIXED[rule.dtype]))

    def thinned(self) -> Export:
        """Every second voxel along each axis: an eighth of the work, and the same code."""
        shape = [math.ceil(size / 2) for size in self.shape]
        logits = self.logits[:, ::2, ::2, ::2].contiguous()
        return Export(self.model, logits, properties_for(shape, self.properties["spacing"]))

    def by(self, side: Side) -> Labels:
        """The label map (Z, Y, X) that one side makes of it."""
        return self.by_stock() if side is Side.STOCK else self.by_us()

    def by_stock(self) -> Labels:
        """nnU-Net's label map, on as many threads as ours."""
        model = self.model
        labels: Labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            self.logits,
            model.plans,
            model.configuration,
            model.labels,
            dict(self.properties),
            num_threads_torch=torch.get_num_threads(),
        )
        return labels

    def by_us(self, method: ExportMethod = ExportMethod.EXACT) -> Labels:
        """Our label map."""
        labels: Labels = label_map(self.model, self.logits, self.properties, method)
        return labels

    def one_class_by_stock(self, number: int) -> npt.NDArray[np.float16]:
        """The logits of a class on the image's grid, by the plan's resampling function."""
        logits = self.logits[number : number + 1]
        resampled = self.model.configuration.resampling_fn_probabilities(logits, self.shape, *self.spacings)
        one: npt.NDArray[np.float16] = np.asarray(resampled)[0]
        return one


@dataclass(frozen=True, slots=True)
class Sources:
    """Where real logits come from.

    Attributes:
        material: the material folder, if there is one.
        scratch: for files of images.
    """

    material: Path | None
    scratch: Path


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised of a case beside equal labels, which always are.

    Attributes:
        least_ratio: of stock's seconds to ours, at the lower quartile.
        most_memory_share: our extra memory in parts of stock's.
        most_seconds: ours, at the upper quartile.
        most_extra_bytes: our extra memory.
    """

    least_ratio: float | None = None
    most_memory_share: float | None = None
    most_seconds: float | None = None
    most_extra_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        title: for people.
        make: gives the logits.
        promise: what is promised of it.
        approximate: compare the methods that are not exact, too.
        stock_fits: stock's export fits this machine's memory.
        needs_material: cannot be made without the material folder.
    """

    title: str
    make: Callable[[Sources], Export]
    promise: Promise = Promise()
    approximate: bool = False
    stock_fits: bool = True
    needs_material: bool = False


def _neighbours(taps: Taps) -> Taps:
    """Half-way between an axis's inputs: one output for each cell."""
    before = np.arange(max(1, taps.size - 1))
    half = np.full(len(before), 0.5)
    return Taps(taps.size, before, np.minimum(before + 1, taps.size - 1), half, half)


def ties(classes: int, shape: Sequence[int], seed: int) -> torch.Tensor:
    """The same noise for every class."""
    return white_noise(1, shape, seed).repeat(classes, 1, 1, 1)


def made_up(
    logits: Callable[[int, Sequence[int], int], torch.Tensor],
    classes: int,
    grid: tuple[int, int, int],
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5),
) -> Export:
    """Logits of ``logits(classes, grid, seed)`` for an image of ``shape``; the network's grid has ``spacing`` mm."""
    image = [size * before / after for size, before, after in zip(spacing, grid, shape, strict=True)]
    model = export_model(classes, spacing=spacing)
    return Export(model, logits(classes, grid, SEED), properties_for(shape, image))


def made_up_regions(regions: int, grid: tuple[int, int, int], shape: tuple[int, int, int]) -> Export:
    """Ellipsoids of nested regions, like whole tumour, tumour core and enhancing tumour."""
    nested = [range(region, regions + 1) for region in range(1, regions + 1)]
    like = made_up(organs, regions + 1, grid, shape)
    return Export(export_model(regions=nested), like.logits[1:], like.properties)


def real(dataset: str, case: str, sources: Sources) -> Export:
    """Logits of a model of the material folder, fold 0, without mirroring."""
    assert sources.material is not None
    images = sorted((sources.material / "images" / dataset).glob(f"{case}_*.nii.gz"))
    trained = f"{TRAINER}__{PLANS}__{CONFIGURATION}"
    return Export(*predicted(sources.material / "models" / dataset / trained, images, FOLD))


def parcels(spacing_mm: float, sources: Sources) -> Export:
    """Logits of the 40-class network for the template."""
    image = many_classes.write_template(sources.scratch, spacing_mm)
    return Export(*predicted(many_classes.model_folder(many_classes.CACHE), [image], FOLD))


def _separate_z(thickness_mm: float, sources: Sources) -> Export:  # noqa: ARG001 (a Case's make)
    model = export_model(20, spacing=(5.0, 0.7, 0.7))
    properties = properties_for((round(40 * 5 / thickness_mm), 320, 320), (thickness_mm, 0.5, 0.5))
    return Export(model, organs(20, (40, 229, 229), SEED), properties)


_GRID, _IMAGE = (160, 128, 128), (120, 160, 160)
_LARGE_GRID, _LARGE_IMAGE = (400, 267, 267), (300, 512, 512)
_T1, _TWO_CHANNELS = "Dataset501_BrainTissue", "Dataset502_BrainRegions"

CASES = {
    "organs-3": Case(
        "3 classes",
        lambda _: made_up(organs, 3, _GRID, _IMAGE),
        Promise(least_ratio=5),
    ),
    "organs-40": Case(
        "40 classes",
        lambda _: made_up(organs, 40, _GRID, _IMAGE),
        Promise(least_ratio=12, most_memory_share=1 / 10),
    ),
    "organs-117": Case(
        "117 classes",
        lambda _: made_up(organs, 117, _GRID, _IMAGE),
        Promise(least_ratio=10, most_memory_share=1 / 10),
        approximate=True,
    ),
    "regions-12": Case(
        "12 regions",
        lambda _: made_up_regions(12, _GRID, _IMAGE),
        Promise(least_ratio=8, most_memory_share=1 / 10),
    ),
    "separate-z-20": Case(
        "20 classes, thick slices resampled one by one",
        partial(_separate_z, 5.0),
        Promise(least_ratio=8, most_memory_share=1 / 10),
    ),
    "separate-z-20-between": Case(
        "20 classes, thick slices resampled one by one, and other slices than the network's",
        partial(_separate_z, 4.0),
    ),
    "noise-40": Case(
        "white noise of 40 classes",
        lambda _: made_up(white_noise, 40, _GRID, _IMAGE),
        Promise(least_ratio=3, most_memory_share=1 / 5),
    ),
    "ties-40": Case(
        "40 classes that are equal everywhere, so that every voxel is settled in stock's arithmetic",
        lambda _: made_up(ties, 40, _GRID, _IMAGE),
    ),
    "coarse-20": Case(
        "20 classes, an image much coarser than the network's grid",
        lambda _: made_up(organs, 20, (256, 256, 256), (64, 64, 64)),
    ),
    "tissue-2mm": Case(
        "real, 4 classes, nothing is resampled",
        partial(real, _T1, "test_000"),
        Promise(least_ratio=1),
        approximate=True,
        needs_material=True,
    ),
    "tissue-oblique": Case(
        "real, 4 classes, 1.5 x 1.5 x 3 mm",
        partial(real, _T1, "test_001"),
        Promise(least_ratio=5, most_memory_share=1 / 4),
        approximate=True,
        needs_material=True,
    ),
    "tissue-1mm": Case(
        "real, 4 classes, 1 mm",
        partial(real, _T1, "test_002"),
        Promise(least_ratio=5, most_memory_share=1 / 4),
        approximate=True,
        needs_material=True,
    ),
    "regions-2mm": Case(
        "real, 3 regions, nothing is resampled",
        partial(real, _TWO_CHANNELS, "test_000"),
        Promise(least_ratio=1),
        approximate=True,
        needs_material=True,
    ),
    "regions-oblique": Case(
        "real, 3 regions, 1.5 x 1.5 x 3 mm",
        partial(real, _TWO_CHANNELS, "test_001"),
        approximate=True,
        needs_material=True,
    ),
    "parcels-2mm": Case("real, 40 classes, 2 mm", partial(parcels, 2.0), approximate=True),
    "parcels-1mm": Case("real, 40 classes, 1 mm", partial(parcels, 1.0), approximate=True),
    "large-10": Case(
        "10 classes, 300 x 512 x 512",
        lambda _: made_up(organs, 10, _LARGE_GRID, _LARGE_IMAGE),
        Promise(least_ratio=12, most_extra_bytes=_GB / 2),
    ),
    "large-117": Case(
        "117 classes, 300 x 512 x 512",
        lambda _: made_up(organs, 117, _LARGE_GRID, _LARGE_IMAGE),
        Promise(most_seconds=30, most_extra_bytes=_GB),
        stock_fits=False,
    ),
}


def extra_memory(folder: Path, side: Side) -> int:
    """Bytes that one side needs beside logits and label map, measured in a process of its own."""
    return int(last_line_of("benchmarks.stages.export", "--measure-memory", side, str(folder)))


def measure_memory(side: Side, folder: Path) -> int:
    """Be the process of :func:`extra_memory`; Linux only."""
    export = Export.load(folder)
    export.thinned().by(side)
    gc.collect()
    labels, extra = with_extra_memory(partial(export.by, side))
    return max(0, extra - labels.nbytes)


def measure(case: Case, sources: Sources, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Time, memory and labels of a case."""
    folder = sources.scratch / "export"
    case.make(sources).save(folder)
    export = Export.load(folder)
    found: dict[str, Any] = {
        "title": case.title,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
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
    processes = {side: [extra_memory(folder, side) for _ in range(_MEMORY_PROCESSES)] for side in sides}
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
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
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
        extra = found["extra_bytes"][Side.OURS] / _GB
        most = promise.most_extra_bytes / _GB
        targets.append(Target(f"{title}: extra memory at most {most:g} GB", extra, extra <= most))
    return targets


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
    """Measure, write ``results/export.json``."""
    if sys.argv[1:2] == ["--measure-memory"]:
        print(measure_memory(Side(sys.argv[2]), Path(sys.argv[3])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=two_or_more, default=REPEATS)
    parser.add_argument("--full", action="store_true", help="large-117: resample every class by stock's function")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine; write no results")
    arguments = parser.parse_args()
    before: dict[str, Any] = json.loads(_RESULT_FILE.read_text()) if _RESULT_FILE.exists() else {"cases": {}}
    kept: dict[str, Any] = {} if "transcribed" in before else before["cases"]  # from a log: not all that is needed here
    measured = {}
    with tempfile.TemporaryDirectory(prefix="bench-export-") as folder:
        material = os.environ.get(MATERIAL_VARIABLE)
        sources = Sources(Path(material) if material else None, Path(folder))
        for name in arguments.cases:
            case = CASES[name]
            if case.needs_material and sources.material is None:
                print(f"{name}: left out, because {MATERIAL_VARIABLE} is not set")
                continue
            found = measure(case, sources, arguments.repeats, quick=arguments.quick)
            if not case.stock_fits and arguments.full:
                found["class_by_class"] = compare_class_by_class(case.make(sources))
            elif "class_by_class" in kept.get(name, {}):
                found["class_by_class"] = kept[name]["class_by_class"]
            measured[name] = found
            say(name, found)
        described = find_material(sources.scratch)

    if arguments.quick:
        targets = [target for name, found in measured.items() for target in targets_of(CASES[name], found)]
        for target in targets:
            print(f"{'met   ' if target.met else 'MISSED'} {target.claim}: measured {target.measured:.4g}")
        return 0 if all(target.met for target in targets) else 1
    cases = {name: (kept | measured)[name] for name in CASES if name in kept | measured}
    targets = [target for name, found in cases.items() for target in targets_of(CASES[name], found)]
    shared = {"threads": torch.get_num_threads(), "cases": cases}
    return write_results("export", described, shared, targets)


if __name__ == "__main__":
    sys.exit(main())
