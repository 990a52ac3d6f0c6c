"""Whole cases by several clients at once, as workers have them, against stock's loaded predictor.

Each client is a process with the pipeline of a worker; all of them share one engine process for each backend. What is
left out is TorchServe: the HTTP connection and its queue. Stock reads and predicts one file after another. The network
is untrained, so the labels mean nothing; those that differ are counted beside those of two runs of stock.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import HEADER
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from support import stock

SHAPES = ((160, 192, 160), (128, 128, 128), (220, 200, 180), (96, 160, 160))
"""Voxels x, y, z, of 1 mm, as the network's."""

BACKENDS = (Backend.EAGER, Backend.COMPILED)
_OPTIONS = json.dumps({"use_mirroring": False, "output_format": "nii"})
_TIME_LIMIT_S = 600.0

_pipelines: dict[Backend, Pipeline] = {}
"""Of this process, if it is a client's."""


def connect(folder: str, device: str, batch: int) -> None:
    """Begin a client: a pipeline for each backend."""
    bundle = ModelBundle(Path(folder))
    torch.set_num_threads(1)
    for backend in BACKENDS:
        engine = RemoteEngine(bundle, torch.device(device), batch, backend=backend)
        _pipelines[backend] = Pipeline(bundle, engine, Limits(), _TIME_LIMIT_S, backend=backend)


def ask(backend: Backend, file: str) -> tuple[bytes, str]:
    """A client's case: its segmentation as NIfTI, and what ran the network."""
    answer = _pipelines[backend].answer(Request({"body": Path(file).read_bytes()}, {HEADER: _OPTIONS}))
    assert answer.status == 200, answer.body[:500]
    return answer.body, answer.headers["X-Nnunet-Backend"]


def runs(_: int) -> dict[str, str]:
    """What the client's engines run; slow, so that each client is asked."""
    time.sleep(0.5)
    return {str(backend): str(pipeline.engine.backend) for backend, pipeline in _pipelines.items()}


def measure_cases(
    bundle: ModelBundle,
    model: Path,
    device: torch.device,
    scratch: Path,
    *,
    batch: int,
    clients: int,
    cases: int,
    rounds: int,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    has_time: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Seconds of all cases by stock and by each backend, in turns.

    Args:
        bundle: the archive.
        model: nnU-Net's folder of the same network.
        device: where networks run.
        scratch: for images.
        batch: patches in a forward pass.
        clients: at once.
        cases: in each round.
        rounds: after one that warms up.
        shapes: of images; one after another.
        has_time: asked before each round.
    """
    files = _write_images(scratch, [shapes[number % len(shapes)] for number in range(cases)])
    predictor = stock.loaded(model, folds=[0], use_mirroring=False, device=device)
    spawning = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    with ProcessPoolExecutor(clients, spawning, connect, (str(bundle.folder), str(device), batch)) as pool:
        ran = list(pool.map(runs, range(clients)))
        connected_s = time.perf_counter() - began
        seconds: dict[str, list[float]] = {name: [] for name in ("stock", *BACKENDS)}
        labels: dict[str, list[np.ndarray]] = {}
        first: dict[str, list[np.ndarray]] = {}
        for number in range(rounds + 1):
            if number > 1 and not has_time():
                break
            for name, taken in seconds.items():
                began = time.perf_counter()
                if name == "stock":
                    found = [stock.run(predictor, [file], probabilities=False).labels for file in files]
                    took = time.perf_counter() - began
                else:
                    tasks = [pool.submit(ask, Backend(name), str(file)) for file in files]
                    answers = [task.result() for task in tasks]
                    took = time.perf_counter() - began
                    found = [_labels(body, ran_by, name) for body, ran_by in answers]
                if number:
                    taken.append(took)
                else:
                    first[name] = found
                labels[name] = found
    typical = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "batch": batch,
        "clients": clients,
        "shapes": [list(shape) for shape in shapes],
        "cases": cases,
        "connected_s": round(connected_s, 1),
        "engines_run": ran[0],
        "seconds": seconds,
        "cases_per_s": {name: round(cases / each, 3) for name, each in typical.items()},
        "times_sooner_than_stock": {str(name): round(typical["stock"] / typical[name], 3) for name in BACKENDS},
        "voxels": sum(each.size for each in labels["stock"]),
        "voxels_different_from_stock": {
            **{str(name): _different(labels[name], labels["stock"]) for name in BACKENDS},
            "stock again": _different(first["stock"], labels["stock"]),
        },
    }


def _write_images(folder: Path, shapes: Sequence[tuple[int, ...]]) -> list[Path]:
    """Noise at 1 mm, int16."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, shape in enumerate(shapes):
        voxels = np.random.default_rng(number).normal(500, 100, shape).astype(np.int16)
        files.append(folder / f"case_{number}_0000.nii")
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), files[-1])
    return files


def _labels(body: bytes, ran_by: str, name: str) -> np.ndarray:
    """Of an answer (z, y, x), which the backend must have made that was asked for."""
    assert ran_by == name, ran_by
    return np.asarray(nib.Nifti1Image.from_bytes(body).dataobj).T


def _different(these: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> int:
    return sum(int(np.count_nonzero(one != other)) for one, other in zip(these, others, strict=True))
