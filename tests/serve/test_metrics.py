"""What a live server tells Prometheus: each count once, gauges that return to 0, and every documented query."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import yaml

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.tally import Total
from nnunet_torchserve.telemetry import Stage
from support.bad_requests import FAST, GOOD
from support.chaos import Case, ChaosServer, serving, wait_for
from support.dashboard import queries as dashboard_queries
from support.metrics import Scrape, queries, scrape
from support.ports import free_port

pytestmark = pytest.mark.serve

MODEL = "five_folds/1.0"
WORKERS = 2
REQUESTS = 6
PASSES = 12
"""Of GOOD with the options FAST."""

COUNTED = {
    Total.STARTS: ("nnunet_engine_starts_total", 1),
    Total.RESTARTS: ("nnunet_engine_restarts_total", 1),
    Total.PASSES: ("nnunet_passes_total", 1),
    Total.BATCHES: ("nnunet_batches_total", 1),
    Total.SLOTS: ("nnunet_batch_slots_total", 1),
    Total.SHARED_BATCHES: ("nnunet_shared_batches_total", 1),
    Total.BUSY_MICROSECONDS: ("nnunet_engine_busy_seconds_total", 1e6),
}
"""What engines count, its name on TorchServe's page, and how many of them are 1 there."""

SLOW = Case((40, 44, 37), options='{"folds": [0], "use_mirroring": false, "tile_step_size": 0.2}')
"""It can be held, for a minute at least; nothing else has its size."""

Settled = Callable[[], Scrape]

TOO_LATE = '{"folds": [0], "use_mirroring": false, "timeout_s": 0.001}'
UNKNOWN_FOLD = '{"folds": [9]}'


@pytest.fixture(scope="module")
def measured(
    archive_of: Callable[[str], Path], unpacked: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChaosServer]:
    """A server with two workers and engines of its own: an engine's numbers go to one server."""
    folder = tmp_path_factory.mktemp("metrics")
    held = SLOW.held(ModelBundle(unpacked("five_folds")).lead, folder)
    with serving(archive_of("five_folds").parent, folder, [held], models=["five_folds.mar"], workers=WORKERS) as server:
        yield server


@pytest.fixture(scope="module")
def settled(measured: ChaosServer) -> Iterator[Settled]:
    with ExitStack() as until_the_end:
        tallies: dict[int, BinaryIO] = {}

        def counted() -> npt.NDArray[np.int64]:
            """By every engine of the server so far."""
            tally = measured.engine(MODEL).tally()
            if tallies.setdefault(os.fstat(tally.fileno()).st_ino, tally) is tally:
                until_the_end.enter_context(tally)
            else:
                tally.close()
            numbers = [np.frombuffer(os.pread(each.fileno(), 8 * len(Total), 0), np.int64) for each in tallies.values()]
            total: npt.NDArray[np.int64] = np.sum(numbers, axis=0)
            return total

        def is_told() -> bool:
            page, there = now(measured), counted()
            counts = {name: there[total] / unit for total, (name, unit) in COUNTED.items()}
            return all(page.value(name) == pytest.approx(count, abs=1e-3) for name, count in counts.items())

        def settle() -> Scrape:
            """The numbers when nothing is in flight and what the engines did is told."""
            wait_for(lambda: now(measured).value("nnunet_engine_up") == 1)
            wait_for(lambda: now(measured).value("nnunet_cases_in_flight") == 0)
            wait_for(is_told)
            return now(measured)

        yield settle


def now(server: ChaosServer) -> Scrape:
    return scrape(server.live.server.metrics_url)


def ask_all(server: ChaosServer, count: int) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = [pool.submit(server.live.predict, "five_folds", GOOD, options=FAST) for _ in range(count)]
    assert {answer.result().status_code for answer in answers} == {HTTPStatus.OK}


