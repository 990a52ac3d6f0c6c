"""SIGTERM under load: what clients lose, how long it takes, and what probes wait meanwhile.

``serve --foreground`` with two workers, as in a container. Eight clients send one small image after another, each its
own, on a connection of its own for each request, and come again where an answer says ``Retry-After``, until the port
is closed. An answer must be, to the byte, the one that its image gets alone. Before the signal ``/ready`` is asked
again and again, while both workers are busy and the other clients wait in TorchServe's queue.

Each stop is of a server of its own, at another moment of the period in which refused clients come again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from benchmarks.harness.material import USUAL_OPTIONS, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import MODEL
from benchmarks.harness.spread import two_or_more
from benchmarks.load.fairness import Images
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.stopping import PERIOD_S
from support.chaos import engine_processes, wait_for
from support.foreground import Clients, Foreground, foreground

CLIENTS, WORKERS = 8, 2
MOST_AFTER_LONGEST_S = 5.0
MOST_READY_MS = 50.0
SEED = 20261129
_PATIENCE_S = 300.0
_PROBE_PAUSE_S = 0.05
_ONE_IN_A_HUNDRED = 0.99


@dataclass(frozen=True, slots=True)
class Stopped:
    """One stop.

    Attributes:
        answers: before and after the signal.
        refused: answers with ``Retry-After``.
        turned_away: clients that found the port closed; nothing of their requests was sent.
        lost: requests that ended in another way, in words.
        wrong: answers that were not the image's.
        exit_code: of ``serve``.
        stop_s: from SIGTERM to the end of ``serve``.
        longest_request_s: of those that were answered.
    """

    answers: int
    refused: int
    turned_away: int
    lost: list[str]
    wrong: int
    exit_code: int
    stop_s: float
    longest_request_s: float


def main() -> int:
    """Measure, write ``results/stopping.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=two_or_more, default=6)
    parser.add_argument("--load-s", type=float, default=10, help="seconds of load before each signal")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    generator = random.Random(SEED)  # noqa: S311 (moments, not secrets)
    stops: list[Stopped] = []
    probes_ms: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-stop-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        bodies = [Images(material, scratch).small().read_bytes() for _ in range(CLIENTS)]
        make_archives(ArchiveRequest(material.model_folder, scratch / "store", folds=(0,), name=MODEL))
        if not arguments.quick:
            wait_for_quiet()
        for number in range(arguments.stops):
            own = scratch / str(number)
            own.mkdir()
            sizes = ["--workers", str(WORKERS), "--queue", str(CLIENTS)]
            with foreground(scratch / "store", own, *sizes, python=Path(sys.executable)) as serve:
                serve.wait_until_ready()
                stops.append(_stop(serve, bodies, arguments.load_s + generator.uniform(0, PERIOD_S), probes_ms))
            print(asdict(stops[-1]))
            wait_for(lambda: not engine_processes(own / "run"), _PATIENCE_S)  # noqa: B023 (called at once)
    probes_ms.sort()
    lost = sum(len(each.lost) for each in stops)
    after_longest = max(each.stop_s - each.longest_request_s for each in stops)
    ready_99_ms = probes_ms[int(len(probes_ms) * _ONE_IN_A_HUNDRED)]
    measured = {
        "clients": CLIENTS,
        "workers": WORKERS,
        "processors": os.cpu_count(),
        "stops": [asdict(each) for each in stops],
        "probes": {
            "count": len(probes_ms),
            "median_ms": round(statistics.median(probes_ms), 2),
            "p99_ms": round(ready_99_ms, 2),
            "longest_ms": round(probes_ms[-1], 2),
        },
    }
    targets = [
        Target("requests lost or reset at SIGTERM under 8 clients: none", lost, lost == 0),
        Target("answers that are not the image's: none", sum(s.wrong for s in stops), not any(s.wrong for s in stops)),
        Target("stops with exit code 0: all", sum(not s.exit_code for s in stops), not any(s.exit_code for s in stops)),
        Target(
            f"SIGTERM to exit, beyond the longest request: at most {MOST_AFTER_LONGEST_S:g} s",
            after_longest,
            after_longest <= MOST_AFTER_LONGEST_S,
        ),
        Target(
            f"/ready of a saturated server, 99 %: below {MOST_READY_MS:g} ms", ready_99_ms, ready_99_ms < MOST_READY_MS
        ),
    ]
    return write_results("stopping", material, measured, targets)


def _stop(serve: Foreground, bodies: Sequence[bytes], load_s: float, probes_ms: list[float]) -> Stopped:
    """Load a server, ask its probe meanwhile, and stop it."""
    chaos = serve.chaos()
    url = f"{chaos.live.server.inference_url}/predictions/{MODEL}"
    options = json.dumps(USUAL_OPTIONS)
    clients = [Clients(url, body, options) for body in bodies]
    alone = [chaos.live.predict(MODEL, body, options=options).content for body in bodies]
    with ThreadPoolExecutor(CLIENTS) as pool:
        sending = [pool.submit(each.run) for each in clients]
        wait_for(lambda: all(each.answers for each in clients), _PATIENCE_S)
        until = time.monotonic() + load_s
        with httpx.Client(timeout=30, trust_env=False) as asking:
            while time.monotonic() < until:
                began = time.perf_counter()
                asking.get(f"{serve.health_url}/ready").raise_for_status()
                probes_ms.append((time.perf_counter() - began) * 1000)
                time.sleep(_PROBE_PAUSE_S)
        began = time.monotonic()
        serve.signal()
        code = serve.process.wait(timeout=_PATIENCE_S)
        stop_s = time.monotonic() - began
        for each in sending:
            each.result()
    return Stopped(
        answers=sum(len(each.answers) for each in clients),
        refused=sum(each.refused for each in clients),
        turned_away=sum(each.turned_away for each in clients),
        lost=[how for each in clients for how in each.lost],
        wrong=sum(got != right for each, right in zip(clients, alone, strict=True) for got in each.answers),
        exit_code=code,
        stop_s=round(stop_s, 2),
        longest_request_s=round(max(max(each.seconds) for each in clients), 2),
    )


if __name__ == "__main__":
    sys.exit(main())
