"""Several devices on a real TorchServe: CPU engines stand in for GPUs, and a script for ``nvidia-smi``.

What only a GPU can show is not shown here: its memory, its speed, and how a driver that hangs behaves.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.faults import Entry, Fault, Kind, LoadFails, StandIn
from nnunet_torchserve.engine.outage import Outage
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.launcher import DeviceKind
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support import nvidia_smi
from support.bad_requests import FAST, GOOD
from support.chaos import Case, ChaosServer, engines, serving, wait_for
from support.metrics import scrape
from support.server import LiveServer

pytestmark = pytest.mark.serve

BLOBS, PINNED = "five_folds/1.0", "pinned/1.0"
PINNED_TO = 1
CLIENTS = 4
ONE_FOLD = '{"folds": [0], "use_mirroring": false}'
ORDINARY, FATAL = Case((40, 44, 36), options=ONE_FOLD), Case((24, 32, 24), options=ONE_FOLD)
NAMES, LABELS = ["cpu:0", "cpu:1"], ["cpu0", "cpu1"]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While there is this file, engines of ``cpu:1`` do not load again."""
    return tmp_path_factory.mktemp("devices") / "broken"


@pytest.fixture(scope="module")
def two(
    broken: Path,
    models: dict[str, Path],
    archive_of: Callable[[str], Path],
    unpacked: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ChaosServer]:
    """Two devices with a worker each for one model, and another model on one of them only.

    ``nvidia-smi`` shows the stand-ins. :data:`FATAL` is the end of the engine of ``cpu:1``.
    """
    store = tmp_path_factory.mktemp("devices_store")
    shutil.copy(archive_of("five_folds"), store)
    pinned = ServingSettings(device_ids=(PINNED_TO,))
    make_archives(ArchiveRequest(models["flat"], store, name="pinned", serving=pinned))
    lost = Fault(kind=Kind.DEVICE_LOST, shape=FATAL.grid(ModelBundle(unpacked("five_folds")).lead), device="cpu:1")
    faults: list[Entry] = [StandIn(devices=2), lost, LoadFails(device="cpu:1", while_exists=broken)]
    folder = tmp_path_factory.mktemp("two")
    with ExitStack() as until_the_end:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PATH", nvidia_smi.search_path(folder, 2))
            environment.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            server = until_the_end.enter_context(serving(store, folder, faults, device=DeviceKind.CUDA))
        yield server


def devices_of_workers(server: ChaosServer, model: str) -> list[int]:
    """The GPU of each worker, as TorchServe describes it."""
    name, _, version = model.partition("/")
    workers = server.live.describe(f"{name}/{version}")["workers"]
    return sorted(int(number) for number in re.findall(r"gpuId::(\d+)", json.dumps(workers)))


def devices_of_engines(server: ChaosServer, model: str) -> list[str]:
    """The device of each engine of a model."""
    commands = [engine.process.cmdline()[-1] for engine in engines(server.runtime, model)]
    return sorted(json.loads(settings)["device"] for settings in commands)


def passes(server: ChaosServer, model: str, device: str) -> float:
    return scrape(server.live.server.metrics_url).value(
        "nnunet_passes_total", model_name=model.partition("/")[0], device=device
    )


# -- devices that work ------------------------------------------------------------------------------------------------


def test_each_device_has_its_workers_and_one_engine(two: ChaosServer) -> None:
    assert devices_of_workers(two, BLOBS) == [0, 1]
    assert devices_of_engines(two, BLOBS) == NAMES


def test_an_archive_is_served_on_its_own_devices_only(two: ChaosServer) -> None:
    assert devices_of_workers(two, PINNED) == [PINNED_TO]
    assert devices_of_engines(two, PINNED) == [NAMES[PINNED_TO]]


