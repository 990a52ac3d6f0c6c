"""A live server on a GPU against stock's loaded predictor, from image file to segmentation file.

The network is nnU-Net's standard 3d_fullres one with random weights (no trained one of that size travels with the
project), so the labels mean nothing; what is compared is time, and how many labels differ beside how many differ
between two runs of stock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from benchmarks import RESULTS
from benchmarks.harness import provenance
from benchmarks.harness.results import PACKAGES, write_json
from benchmarks.harness.spread import spread, two_or_more
from nnunet_torchserve.environment import runtime_dir
from nnunet_torchserve.options import HEADER
from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support import stock
from support.untrained import standard_unet

SHAPE = (160, 192, 160)
CLASSES = 4
OPTIONS = json.dumps({"use_mirroring": False})


def write_images(folder: Path, count: int) -> list[Path]:
    """Distinct noise volumes of ``SHAPE`` at the network's spacing, 1 mm."""
    files = []
    for number in range(count):
        voxels = np.random.default_rng(number).normal(500, 100, SHAPE).astype(np.int16)
        files.append(folder / f"case_{number}_0000.nii")
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), files[-1])
    return files


def run_stock(predictor: nnUNetPredictor, files: Sequence[Path]) -> tuple[float, list[np.ndarray]]:
    """Seconds for all files one after another, and their labels."""
    began = time.perf_counter()
    labels = []
    for file in files:
        labels.append(stock.run(predictor, [file], probabilities=False).labels)
        image = nib.Nifti1Image(labels[-1].transpose(2, 1, 0), np.eye(4))
        nib.save(image, file.with_name("stock.nii"))
    return time.perf_counter() - began, labels


def run_ours(url: str, files: Sequence[Path], clients: int) -> tuple[float, list[np.ndarray], list[float]]:
    """Seconds for all files by several clients, their labels, and each request's seconds."""

    def send(file: Path) -> tuple[np.ndarray, float]:
        began = time.perf_counter()
        answer = http.post(url, content=file.read_bytes(), headers={HEADER: OPTIONS})
        answer.raise_for_status()
        file.with_name(f"ours_{file.name}").write_bytes(answer.content)
        labels = np.asarray(nib.Nifti1Image.from_bytes(answer.content).dataobj).transpose(2, 1, 0)
        return labels, time.perf_counter() - began

    began = time.perf_counter()
    with httpx.Client(timeout=600, trust_env=False) as http, ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(send, files))
    return time.perf_counter() - began, [labels for labels, _ in answers], [seconds for _, seconds in answers]


def flips(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> int:
    """Voxels that differ."""
    return sum(int(np.count_nonzero(a != b)) for a, b in zip(one, other, strict=True))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repetitions", type=two_or_more, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = standard_unet(scratch, classes=CLASSES)
        make_archives(ArchiveRequest(model, scratch / "store", name="standard"))
        files = write_images(scratch, arguments.images)
        predictor = stock.loaded(model, folds=[0], use_mirroring=False, device=torch.device("cuda"))
        request = launcher.ServeRequest(
            scratch / "store",
            state_dir=scratch / "state",
            ports=launcher.free_ports(),
            device=launcher.DeviceKind.CUDA,
            workers=arguments.workers,
        )
        began = time.perf_counter()
        server = launcher.start(request)
        start_s = time.perf_counter() - began
        url = f"{server.inference_url}/predictions/standard"
        try:
            run_stock(predictor, files[:2])
            run_ours(url, files[:2], 1)
            rounds: list[dict[str, Any]] = []
            for _ in range(arguments.repetitions):
                stock_s, expected = run_stock(predictor, files)
                again = run_stock(predictor, files[:4])[1]
                alone_s = [run_ours(url, [file], 1)[0] for file in files[:4]]
                ours_s, labels, latencies = run_ours(url, files, arguments.clients)
                rounds.append(
                    {
                        "stock_s": stock_s,
                        "ours_s": ours_s,
                        "ratio": stock_s / ours_s,
                        "alone_s": alone_s,
                        "latency_s": spread(latencies),
                        "flips_ours": flips(labels, expected),
                        "flips_stock_against_stock_first_4": flips(again, expected[:4]),
                        "flips_ours_first_4": flips(labels[:4], expected[:4]),
                    }
                )
                print(json.dumps(rounds[-1]), flush=True)
            engine_log = [
                line
                for log in runtime_dir().glob("*/engine.log")
                for line in log.read_text().splitlines()
                if "ready" in line
            ]
        finally:
            launcher.stop(scratch / "state")
    gpu = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    document = {
        "benchmark": "gpu_serving",
        "date": provenance.now(),
        **provenance.commit(),
        "machine": provenance.machine(PACKAGES),
        "gpu": subprocess.run(gpu, capture_output=True, text=True, check=True).stdout.strip(),
        "network": "PlainConvUNet 32..320 features, patch 128x128x128, random weights, fp16 autocast",
        "volumes": {"shape": SHAPE, "spacing_mm": 1, "count": arguments.images, "voxels_each": int(np.prod(SHAPE))},
        "clients": arguments.clients,
        "workers": arguments.workers,
        "server_start_s": round(start_s, 1),
        "engine": [line.partition("INFO ")[2] for line in engine_log],
        "rounds": rounds,
        "ratio_median": statistics.median(each["ratio"] for each in rounds),
    }
    write_json(arguments.output, document)
    print(json.dumps(document["ratio_median"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