def test_every_count_comes_once_whatever_the_number_of_workers(measured: ChaosServer, settled: Settled) -> None:
    before, lines_before, began = settled(), len(measured.live.request_lines()), time.monotonic()
    assert before.value("nnunet_passes_total") > 0  # the workers' trials
    ask_all(measured, REQUESTS)
    assert measured.live.predict("five_folds", GOOD, options=UNKNOWN_FOLD).status_code == 422
    assert measured.live.predict("five_folds", b"this is not an image", options=FAST).status_code == 415

    wait_for(
        lambda: now(measured).value("nnunet_requests_total") >= before.value("nnunet_requests_total") + REQUESTS + 2
    )
    after = settled()
    took_s = time.monotonic() - began

    def added(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert added("nnunet_requests_total") == REQUESTS + 2
    for name in ("nnunet_passes_total", "nnunet_batches_total", "nnunet_batch_slots_total"):
        assert added(name, model_name="five_folds", model_version="1.0", device="cpu") == REQUESTS * PASSES
    assert added("nnunet_shared_batches_total") == 0  # a batch of a CPU has one slot
    assert added("nnunet_requests_total", status="200", code="none") == REQUESTS
    assert added("nnunet_requests_total", status="422", code="unknown_fold") == 1
    assert added("nnunet_requests_total", status="415", code="unknown_format") == 1
    assert added("nnunet_answers_total", priority="interactive") == REQUESTS
    assert added("nnunet_answer_seconds_total", priority="interactive") > 0
    for stage in Stage:
        reached = REQUESTS + (stage is Stage.DECODE)  # the bytes that are no image
        reached *= stage is not Stage.POSTPROCESS  # which this model has none of
        assert added("nnunet_stage_requests_total", stage=stage) == reached
        assert (added("nnunet_stage_seconds_total", stage=stage) > 0) == (reached > 0)
    wait_for(lambda: len(measured.live.request_lines()) == lines_before + REQUESTS + 2)
    lines = measured.live.request_lines()[lines_before:]
    logged = sum(line["ms"].get(Stage.NETWORK, 0) for line in lines) / 1000
    assert added("nnunet_stage_seconds_total", stage=Stage.NETWORK) == pytest.approx(logged, rel=0.02)
    assert 0 < added("nnunet_engine_busy_seconds_total") < took_s


def test_gauges_show_the_work_in_hand_and_return_to_0_without_another_request(
    measured: ChaosServer, settled: Settled
) -> None:
    settled()
    with ThreadPoolExecutor(1) as pool:
        with measured.held():
            answer = pool.submit(measured.live.predict, "five_folds", SLOW.body, options=SLOW.options)
            wait_for(lambda: now(measured).value("nnunet_cases_in_flight") == 1)
            wait_for(lambda: now(measured).value("nnunet_charged_bytes") > 0)
        assert answer.result().status_code == HTTPStatus.OK
    gauges = ("nnunet_cases_in_flight", "nnunet_passes_waiting", "nnunet_charged_bytes", "nnunet_cases_waiting")
    wait_for(lambda: not any(now(measured).value(name) for name in gauges))
    assert all(len(now(measured).labels(name)) == 1 for name in gauges)


def test_a_killed_engine_is_one_restart_and_its_passes_are_counted_once(
    measured: ChaosServer, settled: Settled
) -> None:
    before = settled()
    ask_all(measured, 1)
    measured.engine(MODEL).kill()
    restarts = before.value("nnunet_engine_restarts_total")
    wait_for(lambda: now(measured).value("nnunet_engine_restarts_total") == restarts + 1)  # although nobody asks
    ask_all(measured, REQUESTS)
    after = settled()
    for name in ("nnunet_engine_starts_total", "nnunet_engine_restarts_total"):
        assert after.value(name) - before.value(name) == 1
    assert after.value("nnunet_strikes_total") == before.value("nnunet_strikes_total")
    assert after.value("nnunet_passes_total") - before.value("nnunet_passes_total") == (1 + REQUESTS) * PASSES


def test_the_last_worker_left_passes_on_what_the_engine_counts(measured: ChaosServer, settled: Settled) -> None:
    before = settled()
    for worker in measured.live.workers("five_folds")[:-1]:
        worker.kill()
    wait_for(lambda: measured.live.predict("five_folds", GOOD, options=FAST).status_code == HTTPStatus.OK)
    wait_for(lambda: now(measured).value("nnunet_passes_total") - before.value("nnunet_passes_total") >= PASSES)


def test_every_query_of_the_documentation_and_the_dashboard_returns_data(measured: ChaosServer, tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    target, port = measured.live.server.metrics_url.removeprefix("http://"), free_port()
    config = tmp_path / "prometheus.yml"
    scraping = {"job_name": "nnunet", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
    config.write_text(yaml.safe_dump({"scrape_configs": [scraping]}))
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
    asked = queries() + dashboard_queries(gpu=False)
    assert len(asked) >= 35
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as prometheus,
    ):

        def result(query: str) -> list[dict[str, object]]:
            answer = prometheus.get("/api/v1/query", params={"query": query})
            assert answer.status_code == HTTPStatus.OK, answer.text
            found: list[dict[str, object]] = answer.json()["data"]["result"]
            return found

        def has_scraped() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                ready = prometheus.get("/-/ready").status_code == HTTPStatus.OK
            except httpx.TransportError:
                return False
            return ready and bool(result("nnunet_passes_total"))

        try:
            wait_for(has_scraped)
            ask_all(measured, WORKERS)
            wait_for(lambda: bool(result("ts_inference_requests_total")))
            ask_all(measured, WORKERS)  # what TorchServe's counters have when they are first seen is no rate
            for options, status in ((UNKNOWN_FOLD, 422), (TOO_LATE, 504)):
                assert measured.live.predict("five_folds", GOOD, options=options).status_code == status
            wait_for(lambda: bool(result("sum(rate(nnunet_passes_total[5m])) > 0")))
            wait_for(lambda: all(result(query) for query in asked))
        finally:
            process.terminate()
