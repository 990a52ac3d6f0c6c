"""What one engine for all workers saves: the memory of engine and workers, and how soon a dead engine is replaced.

The networks are in the engine, once, however many workers there are. That is measured on a small network and, because
its weights hardly weigh anything, on an untrained one of nnU-Net's usual size; with all folds and few and many
workers. USS is the memory that a process has for itself;
it is what ending the process would give back. What an idle worker's consists of is seen in a fresh process that
imports what a worker imports, step by step, beside eight workers that share with it whatever can be shared.

An engine is killed and the time taken until a new one has said hello; then, apart, what that time goes to.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import psutil
import torch

from benchmarks.harness.material import Material, crop_at_random, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import MODEL, Client, serving
from benchmarks.harness.spread import spread, two_or_more
from nnunet_torchserve.bundle import BUNDLE_FILE, ModelBundle
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from support.chaos import engines, family, wait_for
from support.untrained import standard_unet

FEW, MANY = 1, 8
"""Workers."""

MOST_WORKER_MIB = 400.0
"""USS; in these units TorchServe's own worker, which imports torch, has about 280."""

MOST_RESPAWN_S = 3.0
SEED = 20261123
USUAL_PATCH = 64
"""Half of nnU-Net's usual patch along each axis: the weights are the same, and the passes fast enough for a CPU."""

ALL_FOLDS = {"use_mirroring": False}

_FRESH_PROCESS = Path(__file__).with_name("fresh_process.py")
_IDLE_PERCENT = 1.0
_SETTLE_S = 1.0


def uss(process: psutil.Process) -> int:
    """Bytes that a process has for itself."""
    size: int = process.memory_full_info().uss
    return size


def in_megabytes(sizes: Sequence[int]) -> list[float]:
    """Rounded."""
    return [round(size / 2**20, 1) for size in sizes]


def settle(processes: Sequence[psutil.Process]) -> None:
    """Return when these processes do nothing."""

    def is_idle() -> bool:
        for process in processes:
            process.cpu_percent()
        time.sleep(_SETTLE_S)
        return all(process.cpu_percent() <= _IDLE_PERCENT for process in processes)

    wait_for(is_idle)


def measure_memory(client: Client, images: Sequence[bytes]) -> dict[str, Any]:
    """USS of a server's processes when its workers have loaded, and when each has answered one request."""
    [engine] = engines(client.runtime)
    torchserve = client.live.server.process()
    assert torchserve is not None

    def snapshot() -> dict[str, Any]:
        workers = client.workers()
        settle([engine.process, *workers])
        return {
            "engine_uss_mib": in_megabytes([uss(engine.process)])[0],
            "workers_uss_mib": in_megabytes([uss(worker) for worker in workers]),
            "torchserve_uss_mib": in_megabytes([uss(torchserve)])[0],
        }

    loaded = snapshot()
    count = len(client.workers())
    with ThreadPoolExecutor(count) as pool:  # as many at once as there are workers: each gets one
        statuses = [answer.status_code for answer in pool.map(lambda b: client.post(b, ALL_FOLDS), images[:count])]
    assert statuses == [HTTPStatus.OK] * count, statuses
    return {"workers": count, "loaded": loaded, "after_a_request_each": snapshot()}


