"""Region targets in the data loader: nnU-Net's trainer beside those that ship packed targets.

Two parts, each in turns with stock in the same run.

* work: what the loader does with the labels of one sample of 128³ voxels with 40 labels, for 3 and for 30 regions and
  five scales of deep supervision, in one thread as nnU-Net's loader processes have it; and the bytes that go to the
  device. Decoding, which the device does, is timed on this CPU. What is decoded is compared with stock's targets.
* epoch: training on warped heads with 3 and with 30 regions (:mod:`benchmarks.training.parcel_regions`), 25 steps and 5
  of validation, and how much of it is waiting for data: with a process for augmentation beside the network's, as
  nnU-Net trains, and with all in one process, where nothing is hidden behind the network. Each training is a fresh
  process, with one thread for the network, after some steps that empty what the loader had in store.

A network on a CPU is slow, so that a loader has more time here than beside a GPU: the work of a sample is what carries
over to other machines, the share of an epoch is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from benchmarks.harness.child import last_line_of
from benchmarks.harness.material import CONFIGURATION, PLANS, Material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, print_targets, save_results
from benchmarks.harness.spread import spread, two_or_more
from benchmarks.training.parcel_regions import COUNTS, LABELS, recipe, region_sets, write_datasets
from nnunet_torchserve_tools.added_trainers import external_folder
from nnunet_torchserve_trainers.packed_transforms import packed
from nnunet_torchserve_trainers.region_codes import RegionCode, bitmask_code, label_code
from small_training import run

SIDE, QUICK_SIDE = 128, 32
SCALES = [[1 / 2**step] * 3 for step in range(5)]
REPEATS, EPOCH_REPEATS, QUICK_REPEATS = 9, 2, 2
STEPS, QUICK_STEPS = 25, 2
VALIDATION_SHARE = 5
"""nnU-Net has 250 steps of training to 50 of validation."""

WARM_UP = 8
"""More than the six batches that the loader has in store."""

SEED = 20261129
LEAST_RATIO = {3: 10.0, 30: 50.0}
MOST_BYTES_SHARE = 1 / 20
MOST_WAITING = 0.01
"""What counts as nothing."""

_BLOCK = 8
"""Voxels along an edge of a block of one label."""


class Way(StrEnum):
    """How regions get to the device."""

    STOCK = "stock"
    LABELMAP = "label map"
    BITMASK = "bit mask"

    @property
    def trainer(self) -> str:
        """The class that trains that way."""
        names = {Way.STOCK: "nnUNetTrainer", Way.LABELMAP: "nnUNetTrainerRegionLabelmap"}
        return names.get(self, "nnUNetTrainerRegionBitmask")

    def code(self, regions: Sequence[tuple[int, ...]]) -> RegionCode | None:
        """What it ships; ``None`` for stock."""
        if self is Way.STOCK:
            return None
        return label_code(regions) if self is Way.LABELMAP else bitmask_code(regions)


class Setting(StrEnum):
    """Where augmentation runs."""

    OWN_PROCESS = "a process of its own"
    SAME_PROCESS = "the network's process"

    @property
    def processes(self) -> int:
        """nnU-Net's variable ``nnUNet_n_proc_DA``."""
        return int(self is Setting.OWN_PROCESS)


