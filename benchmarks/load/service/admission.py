"""What admission and metrics add to a request, and what a refused request costs the others.

Added time. Two workers of one archive, without TorchServe (:mod:`.worker`), share an engine: one as served, one without
admission and metrics. They answer the same small image, block by block in turns; the forward pass is left out, because
it differs more from one to the next than what is looked for. Metrics are passed on between the requests of a block, not
within one: so blocks are compared by their means, and the processor time of that is taken too. Then two live servers
are compared the same way, one of which has no metrics of ours: that is TorchServe's share. Admission cannot be left out
there.

Refusals are a story of their own (:mod:`.refusals`), told in the same part of the result.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from statistics import fmean, median
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import yaml

from benchmarks import ROOT
from benchmarks.harness.material import FOLD, USUAL_OPTIONS, Material, crop_at_random, describe_image
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import interval_of_median, percentile_95
from benchmarks.load.service.alternation import in_ms, network_seconds, turns, unpack
from benchmarks.load.service.refusals import MOST_REFUSAL_S, MOST_SLOWER, Beside, measure_refusals
from benchmarks.load.service.worker import ANSWER, BARE
from nnunet_torchserve.draining import ORDERS, REPORTS
from nnunet_torchserve.environment import CONTROL_DIR_VARIABLE, RUNTIME_DIR_VARIABLE
from nnunet_torchserve.telemetry import SERVER_TIMING
from support.chaos import engines, family, wait_for
from support.metrics import METRICS_YAML, scrape
from support.untrained import standard_unet

MOST_ADDED_MS = 2.0
SEED = 20261123
SERVED = "served"
SPACED_S = 0.6
"""The relay then passes on after each request."""

_TINY_PATCH = 32
_TINY_FEATURES = (8, 16, 32)
_TINY_SPACING = 2.0
_WARM_UP = 10
_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, slots=True)
class Asked:
    """One small request; seconds.

    Attributes:
        whole: until its answer.
        network: of these, the forward pass, which differs more from one to the next than what is looked for.
    """

    whole: float
    network: float

    @property
    def around(self) -> float:
        """All but the forward pass."""
        return self.whole - self.network


class Worker:
    """A process of :mod:`.worker`; commands and answers as it has them."""

    def __init__(self, model_dir: Path, side: str, environment: Mapping[str, str]) -> None:
        """Start it; returns when it is loaded."""
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(model_dir), str(METRICS_YAML), side],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def send(self, what: str, **arguments: object) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the answer; what the front end would read is read."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
        msg = "a worker ended without an answer"
        raise RuntimeError(msg)

    def ask(self, what: str, **arguments: object) -> dict[str, Any]:
        """Give a command and wait for its answer."""
        self.send(what, **arguments)
        return self.answer()

    def requests(self, **arguments: object) -> list[Asked]:
        """Let it answer a block of requests."""
        answer = self.ask("requests", **arguments)
        return [
            Asked(seconds, network_seconds(timing))
            for seconds, timing in zip(answer["seconds"], answer["timings"], strict=True)
        ]

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def two_workers(model: Path, folds: tuple[int, ...] | None, scratch: Path) -> Iterator[tuple[dict[str, Worker], Path]]:
    """A worker of each side and the runtime directory of their engine."""
    runtime, control = scratch / "engines", scratch / "control"
    for folder in (ORDERS, REPORTS):
        (control / folder).mkdir(parents=True)
    model_dir = unpack(model, folds, scratch)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {RUNTIME_DIR_VARIABLE: str(runtime), "OMP_WAIT_POLICY": "PASSIVE"}
    with ExitStack() as started:
        workers = {}
        for side, more in ((SERVED, {CONTROL_DIR_VARIABLE: str(control)}), (BARE, {})):
            workers[side] = Worker(model_dir, side, environment | more)
            started.callback(workers[side].stop)
        yield workers, runtime
    wait_for(lambda: not family(runtime))


def measure_workers(model: Path, image: Path, scratch: Path, *, blocks: int, requests: int) -> dict[str, Any]:
    """Blocks of requests in turns, and the steps by themselves.

    Args:
        model: an untrained one.
        image: of one patch.
        scratch: of this part.
        blocks: of each worker.
        requests: of a block.
    """
    arguments = {"image": str(image), "options": json.dumps(USUAL_OPTIONS)}
    asked: dict[str, list[list[Asked]]] = {SERVED: [], BARE: []}
    with two_workers(model, None, scratch) as (workers, _):
        for worker in workers.values():
            worker.ask("requests", count=_WARM_UP, **arguments)
        for side in turns(list(asked), blocks):
            asked[side].append(workers[side].requests(count=requests, **arguments))
        steps = workers[SERVED].ask("steps", count=requests)
        spaced = workers[SERVED].ask("requests", count=max(2, requests // 10), pause_s=SPACED_S, **arguments)
    return {
        **compared(asked[SERVED], asked[BARE]),
        "steps_ms": {name: in_ms(found) for name, found in steps.items()},
        "relay_processor_ms_of_a_lone_request": round(1000 * spaced["relay_cpu_s"] / len(spaced["seconds"]), 4),
    }


def measure_busy_engine(material: Material, scratch: Path, count: int) -> dict[str, Any]:
    """What a reservation takes while the engine computes another worker's case."""
    arguments = {"image": str(material.coarse), "options": json.dumps(USUAL_OPTIONS)}
    with two_workers(material.model_folder, (FOLD,), scratch) as (workers, runtime):
        idle = workers[SERVED].ask("steps", count=count)["reserve and release"]
        [engine] = engines(runtime)
        busy: list[float] = []
        while len(busy) < count:
            workers[BARE].send("requests", count=1, **arguments)
            wait_for(lambda: engine.cases == 1)
            found = workers[SERVED].ask("steps", count=max(1, count // 5))["reserve and release"]
            busy += found if engine.cases == 1 else []  # or some were made after the case had ended
            workers[BARE].answer()
    return {"idle_ms": in_ms(idle), "busy_ms": in_ms(busy), "busy_p95_ms": 1000 * percentile_95(busy)}


def measure_live(model: Path, image: Path, scratch: Path, *, blocks: int, requests: int) -> dict[str, Any]:
    """Two live servers, with our metrics and without, asked in turns by one client each."""
    config = without_our_metrics(scratch)
    body = image.read_bytes()
    asked: dict[str, list[list[Asked]]] = {SERVED: [], BARE: []}
    with ExitStack() as running:
        clients = {
            SERVED: running.enter_context(serving(model, scratch / SERVED, folds=None, workers=1)),
            BARE: running.enter_context(serving(model, scratch / BARE, folds=None, workers=1, config=config)),
        }
        for client in clients.values():
            ask_often(client, body, 3 * _WARM_UP)
        for side in turns(list(asked), blocks):
            asked[side].append(ask_often(clients[side], body, requests))
        sent = 3 * _WARM_UP + blocks * requests
        counted = {side: lambda url=client.live.server.metrics_url: answers(url) for side, client in clients.items()}
        wait_for(lambda: counted[SERVED]() >= sent)
        assert (counted[SERVED](), counted[BARE]()) == (sent, 0)
    return compared(asked[SERVED], asked[BARE])


def without_our_metrics(scratch: Path) -> Path:
    """A config.properties whose metrics are TorchServe's own only."""
    document = yaml.safe_load(METRICS_YAML.read_text())
    kinds = document["model_metrics"]
    document["model_metrics"] = {
        kind: [each for each in group if not each["name"].startswith("nnunet_")] for kind, group in kinds.items()
    }
    document["model_metrics"] = {kind: group for kind, group in document["model_metrics"].items() if group}
    metrics, config = scratch / "metrics.yaml", scratch / "config.properties"
    metrics.write_text(yaml.safe_dump(document))
    config.write_text((ROOT / "config.properties").read_text() + f"\nmetrics_config={metrics}\n")
    return config


def answers(metrics_url: str) -> float:
    """Answered requests that a server has counted."""
    return scrape(metrics_url).value("nnunet_requests_total", status="200")


def ask_often(client: Client, body: bytes, count: int) -> list[Asked]:
    """Send one request after another."""
    asked = []
    for _ in range(count):
        began = time.perf_counter()
        answer = client.post(body)
        seconds = time.perf_counter() - began
        assert answer.status_code == HTTPStatus.OK, answer.text
        asked.append(Asked(seconds, network_seconds(answer.headers[SERVER_TIMING])))
    return asked


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    mounts = {Path(each.mountpoint): each.fstype for each in psutil.disk_partitions(all=True)}
    return next(mounts[parent] for parent in (folder.resolve(), *folder.resolve().parents) if parent in mounts)


def compared(served: Sequence[Sequence[Asked]], bare: Sequence[Sequence[Asked]]) -> dict[str, Any]:
    """How two sides differ, block by block, around the forward pass."""
    pairs = [
        ([each.around for each in one], [each.around for each in other])
        for one, other in zip(served, bare, strict=True)
    ]
    means = [fmean(one) - fmean(other) for one, other in pairs]
    return {
        "blocks_of_each": len(served),
        "requests_of_each": sum(len(block) for block in served),
        "request_ms": {
            side: {
                "whole": in_ms([each.whole for block in blocks for each in block]),
                "around_the_forward_pass": in_ms([each.around for block in blocks for each in block]),
            }
            for side, blocks in ((SERVED, served), (BARE, bare))
        },
        "difference_of_block_means_ms": in_ms(means),
        "difference_of_block_means_median_95_percent_ms": interval_of_median([1000 * each for each in means]),
        "difference_of_block_medians_ms": in_ms([median(one) - median(other) for one, other in pairs]),
    }


def measure(
    material: Material, scratch: Path, *, blocks: int, requests: int, rounds: int, quick: bool
) -> dict[str, Any]:
    """All of it.

    Args:
        material: for the busy engine and the refusals.
        scratch: of this story.
        blocks: of each worker, and of each server.
        requests: of a block.
        rounds: of each side of the refusals.
        quick: do not wait for an idle machine.
    """
    model = standard_unet(
        scratch / "tiny", features=_TINY_FEATURES, patch_size=(_TINY_PATCH,) * 3, spacing=_TINY_SPACING
    )
    cut = crop_at_random(nib.load(material.coarse), (_TINY_PATCH,) * 3, np.random.default_rng(SEED))
    image = scratch / "tiny.nii.gz"
    image.write_bytes(gzip.compress(cut.to_bytes()))

    def settle() -> None:
        if not quick:
            wait_for_quiet()

    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "worker": lambda own: measure_workers(model, image, own, blocks=blocks, requests=requests),
        "reservation": lambda own: measure_busy_engine(material, own, requests),
        "live": lambda own: measure_live(model, image, own, blocks=blocks, requests=requests),
        "refusals": lambda own: measure_refusals(material, own, rounds=rounds, quick=quick),
    }
    found: dict[str, Any] = {
        "image": describe_image(image),
        "runtime_directory_on": file_system(scratch),  # the engine writes down there what it has granted
    }
    for name, part in parts.items():
        own = scratch / name
        own.mkdir()
        settle()
        found[name] = part(own)
        print(f"  {name}: measured")
    return found


def targets_of(measured: dict[str, Any]) -> list[Target]:
    """What was promised."""
    worker, reservation = measured["worker"], measured["reservation"]
    difference = worker["difference_of_block_means_ms"]["median"]
    reserve, busy = worker["steps_ms"]["reserve and release"]["median"], reservation["busy_ms"]["median"]
    relay, live = (
        worker["relay_processor_ms_of_a_lone_request"],
        measured["live"]["difference_of_block_means_ms"]["median"],
    )
    paced = measured["refusals"]["slower_than_alone"][Beside.PACED]["median"]
    refusal = measured["refusals"]["refusals"][Beside.PACED]["ms"]["median"] / 1000
    limit = f"below {MOST_ADDED_MS:g} ms"
    return [
        Target(
            f"admission and metrics in a worker, {limit}: difference of blocks, reservation, and all of the relay's "
            "work for a lone request",
            (added := max(0.0, difference) + reserve + relay),
            added < MOST_ADDED_MS,
        ),
        Target(f"a reservation while the engine computes another case, {limit}", busy, busy < MOST_ADDED_MS),
        Target(f"metrics in a live server, {limit}: difference of blocks", live, live < MOST_ADDED_MS),
        Target(f"429 within {MOST_REFUSAL_S:g} s", refusal, refusal <= MOST_REFUSAL_S),
        Target(
            f"10 refused requests a second slow the network of the case in flight by at most {MOST_SLOWER:.0%}",
            paced,
            paced <= MOST_SLOWER,
        ),
    ]