def steps(role: str, model_dir: Path, environment: Mapping[str, str], *arguments: str) -> list[dict[str, Any]]:
    """The steps of a worker or an engine, in a fresh process; see :mod:`benchmarks.engine.fresh_process`."""
    command = [sys.executable, str(_FRESH_PROCESS), role, str(model_dir), *arguments]
    done = subprocess.run(command, env=dict(environment), stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_respawn(model_dir: Path, runtime: Path, repetitions: int, *, quick: bool) -> dict[str, Any]:
    """Kill an engine again and again; the seconds until a new one has said hello, and what they go to."""
    environment = {RUNTIME_DIR_VARIABLE: str(runtime), "OMP_WAIT_POLICY": "PASSIVE"}
    respawn_s: list[float] = []
    parts: list[list[dict[str, Any]]] = []
    with mock.patch.dict(os.environ, environment):
        bundle, device = ModelBundle(model_dir), torch.device("cpu")
        connection = RemoteEngine(bundle, device)
        for number in range(repetitions + 1):
            if not quick:
                wait_for_quiet()
            connection.disconnect()
            [running] = engines(runtime)
            began = time.monotonic()
            running.kill()
            connection = RemoteEngine(bundle, device)
            if number:  # the first one may find cold files
                respawn_s.append(time.monotonic() - began)
                parts.append(steps("engine", model_dir, os.environ, str(time.monotonic())))
        connection.disconnect()
        wait_for(lambda: not family(runtime))
    names = [step["step"] for step in parts[0]]
    return {
        "folds": bundle.lead.folds,
        "seconds": respawn_s,
        "spread_seconds": spread(respawn_s),
        "steps_seconds": {
            name: spread([each[number]["seconds"] for each in parts]) for number, name in enumerate(names)
        },
    }


def measure_model(
    model: Material | Path, images: Sequence[bytes], scratch: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """A model's server with one worker, then with as many as there are images.

    Returns:
        Its memory, what a worker beside all of them is made of, and a copy of the unpacked archive.
    """
    with serving(model, scratch, folds=None, workers=FEW) as client:
        few = measure_memory(client, images)
        client.processes.scale(MODEL, len(images))
        many = measure_memory(client, images)
        [description] = Path(client.live.server.temp_dir).glob(f"models/*/{BUNDLE_FILE}")
        made_of = steps("worker", description.parent, client.workers()[0].environ())
        model_dir = Path(shutil.copytree(description.parent, scratch / "model"))
    weights = sum(file.stat().st_size for file in model_dir.glob("members/*/fold_*.safetensors"))
    totals = [each["loaded"]["engine_uss_mib"] + sum(each["loaded"]["workers_uss_mib"]) for each in (few, many)]
    further = (totals[1] - totals[0]) / (many["workers"] - few["workers"])
    found = {
        "weights_mib": round(weights / 2**20, 1),
        "servers": [few, many],
        "a_further_worker_adds_mib": round(further, 1),
    }
    for each in (few, many):
        print(f"  {each['workers']} workers: {each['loaded']}")
    return found, made_of, model_dir


def main() -> int:
    """Measure, write ``results/engine_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--respawns", type=two_or_more, default=7)
    parser.add_argument("--workers", type=two_or_more, default=MANY, help="the larger of the two numbers")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine; the small network only")
    arguments = parser.parse_args()
    generator = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="bench-engine-memory-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        coarse = nib.load(material.coarse)
        shape = [int(0.95 * n) for n in coarse.shape]
        cuts = [crop_at_random(coarse, shape, generator) for _ in range(arguments.workers)]
        images = [gzip.compress(cut.to_bytes()) for cut in cuts]
        networks = {}
        networks["small"], made_of, model_dir = measure_model(material, images, scratch / "small")
        respawn = measure_respawn(model_dir, scratch / "respawned", arguments.respawns, quick=arguments.quick)
        if not arguments.quick:
            usual = standard_unet(scratch / "usual", patch_size=(USUAL_PATCH,) * 3, spacing=2.0, folds=5)
            cuts = [crop_at_random(coarse, (USUAL_PATCH,) * 3, generator) for _ in images]
            small = [gzip.compress(cut.to_bytes()) for cut in cuts]  # one patch each, or it would take minutes
            networks["usual size"], _, _ = measure_model(usual, small, scratch / "large")

    for step in made_of:
        print(f"    {step['uss_mib']:7.1f} MiB after {step['step']}")
    for name, seconds in respawn["steps_seconds"].items():
        print(f"    {seconds['median']:7.2f} s for {name}")
    respawn_s = respawn["spread_seconds"]["median"]
    measured = {
        "options": ALL_FOLDS,
        "image_shape": shape,  # of the small network's requests
        "networks": networks,
        "what_a_worker_is_made_of": made_of,
        "respawn": respawn,
    }
    targets = []
    for name, each in networks.items():
        idle, adds = max(each["servers"][1]["loaded"]["workers_uss_mib"]), each["a_further_worker_adds_mib"]
        targets += [
            Target(f"{name}: an idle worker has at most {MOST_WORKER_MIB:g} MiB", idle, idle <= MOST_WORKER_MIB),
            Target(
                f"{name}, {each['weights_mib']:g} MiB of weights: a further worker adds at most {MOST_WORKER_MIB:g} "
                "MiB to engine and workers",
                adds,
                adds <= MOST_WORKER_MIB,
            ),
        ]
    claim = f"small: a killed engine is replaced within {MOST_RESPAWN_S:g} s (median)"
    targets.append(Target(claim, respawn_s, respawn_s <= MOST_RESPAWN_S))
    return write_results("engine_memory", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
