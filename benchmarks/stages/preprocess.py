"""From a decoded volume to the network's input: nnU-Net's own preprocessor beside ours, on the same volume.

They take turns, and who goes first alternates too; what counts is the lower quartile of the ratios of the pairs.
Volumes are a real T1 image, interpolated to the shape that is wanted, with noise, rounded to integers as scanners
write them.

Memory is measured in fresh processes that hold nothing but the volume: how much the resident set grows at most while
one side works, less the array that it returns. Both have preprocessed a small volume before, so that no import counts.

In the end a trained model predicts the 1 mm image from either side's array, and the labels are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from scipy.ndimage import zoom

from benchmarks.harness.child import last_line_of
from benchmarks.harness.material import FOLD, Material, describe_image, find_material
from benchmarks.harness.memory import with_extra_memory
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.options import PreprocessMethod
from nnunet_torchserve.preprocess import PreprocessedCase, preprocess
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.plans import Array, Plan, Spacing, volume_of

SEED = 20261123
REPEATS, QUICK_REPEATS = 7, 3

LEAST_EQUAL = 0.999999
MOST_ULPS = 1.0

_NOISE = 0.02
"""Of the image's largest value."""

_WARM_UP = (12, 13, 14)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure.

    Attributes:
        title: for people.
        shape: of the volume, (Z, Y, X).
        spacing: its voxels' mm, (z, y, x).
        target: mm on the network's grid.
        use_mask: normalise within the nonzero region only; the volume then has zeros around the head.
        least_ratio: promised: of stock's seconds to ours, at the lower quartile.
        most_memory_share: promised: our extra memory in parts of stock's.
    """

    title: str
    shape: tuple[int, int, int]
    spacing: Spacing
    target: Spacing
    use_mask: bool = False
    least_ratio: float | None = None
    most_memory_share: float | None = None

    @property
    def plan(self) -> Plan:
        """As nnU-Net plans a dataset of MR images."""
        return Plan(self.target, use_mask=(self.use_mask,))


CASES = {
    "large": Case(
        "300 x 512 x 512 to 400 x 266 x 266",
        (300, 512, 512),
        (2.0, 1.5 * 266 / 512, 1.5 * 266 / 512),
        (1.5, 1.5, 1.5),
        least_ratio=5,
        most_memory_share=1 / 2,
    ),
    "usual": Case(
        "120 x 160 x 160 to 160 x 128 x 128",
        (120, 160, 160),
        (2.0, 1.2, 1.2),
        (1.5, 1.5, 1.5),
    ),
    "thick": Case(
        "thick slices, resampled one by one: 60 x 512 x 512 to 75 x 398 x 398",
        (60, 512, 512),
        (5.0, 0.7, 0.7),
        (4.0, 0.9, 0.9),
    ),
    "masked": Case(
        "zeros around the head, normalised within: 120 x 160 x 160",
        (120, 160, 160),
        (2.0, 1.2, 1.2),
        (1.5, 1.5, 1.5),
        use_mask=True,
    ),
}


def image_for(case: Case, material: Material) -> Array:
    """A head of this shape, float32 (1, Z, Y, X), as a reader gives it."""
    head = np.asarray(nib.load(material.fine).dataobj, np.float32).T
    image = zoom(head, [new / old for new, old in zip(case.shape, head.shape, strict=True)], order=1)
    outside = image < 0.05 * image.max()
    image += np.random.default_rng(SEED).normal(0, _NOISE * image.max(), image.shape).astype(np.float32)
    np.abs(image, out=image)
    if case.use_mask:
        image[outside] = 0
    array: Array = np.round(image)[np.newaxis]
    return array


def by(method: PreprocessMethod, case: Case, image: Array) -> tuple[PreprocessedCase, float]:
    """What one side makes of a copy of the image, and the seconds it takes."""
    volume, member = volume_of(image.copy(), case.spacing), case.plan.member
    began = time.perf_counter()
    preprocessed = preprocess(member, volume, method)
    return preprocessed, time.perf_counter() - began


def differences(ours: Array, stock: Array) -> dict[str, Any]:
    """How many voxels are equal, and how far the others are apart, in float32 ulps."""
    assert ours.shape == stock.shape
    apart = np.flatnonzero(ours != stock)
    distance = np.abs(ours.flat[apart].astype(np.float64) - stock.flat[apart])
    of_voxel = distance / np.spacing(np.abs(stock.flat[apart]))
    largest = np.spacing(np.float32(stock.max() - stock.min()))
    return {
        "voxels": stock.size,
        "different_voxels": int(apart.size),
        "equal_share": 1 - apart.size / stock.size,
        "largest_difference_ulps": float(of_voxel.max(initial=0)),
        "largest_difference_ulps_of_the_range": float(distance.max(initial=0) / largest),
    }


def measure(case: Case, image: Array, repeats: int, scratch: Path, *, quick: bool) -> dict[str, Any]:
    """Time both sides in turns, compare their results, measure their memory."""
    sides = (PreprocessMethod.STOCK, PreprocessMethod.EXACT)
    seconds: dict[PreprocessMethod, list[float]] = {side: [] for side in sides}
    results = {side: by(side, case, image)[0].data.numpy() for side in sides}  # the first of each is not counted
    compared = differences(results[PreprocessMethod.EXACT], results[PreprocessMethod.STOCK])
    shape = results[PreprocessMethod.EXACT].shape
    del results
    for number in range(repeats):
        for side in sides if number % 2 else sides[::-1]:
            if not quick:
                wait_for_quiet()
            seconds[side].append(by(side, case, image)[1])
    stock_s, ours_s = (seconds[side] for side in sides)
    file = scratch / "image.npy"
    np.save(file, image)
    stock_bytes, ours_bytes = (extra_bytes(case, side, file) for side in sides)
    return {
        "title": case.title,
        "network_grid": shape,
        "pairs_seconds": [
            {"stock": round(theirs, 4), "ours": round(mine, 4)} for theirs, mine in zip(stock_s, ours_s, strict=True)
        ],
        "stock_seconds": spread(stock_s),
        "our_seconds": spread(ours_s),
        "ratio": spread([theirs / mine for theirs, mine in zip(stock_s, ours_s, strict=True)]),
        "volume_bytes": image.nbytes,
        "stock_extra_bytes": stock_bytes,
        "our_extra_bytes": ours_bytes,
        "memory_share": ours_bytes / stock_bytes,
        **compared,
    }


def extra_bytes(case: Case, method: PreprocessMethod, file: Path) -> int:
    """Bytes that a fresh process needs at most beside the volume and the result."""
    [name] = [name for name, each in CASES.items() if each is case]
    return int(last_line_of("benchmarks.stages.preprocess", "--be-a-process", name, method.value, str(file)))


def be_a_process(case: Case, method: PreprocessMethod, file: Path) -> int:
    """Preprocess a volume and print how many bytes that took beside the volume and the result."""
    small = np.random.default_rng(SEED).normal(size=(1, *_WARM_UP)).astype(np.float32)
    by(method, case, small)
    volume, member = volume_of(np.load(file), case.spacing), case.plan.member
    preprocessed, extra = with_extra_memory(partial(preprocess, member, volume, method))
    print(extra - preprocessed.data.nbytes)
    return 0


def labels_in_the_end(material: Material, scratch: Path) -> dict[str, Any]:
    """Predict the 1 mm image with the trained model from both sides' arrays; how many labels differ."""
    [archive] = make_archives(ArchiveRequest(material.model_folder, scratch, folds=(FOLD,)))
    zipfile.ZipFile(archive).extractall(scratch / "model")
    bundle = ModelBundle(scratch / "model")
    member = bundle.lead
    reader = member.plans.image_reader_writer_class()
    image, properties = reader.read_images([str(material.fine)])
    settings = Settings(member.name, folds=(FOLD,), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
    engine = LocalEngine(bundle, torch.device("cpu"))
    cases, labels = {}, {}
    for method in PreprocessMethod:
        case = preprocess(member, volume_of(image.copy(), tuple(properties["spacing"])), method)
        logits = engine.predict(case.data, settings).logits
        labels[method] = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, member.plans, member.configuration, member.labels, case.properties
        )
        cases[method] = case.data.numpy()
    exact, stock = PreprocessMethod.EXACT, PreprocessMethod.STOCK
    return {
        "image": describe_image(material.fine),
        "labels": np.unique(labels[stock]).tolist(),
        "different_labels": int(np.count_nonzero(labels[exact] != labels[stock])),
        "preprocessed": differences(cases[exact], cases[stock]),
    }


