"""A live server that keeps preprocessed volumes and computes equal requests once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.bad_requests import FAST, GOOD
from support.chaos import Case, ChaosServer, serving, wait_for
from support.metrics import scrape
from support.server import LiveServer

pytestmark = pytest.mark.serve

MODEL, WORKERS = "reusing", 2
SLOW = Case((40, 44, 37), options='{"folds": [0], "use_mirroring": false, "tile_step_size": 0.2}')
"""It can be held, for a minute at least; nothing else has its size."""

OTHERS = [json.dumps({"folds": [fold], "use_mirroring": False, "output_format": "nrrd"}) for fold in range(4)]


@pytest.fixture(scope="module")
def caching_server(
    models: dict[str, Path], unpacked: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChaosServer]:
    store = tmp_path_factory.mktemp("reusing_store")
    settings = ServingSettings(cache_bytes=64 * 1024**2, single_flight=True)
    make_archives(ArchiveRequest(models["five_folds"], store, folds=(0, 1, 2, 3), name=MODEL, serving=settings))
    folder = tmp_path_factory.mktemp("reusing")
    held = SLOW.held(ModelBundle(unpacked("five_folds")).lead, folder)
    with serving(store, folder, [held], workers=WORKERS) as server:
        yield server


@pytest.fixture
def reusing(caching_server: ChaosServer) -> LiveServer:
    return caching_server.live


def timings(answer: httpx.Response) -> dict[str, float]:
    assert answer.status_code == HTTPStatus.OK, answer.text
    return {stage: float(ms) for stage, ms in re.findall(r"(\w+);dur=([0-9.]+)", answer.headers["Server-Timing"])}


def counted(live: LiveServer, name: str, **labels: str) -> float:
    return scrape(live.server.metrics_url).value(name, **labels)


def test_an_image_is_preprocessed_once_whichever_worker_it_comes_to(reusing: LiveServer, server: LiveServer) -> None:
    first = reusing.predict(MODEL, GOOD, options=FAST)
    assert {"decode", "preprocess"} <= timings(first).keys()
    again = [reusing.predict(MODEL, GOOD, options=options) for options in OTHERS]
    for options, answer in zip(OTHERS, again, strict=True):
        assert "preprocess" not in timings(answer)
        assert "reused;desc=volume" in answer.headers["Server-Timing"]
        assert answer.content == server.predict("five_folds", GOOD, options=options).content
    wait_for(lambda: counted(reusing, "nnunet_requests_total") == 1 + len(OTHERS))
    wait_for(lambda: counted(reusing, "nnunet_cache_lookups_total", result="hit") == len(OTHERS))
    assert counted(reusing, "nnunet_cache_lookups_total", result="miss") == 1
    wait_for(lambda: counted(reusing, "nnunet_cached_bytes") > 0)
    asked = [answer.headers["X-Nnunet-Request-Id"] for answer in again]
    assert all(map(reusing.logs, asked))
    assert [line["reused"] for line in reusing.request_lines() if line["id"] in asked] == ["volume"] * len(OTHERS)


def test_equal_requests_at_once_are_computed_once(reusing: LiveServer, caching_server: ChaosServer) -> None:
    alone = reusing.predict(MODEL, SLOW.body, options=SLOW.options, headers={"X-Request-Id": "alone"})
    assert alone.status_code == HTTPStatus.OK
    assert reusing.logs('"alone"')
    [passes] = [line["passes"] for line in reusing.request_lines() if line["id"] == "alone"]
    logged = sum(line["passes"] for line in reusing.request_lines())
    wait_for(lambda: counted(reusing, "nnunet_passes_total") == logged)
    before = counted(reusing, "nnunet_passes_total")
    with ThreadPoolExecutor(WORKERS) as pool:
        with caching_server.held():
            asked = [
                pool.submit(reusing.predict, MODEL, SLOW.body, options=SLOW.options, headers={"X-Request-Id": name})
                for name in (f"id-{n}" for n in range(WORKERS))
            ]
            wait_for(lambda: counted(reusing, "nnunet_cases_following") == WORKERS - 1)
        answers = [each.result() for each in asked]
    assert {answer.content for answer in answers} == {alone.content}
    assert {answer.headers["X-Nnunet-Request-Id"] for answer in answers} == {f"id-{n}" for n in range(WORKERS)}
    shared = [answer for answer in answers if "reused;desc=answer" in answer.headers["Server-Timing"]]
    assert len(shared) == WORKERS - 1
    wait_for(lambda: counted(reusing, "nnunet_shared_answers_total") == WORKERS - 1)
    wait_for(lambda: counted(reusing, "nnunet_passes_total") - before == passes)


def test_a_stock_server_reuses_nothing(server: LiveServer) -> None:
    for _ in range(2):
        answer = server.predict("five_folds", GOOD, options=FAST)
        assert "preprocess" in timings(answer)
        assert "reused" not in answer.headers["Server-Timing"]
