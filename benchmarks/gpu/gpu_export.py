"""Export on a GPU against the export on the CPU: from logits where the network left them to a label map on the host.

What ADR 0004 leaves open. The CPU's way has the logits copied into host memory first, as the engine does it; the
device's way interpolates and decides there, and copies labels. Both are the project's own code, and their labels are
compared. Logits are made up: organs with noise, of which a small share of cells is open, as with a trained network;
or nothing but noise, the worst case of the CPU's way. One case at a time, and nothing else runs: how much the device's
way would take from the passes of other cases is its own seconds, for they are the device's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.gpu.gpu_engine import machine
from benchmarks.harness import provenance
from benchmarks.harness.results import write_json
from benchmarks.harness.spread import spread
from nnunet_torchserve.export import label_map
from nnunet_torchserve.tiling import STOCK_THREADS
from support.logits import ExportModel, export_model, organs, properties_for, white_noise

SEED = 20261129
SHAPE, SPACING = (300, 512, 512), (1.0, 0.8, 0.8)
TARGET = 1.5
LOGITS = {"organs": organs, "noise": white_noise}


def timed(call: Callable[[], np.ndarray], repetitions: int) -> tuple[list[float], np.ndarray]:
    """Seconds of each, after one that warms up, and the labels."""
    seconds = []
    for number in range(repetitions + 1):
        began = time.perf_counter()
        labels = call()
        if number:
            seconds.append(time.perf_counter() - began)
    return seconds, labels


def measure(model: ExportModel, properties: dict[str, Any], logits: torch.Tensor, repetitions: int) -> dict[str, Any]:
    """Both ways with the same logits."""
    is_cuda = logits.device.type == "cuda"
    host = torch.empty(logits.shape, dtype=logits.dtype, pin_memory=is_cuda)

    def by_cpu() -> np.ndarray:
        host.copy_(logits)
        return label_map(model, host, properties)

    def by_device() -> np.ndarray:
        return label_map(model, logits, properties)

    copies, _ = timed(lambda: host.copy_(logits).numpy(), repetitions)
    cpu_s, expected = timed(by_cpu, repetitions)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(logits.device)
    device_s, found = timed(by_device, repetitions)
    return {
        "copy_s": spread(copies),
        "copy_and_cpu_s": spread(cpu_s),
        "device_s": spread(device_s),
        "times_sooner_on_the_device": round(statistics.median(cpu_s) / statistics.median(device_s), 2),
        "device_peak_gib": round(torch.cuda.max_memory_allocated(logits.device) / 1024**3, 2) if is_cuda else None,
        "voxels": int(expected.size),
        "voxels_different": int(np.count_nonzero(expected != found)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``results/gpu_export.json``; 1 if the labels differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--quick", action="store_true", help="a small case, for a trial without a GPU")
    parser.add_argument("--classes", type=int, nargs="+", default=[40])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=100, help="what does not fit is listed as skipped")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_export.json")
    options = parser.parse_args(arguments)
    ends = time.monotonic() + options.budget_s
    shape = (30, 51, 51) if options.quick else SHAPE
    torch.set_num_threads(min(STOCK_THREADS, torch.get_num_threads()))
    document: dict[str, Any] = {
        "benchmark": "gpu_export",
        "date": provenance.now(),
        **provenance.commit(),
        "machine": machine(options.device),
        "threads": torch.get_num_threads(),
        "image": {"shape": list(shape), "spacing_mm": list(SPACING), "network_mm": TARGET},
        "cases": [],
        "skipped": [],
    }
    grid = [round(size * spacing / TARGET) for size, spacing in zip(shape, SPACING, strict=True)]
    for kind, classes in itertools.product(LOGITS, options.classes):
        said = {"classes": classes, "logits": kind, "grid": grid}
        if time.monotonic() > ends:
            document["skipped"].append(said)
            continue
        model = export_model(classes, spacing=(TARGET,) * 3)
        logits = LOGITS[kind](classes, grid, SEED).to(options.device)
        found = measure(model, properties_for(shape, SPACING), logits, options.repetitions)
        del logits
        document["cases"].append(said | found)
        write_json(options.output, document)
        print(said, found, flush=True)
    write_json(options.output, document)
    return int(any(case["voxels_different"] for case in document["cases"]))


if __name__ == "__main__":
    sys.exit(main())