def targets_of(measured: dict[str, dict[str, Any]], labels: dict[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for name, found in measured.items():
        case = CASES[name]
        if case.least_ratio is not None:
            ratio = found["ratio"]["q1"]
            claim = f"{case.title}: at least {case.least_ratio:g} times sooner than stock (lower quartile)"
            targets.append(Target(claim, ratio, ratio >= case.least_ratio))
        if case.most_memory_share is not None:
            share = found["memory_share"]
            claim = f"{case.title}: extra memory in parts of stock's, at most {case.most_memory_share:g}"
            targets.append(Target(claim, share, share <= case.most_memory_share))
        share, ulps = found["equal_share"], found["largest_difference_ulps"]
        claim = f"{case.title}: share of voxels equal to stock's, at least {LEAST_EQUAL}"
        targets.append(Target(claim, share, share >= LEAST_EQUAL))
        claim = f"{case.title}: largest difference, at most one ulp of the voxel (ulps)"
        targets.append(Target(claim, ulps, ulps <= MOST_ULPS))
    different = labels["different_labels"]
    targets.append(Target("the same labels in the end: voxels that differ", different, different == 0))
    return targets


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/preprocess.json``."""
    if list(arguments[:1]) == ["--be-a-process"]:
        name, method, file = arguments[1:]
        return be_a_process(CASES[name], PreprocessMethod(method), Path(file))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and do not wait for an idle machine")
    quick = parser.parse_args(arguments).quick
    measured = {}
    with tempfile.TemporaryDirectory(prefix="bench-preprocess-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        for name, case in CASES.items():
            image = image_for(case, material)
            measured[name] = measure(case, image, QUICK_REPEATS if quick else REPEATS, scratch, quick=quick)
            print(f"  {name}: {measured[name]['ratio']} times, memory {measured[name]['memory_share']:.3f}")
        labels = labels_in_the_end(material, scratch)
    document = {"threads": torch.get_num_threads(), "cases": measured, "prediction": labels}
    return write_results("preprocess", material, document, targets_of(measured, labels))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