def labels_of(side: int) -> torch.Tensor:
    """A label map (1, side, side, side), int16 as the loader has it: blocks of 40 labels with the background."""
    generator = torch.Generator().manual_seed(SEED)
    blocks = torch.randint(0, LABELS + 1, [side // _BLOCK] * 3, generator=generator, dtype=torch.int16)
    for axis in range(3):
        blocks = blocks.repeat_interleave(_BLOCK, axis)
    return blocks[None]


def measure_work(count: int, side: int, repeats: int, *, quick: bool) -> dict[str, Any]:
    """The loader's part of one sample, each way in turns."""
    regions = tuple(map(tuple, region_sets(count)))
    stock = ComposeTransforms([ConvertSegmentationToRegionsTransform(regions), DownsampleSegForDSTransform(SCALES)])
    codes = {way: way.code(regions) for way in Way}
    pipelines = {way: stock if code is None else _packed(stock, regions, code) for way, code in codes.items()}
    labels = labels_of(side)
    shipped = {way: pipelines[way](segmentation=labels)["segmentation"] for way in Way}  # the first is not counted
    seconds: dict[Way, list[float]] = {way: [] for way in Way}
    for number in range(repeats):
        for way in tuple(Way) if number % 2 else tuple(Way)[::-1]:
            if not quick:
                wait_for_quiet()
            began = time.perf_counter()
            pipelines[way](segmentation=labels)
            seconds[way].append(time.perf_counter() - began)
    found: dict[str, Any] = {"regions": count, "labels": LABELS + 1, "shape": [side] * 3, "scales": len(SCALES)}
    for way, code in codes.items():
        sizes = [target.nbytes for target in shipped[way]]
        ways: dict[str, Any] = {"seconds": spread_ms(seconds[way]), "bytes": sum(sizes)}
        if code is not None:
            ratios = [theirs / mine for theirs, mine in zip(seconds[Way.STOCK], seconds[way], strict=True)]
            began = time.perf_counter()
            decoded = [code.decode(target[None])[0] for target in shipped[way]]
            ways |= {
                "ratio": spread(ratios),
                "bytes_share": sum(sizes) / sum(target.nbytes for target in shipped[Way.STOCK]),
                "decode_ms_here": round(1e3 * (time.perf_counter() - began), 3),
                "different_voxels": sum(
                    int((mine != theirs).sum()) for mine, theirs in zip(decoded, shipped[Way.STOCK], strict=True)
                ),
            }
        found[way.value] = ways
    return found


def _packed(stock: ComposeTransforms, regions: tuple[tuple[int, ...], ...], code: RegionCode) -> ComposeTransforms:
    pipeline = packed(stock, regions, code)
    assert pipeline is not None
    return pipeline


def spread_ms(seconds: Sequence[float]) -> dict[str, float]:
    """A spread in milliseconds: some of these are far below a second's fourth decimal."""
    return spread([1e3 * each for each in seconds])


def measure_epochs(home: Path, count: int, steps: int, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Epochs of each way in turns, in both settings."""
    found: dict[str, Any] = {}
    for setting in Setting:
        runs: dict[Way, list[dict[str, float]]] = {way: [] for way in Way}
        for number in range(repeats):
            for way in tuple(Way) if number % 2 else tuple(Way)[::-1]:
                if not quick:
                    wait_for_quiet()
                arguments = (str(home), recipe(count).dataset, way.trainer, str(setting.processes), str(steps))
                module = "benchmarks.training.region_loader"
                runs[way].append(json.loads(last_line_of(module, "--be-a-training", *arguments)))
                print(f"  {count} regions, {setting}, {way}: {runs[way][-1]}")
        found[setting.value] = {
            way.value: {
                "epoch_seconds": spread([each["epoch_s"] for each in runs[way]]),
                "waiting_seconds": spread([each["waiting_s"] for each in runs[way]]),
                "waiting_share": spread([each["waiting_s"] / each["epoch_s"] for each in runs[way]]),
                "epoch_share_of_stock": round(
                    statistics.median(each["epoch_s"] for each in runs[way])
                    / statistics.median(each["epoch_s"] for each in runs[Way.STOCK]),
                    4,
                ),
            }
            for way in Way
        }
    return found | {"steps": steps, "validation_steps": validation_steps(steps)}


def validation_steps(steps: int) -> int:
    """How many there are to so many of training."""
    return max(1, steps // VALIDATION_SHARE)


def be_a_training(home: Path, dataset: str, trainer_name: str, processes: int, steps: int) -> int:
    """Train for an epoch and print how long it took, and how long it waited for data."""
    os.environ |= {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_n_proc_DA": str(processes), "nnUNet_extTrainer": str(external_folder())}
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    trainer = get_trainer_from_args(dataset, CONFIGURATION, 0, trainer_name, PLANS, device=torch.device("cpu"))
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    waits: list[float] = []

    def waited_for(loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
        began = time.perf_counter()
        batch = next(loader)
        waits.append(time.perf_counter() - began)
        return batch

    for _ in range(WARM_UP):
        trainer.train_step(next(trainer.dataloader_train))
    began = time.perf_counter()
    trainer.on_train_epoch_end([trainer.train_step(waited_for(trainer.dataloader_train)) for _ in range(steps)])
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        validated = [
            trainer.validation_step(waited_for(trainer.dataloader_val)) for _ in range(validation_steps(steps))
        ]
        trainer.on_validation_epoch_end(validated)
    took = time.perf_counter() - began
    trainer.on_train_end()  # ends the loader's processes
    print(json.dumps({"epoch_s": round(took, 4), "waiting_s": round(sum(waits), 4)}))
    return 0


def targets_of(measured: Mapping[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for count, work in measured.get("work", {}).items():
        for way in (Way.LABELMAP, Way.BITMASK):
            different = work[way.value]["different_voxels"]
            targets.append(
                Target(f"{count} regions, {way}: voxels that differ from stock's", different, different == 0)
            )
        ratio, least = work[Way.LABELMAP.value]["ratio"]["q1"], LEAST_RATIO[int(count)]
        claim = f"{count} regions, label map: at least {least:g} times less work than stock's (lower quartile)"
        targets.append(Target(claim, ratio, ratio >= least))
    if many := measured.get("work", {}).get(str(max(COUNTS))):
        share = many[Way.LABELMAP.value]["bytes_share"]
        claim = f"{max(COUNTS)} regions, label map: bytes to the device in parts of stock's, at most {MOST_BYTES_SHARE}"
        targets.append(Target(claim, share, share <= MOST_BYTES_SHARE))
    if epochs := measured.get("epochs", {}).get(str(max(COUNTS))):
        for way in (Way.LABELMAP, Way.BITMASK):
            share = epochs[Setting.OWN_PROCESS.value][way.value]["waiting_share"]["median"]
            claim = f"{max(COUNTS)} regions, {way}: share of an epoch that waits for data, at most {MOST_WAITING}"
            targets.append(Target(claim, share, share <= MOST_WAITING))
    return targets


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/region_loader.json``."""
    if list(arguments[:1]) == ["--be-a-training"]:
        folder, dataset, trainer, processes, wanted = arguments[1:]
        return be_a_training(Path(folder), dataset, trainer, int(processes), int(wanted))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("work", "epochs"), default=("work", "epochs"))
    parser.add_argument("--repeats", type=two_or_more, default=REPEATS, help="of the work of a sample")
    parser.add_argument("--epochs", type=two_or_more, default=EPOCH_REPEATS, help="of each trainer and setting")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small label maps, few steps and repetitions, and do not wait for an idle machine; write no results",
    )
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    repeats = QUICK_REPEATS if quick else chosen.repeats
    measured: dict[str, Any] = {}
    if "work" in chosen.parts:
        torch.set_num_threads(1)
        side = QUICK_SIDE if quick else SIDE
        measured["work"] = {str(count): measure_work(count, side, repeats, quick=quick) for count in COUNTS}
    if "epochs" in chosen.parts:
        with tempfile.TemporaryDirectory(prefix="bench-regions-") as scratch:
            home = Path(scratch)
            write_datasets(home / "raw")
            measured["epochs"] = {}
            for count in COUNTS:
                run(home, recipe(count))
                steps = QUICK_STEPS if quick else STEPS
                epochs = QUICK_REPEATS if quick else chosen.epochs
                measured["epochs"][str(count)] = measure_epochs(home, count, steps, epochs, quick=quick)
    targets = targets_of(measured)
    if not quick and set(chosen.parts) == {"work", "epochs"}:
        nowhere = Path()
        source = "blocks of 40 labels; warps of the ICBM152 template of the installed nilearn, 39 parcels"
        save_results("region_loader", Material(source, nowhere, nowhere, nowhere), measured, targets)
    return print_targets(targets)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
