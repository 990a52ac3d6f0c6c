"""What a refused request costs the case in flight.

A server whose memory holds one case and lets none wait answers 429 while a case is in the network. That case is asked
for alone, beside refused requests at a pace, and beside one client that comes again without a pause.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import Any

from benchmarks.harness.material import FOLD, USUAL_OPTIONS, Material, describe_image
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import interval_of_median, spread
from benchmarks.load.service.alternation import in_ms, network_seconds, turns, unpack
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import price, settings_for
from nnunet_torchserve.codecs import open_image
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import parse_options
from nnunet_torchserve.telemetry import SERVER_TIMING
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.chaos import engines, wait_for

MOST_REFUSAL_S = 0.1
"""What people take for at once."""

MOST_SLOWER = 0.05
PACE_S = 0.1
"""Between two refused requests: more than eight clients send that obey ``Retry-After``, which is 1 s at least."""


class Beside(StrEnum):
    """What else is asked while the case is in the network."""

    NOTHING = "nothing"
    PACED = "refused requests at a pace"
    FLOOD = "refused requests without a pause"


@dataclass(slots=True)
class Refused:
    """A client that is refused until it is told to stop.

    Attributes:
        client: of the server.
        body: what it sends.
        pause_s: between two requests.
        seconds: until each refusal.
        retry_after_s: what they said.
        admitted: requests that were answered, because the case had ended.
    """

    client: Client
    body: bytes
    pause_s: float
    seconds: list[float] = field(default_factory=list)
    retry_after_s: list[int] = field(default_factory=list)
    admitted: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        """It sends meanwhile, from a thread of its own."""
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(self._send)
            try:
                yield
            finally:
                self._over.set()
        sending.result()

    def _send(self) -> None:
        while not self._over.is_set():
            began = time.perf_counter()
            answer = self.client.post(self.body)
            if answer.status_code == HTTPStatus.TOO_MANY_REQUESTS:
                self.seconds.append(time.perf_counter() - began)
                self.retry_after_s.append(int(answer.headers["Retry-After"]))
            else:
                assert answer.status_code == HTTPStatus.OK, answer.text
                self.admitted += 1
            self._over.wait(max(0.0, self.pause_s - (time.perf_counter() - began)))


def measure_refusals(material: Material, scratch: Path, *, rounds: int, quick: bool) -> dict[str, Any]:
    """A case alone and beside refused requests, in turns."""
    body = material.coarse.read_bytes()
    limits = {"memory_bytes": int(1.5 * price_bytes(material, body, scratch / "price")), "waiting_cases": 0}
    network_s: dict[Beside, list[float]] = {beside: [] for beside in Beside}
    refused: dict[Beside, list[Refused]] = {Beside.PACED: [], Beside.FLOOD: []}
    with serving(material, scratch, workers=4, settings=ServingSettings(limits=limits)) as client:
        for _ in range(4):
            client.post(body)
        [engine] = engines(client.runtime)
        for beside in turns(list(Beside), rounds):
            if not quick:
                wait_for_quiet()
            with ThreadPoolExecutor(1) as pool:
                case = pool.submit(client.post, body)
                wait_for(lambda: engine.cases == 1)
                with ExitStack() as meanwhile:
                    if beside is not Beside.NOTHING:
                        pause_s = PACE_S if beside is Beside.PACED else 0.0
                        refused[beside].append(Refused(client, body, pause_s))
                        meanwhile.enter_context(refused[beside][-1].running())
                    network_s[beside].append(network_seconds(case.result().headers[SERVER_TIMING]))
    alone = network_s[Beside.NOTHING]
    slower = {
        beside: [one / other - 1 for one, other in zip(network_s[beside], alone, strict=True)] for beside in refused
    }
    return {
        "image": describe_image(material.coarse),
        "limits": limits,
        "rounds": rounds,
        "pace_s": PACE_S,
        "network_seconds": {beside: spread(found) for beside, found in network_s.items()},
        "slower_than_alone": {beside: spread(found) for beside, found in slower.items()},
        "slower_than_alone_median_95_percent": {beside: interval_of_median(found) for beside, found in slower.items()},
        "refusals": {beside: refusals(found, network_s[beside]) for beside, found in refused.items()},
    }


def refusals(clients: Sequence[Refused], network_s: Sequence[float]) -> dict[str, object]:
    """What the refused clients of a side saw."""
    seconds = [each for client in clients for each in client.seconds]
    return {
        "refused": len(seconds),
        "refused_a_second_of_network": round(len(seconds) / sum(network_s), 1),
        "ms": in_ms(seconds),
        "retry_after_s": sorted({each for client in clients for each in client.retry_after_s}),
        "answered_because_the_case_had_ended": sum(client.admitted for client in clients),
    }


def price_bytes(material: Material, body: bytes, scratch: Path) -> int:
    """What a server charges for the case."""
    member = ModelBundle(unpack(material.model_folder, (FOLD,), scratch)).lead
    options = parse_options(json.dumps(USUAL_OPTIONS).encode())
    geometry = open_image(body, Limits(), member.reader).geometry
    return price(member, geometry, 1, settings_for(member, options), options).bytes