def test_requests_meet_all_devices_and_their_answers_are_the_ordinary_servers(
    two: ChaosServer, server: LiveServer
) -> None:
    expected = server.predict("five_folds", GOOD, options=FAST)
    assert expected.status_code == HTTPStatus.OK, expected.text
    before = {label: passes(two, BLOBS, label) for label in LABELS}
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(two.live.predict, "five_folds", GOOD, options=FAST) for _ in range(2 * CLIENTS)]
    assert {answer.result().content for answer in answers} == {expected.content}
    wait_for(lambda: all(passes(two, BLOBS, label) > before[label] for label in LABELS))
    metrics = scrape(two.live.server.metrics_url)
    for name in ("nnunet_engine_up", "nnunet_engine_starts_total"):
        seen = [labels for labels in metrics.labels(name) if labels["model_name"] == "five_folds"]
        assert {labels["device"]: metrics.value(name, **labels) for labels in seen} == dict.fromkeys(LABELS, 1.0)


# -- a device that fails ----------------------------------------------------------------------------------------------


def ask(server: ChaosServer, case: Case) -> httpx.Response:
    return server.live.predict("five_folds", case.body, options=case.options)


def ask_until_answered(server: ChaosServer, case: Case, answers: list[httpx.Response]) -> None:
    """Be a client that comes again after ``Retry-After``, and else never; ``answers`` gets what it is told."""
    while True:
        answers.append(answer := ask(server, case))
        if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE or "retry-after" not in answer.headers:
            return
        time.sleep(float(answer.headers["retry-after"]))


def test_a_device_that_fails_takes_its_workers_to_503_and_not_the_others(two: ChaosServer, broken: Path) -> None:
    broken.touch()
    expected = ask(two, ORDINARY).content
    wait_for(lambda: ask(two, FATAL).status_code == HTTPStatus.SERVICE_UNAVAILABLE)  # as soon as it lands there

    def up() -> dict[str, float]:
        metrics = scrape(two.live.server.metrics_url)
        return {label: metrics.value("nnunet_engine_up", model_name="five_folds", device=label) for label in LABELS}

    wait_for(lambda: up() == {"cpu0": 1, "cpu1": 0})
    [sick] = [folder for folder in two.runtime.iterdir() if Outage(folder).read() is not None]
    answers: list[httpx.Response] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask_until_answered, two, ORDINARY, answers) for _ in range(2 * CLIENTS)]
        wait_for(lambda: {answer.status_code for answer in answers} >= {200, 503})  # each device has met one
        assert up() == {"cpu0": 1, "cpu1": 0}
        broken.unlink()
    for client in clients:
        client.result()
    counts = Counter(answer.status_code for answer in answers)
    assert counts[HTTPStatus.OK] == len(clients), counts
    assert {answer.content for answer in answers if answer.status_code == HTTPStatus.OK} == {expected}
    refused = [answer for answer in answers if answer.status_code != HTTPStatus.OK]
    assert {answer.headers["content-type"] for answer in refused} == {"application/problem+json"}
    assert all(1 <= int(answer.headers["retry-after"]) <= 40 for answer in refused)

    wait_for(lambda: ask(two, ORDINARY).content == expected and up() == {"cpu0": 1, "cpu1": 1})
    assert Outage(sick).read() is None
    assert devices_of_engines(two, BLOBS) == NAMES


@pytest.mark.long
def test_engines_are_where_workers_are(two: ChaosServer) -> None:
    """The last test: TorchServe may leave all workers on one device."""
    before = engines(two.runtime, BLOBS)
    two.scale(BLOBS, 1)
    [left] = devices_of_workers(two, BLOBS)
    wait_for(lambda: devices_of_engines(two, BLOBS) == [f"cpu:{left}"])
    [stayed] = engines(two.runtime, BLOBS)
    assert stayed in before
    two.scale(BLOBS, 1 + 2)  # a multiple of the devices more: TorchServe's counter goes round once
    assert devices_of_workers(two, BLOBS) == sorted([0, 1, left])
    assert devices_of_engines(two, BLOBS) == NAMES
    assert stayed in engines(two.runtime, BLOBS)
    two.scale(BLOBS, 2)
