"""What progress events cost: the same cases with ``stream: true`` and without, in turns.

Four clients send equal cases to four workers, so that the engine always has several in flight. A round is one case of
each client; the two sides alternate, and every other time the other one is first. Beside the throughput, which a busy
machine makes uncertain, the processor seconds of the server's processes are taken: the front end, the workers and the
engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.material import USUAL_OPTIONS, Material, describe_image
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import interval_of_median, spread
from nnunet_torchserve.relay import INTERVAL_S
from support.chaos import family, wait_for
from support.events import Stream, assert_complete, read_stream
from support.metrics import Scrape, scrape

CLIENTS = WORKERS = 4
MOST_COST = 0.01
_PASSES, _BUSY = "nnunet_passes_total", "nnunet_engine_busy_seconds_total"


class Side(StrEnum):
    """How a case is asked for."""

    PLAIN = "plain"
    STREAM = "stream"


OPTIONS = {Side.PLAIN: USUAL_OPTIONS, Side.STREAM: {**USUAL_OPTIONS, "stream": True}}


@dataclass(frozen=True, slots=True)
class Round:
    """Some cases at once.

    Attributes:
        seconds: from the first request until the last answer.
        processor_s: of the server's processes meanwhile.
        passes: that the server's metrics counted.
        busy_s: of these seconds, those in which the engine made passes, by its metrics.
        events: of each case, heartbeats among them; none on the plain side.
        network_events: of these, those that tell of passes.
    """

    seconds: float
    processor_s: float
    passes: int
    busy_s: float
    events: list[int]
    network_events: list[int]


class Bench:
    """A server, the case, and what it must answer."""

    def __init__(self, client: Client, image: bytes, cases: int) -> None:
        """Ask once on either side; ``cases`` make a round."""
        self._client, self._image, self._cases = client, image, cases
        self._expected = self._ask(Side.PLAIN)
        stream = read_stream(self._ask(Side.STREAM))
        assert stream.result == self._expected
        [self.passes] = {event["total"] for event in stream.of("progress", "network")}
        self._processes = family(client.runtime)
        time.sleep(2 * INTERVAL_S)  # what was counted so far is passed on

    def round(self, side: Side) -> Round:
        """A round; returns when the metrics have counted all of its passes."""
        before, processor_s = self._settled(), self._processor_s()
        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            bodies = list(pool.map(self._ask, [side] * self._cases))
        seconds = time.perf_counter() - began
        processor_s = self._processor_s() - processor_s
        streams = [read_stream(body) for body in bodies] if side is Side.STREAM else []
        self._check(bodies, streams)
        wanted = before.value(_PASSES) + self._cases * self.passes
        wait_for(lambda: self._scrape().value(_PASSES) >= wanted)
        after = self._settled()
        return Round(
            seconds=seconds,
            processor_s=round(processor_s, 3),
            passes=int(after.value(_PASSES) - before.value(_PASSES)),
            busy_s=round(after.value(_BUSY) - before.value(_BUSY), 3),
            events=[len(stream.events) for stream in streams],
            network_events=[len(stream.of("progress", "network")) for stream in streams],
        )

    def _ask(self, side: Side) -> bytes:
        answer = self._client.post(self._image, OPTIONS[side])
        if answer.status_code != HTTPStatus.OK:
            msg = f"the server answered {answer.status_code}: {answer.text[:500]}"
            raise RuntimeError(msg)
        return answer.content

    def _check(self, bodies: Sequence[bytes], streams: Sequence[Stream]) -> None:
        for stream in streams:
            assert_complete(stream)
        results = [stream.result for stream in streams] or bodies
        assert set(results) == {self._expected}

    def _settled(self) -> Scrape:
        """The metrics, once they say that nothing is in flight: that comes after the counts of the same moment."""
        wait_for(lambda: self._scrape().value("nnunet_cases_in_flight") == 0)
        return self._scrape()

    def _scrape(self) -> Scrape:
        return scrape(self._client.live.server.metrics_url)

    def _processor_s(self) -> float:
        seconds = 0.0
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds


def measure(material: Material, scratch: Path, *, pairs: int, cases: int, quick: bool) -> dict[str, Any]:
    """Alternate the two sides.

    Args:
        material: its head at 2 mm is the case.
        scratch: of this story.
        pairs: rounds of each side.
        cases: of a round.
        quick: do not wait for an idle machine.
    """
    with serving(material, scratch, workers=WORKERS) as client:
        bench = Bench(client, material.coarse.read_bytes(), cases)
        for side in Side:
            bench.round(side)
        rounds: dict[Side, list[Round]] = {side: [] for side in Side}
        for number in range(pairs):
            for side in list(Side)[:: -1 if number % 2 else 1]:
                if not quick:
                    wait_for_quiet()
                rounds[side].append(bench.round(side))
            print(f"  {number + 1}/{pairs}: " + ", ".join(f"{s} {rounds[s][-1].seconds:.2f} s" for s in Side))

    plain, stream = rounds[Side.PLAIN], rounds[Side.STREAM]
    throughput = [one.seconds / other.seconds for one, other in zip(plain, stream, strict=True)]
    processor = [other.processor_s / one.processor_s for one, other in zip(plain, stream, strict=True)]
    events = [count for each in stream for count in each.events]
    network_events = [count for each in stream for count in each.network_events]
    return {
        "image": describe_image(material.coarse),
        "clients": CLIENTS,
        "workers": WORKERS,
        "cases_of_a_round": cases,
        "passes_of_a_case": bench.passes,
        "rounds": {
            side: {
                "seconds": [round(each.seconds, 4) for each in found],
                "cases_per_second": spread([cases / each.seconds for each in found]),
                "passes_counted": sum(each.passes for each in found),
                "passes_per_second": spread([each.passes / each.seconds for each in found]),
                "engine_busy_share": spread([each.busy_s / each.seconds for each in found]),
                "processor_seconds_of_a_case": spread([each.processor_s / cases for each in found]),
            }
            for side, found in rounds.items()
        },
        "events": sum(events),
        "events_of_a_case": spread(events),
        "network_events_of_a_case": spread(network_events),
        "throughput_ratio": spread(throughput),
        "throughput_ratio_median_95_percent": interval_of_median(throughput),
        "throughput_ratio_of_all": sum(each.seconds for each in plain) / sum(each.seconds for each in stream),
        "processor_ratio": spread(processor),
        "processor_ratio_median_95_percent": interval_of_median(processor),
        "cases_of_all_rounds": {side: cases * len(found) for side, found in rounds.items()},
    }


def targets_of(measured: dict[str, Any]) -> list[Target]:
    """What was promised."""
    cost = 1 - measured["throughput_ratio"]["median"]
    least_events = measured["network_events_of_a_case"]["min"]
    counted = statistics.fmean(
        each["passes_counted"] / (measured["cases_of_all_rounds"][side] * measured["passes_of_a_case"])
        for side, each in measured["rounds"].items()
    )
    return [
        Target(
            f"progress events cost at most {MOST_COST:.0%} of throughput (median of pairs)", cost, cost <= MOST_COST
        ),
        Target("every streamed case had events of its passes, 3 at least", least_events, least_events >= 3),
        Target("passes that the metrics counted, of those made", counted, counted == 1.0),
    ]
