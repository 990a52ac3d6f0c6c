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
from nnunet_torchserve.cases import network_grid
from nnunet_torchserve.engine.faults import Fault, Kind, LoadFails, StandIn
from nnunet_torchserve.engine.outage import Outage
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE
from nnunet_torchserve_tools.archive import ArchiveRequest, ServingSettings, make_archives
from nnunet_torchserve_tools.launcher import DeviceKind
from support import nvidia_smi
from support.bad_requests import FAST, GOOD
from support.chaos import SPACING, Case, ChaosServer, engines, wait_for
from support.metrics import scrape
from support.server import LiveServer, running

pytestmark = pytest.mark.serve

FLAT, PINNED, BLOBS = "flat/1.0", "pinned/1.0", "five_folds/1.0"
PINNED_TO = (1, 2)
CLIENTS = 4
ONE_FOLD = '{"folds": [0], "use_mirroring": false}'
ORDINARY, FATAL = Case((40, 44, 36), options=ONE_FOLD), Case((24, 32, 24), options=ONE_FOLD)


def start(
    store: Path, folder: Path, models: list[str], device: DeviceKind, faults: list[Fault | LoadFails | StandIn]
) -> Iterator[ChaosServer]:
    """A server with one worker a device, and an ``nvidia-smi`` that shows the stand-ins."""
    gpus = next(entry.devices for entry in faults if isinstance(entry, StandIn))
    serving = running(store, folder / "state", models=models, device=device, testing=True)
    with ExitStack() as until_the_end:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(RUNTIME_DIR_VARIABLE, str(folder / "run"))
            environment.setenv(FAULTS_VARIABLE, json.dumps([each.model_dump(mode="json") for each in faults]))
            environment.setenv("PATH", nvidia_smi.search_path(folder, gpus))
            environment.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            live = until_the_end.enter_context(serving)
        yield ChaosServer(live, folder / "run")


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


# -- three devices ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(
    models: dict[str, Path], model_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ChaosServer]:
    """A model on all three devices, and one on two of them."""
    store = tmp_path_factory.mktemp("devices_store")
    shutil.copy(model_store / "flat.mar", store)
    serving = ServingSettings(device_ids=PINNED_TO)
    make_archives(ArchiveRequest(models["flat"], store, name="pinned", serving=serving))
    folder = tmp_path_factory.mktemp("three")
    yield from start(store, folder, ["all"], DeviceKind.AUTO, [StandIn(devices=3)])


def test_each_device_has_its_workers_and_one_engine(three: ChaosServer) -> None:
    assert devices_of_workers(three, FLAT) == [0, 1, 2]
    assert devices_of_engines(three, FLAT) == ["cpu:0", "cpu:1", "cpu:2"]


def test_an_archive_is_served_on_its_own_devices_only(three: ChaosServer) -> None:
    assert devices_of_workers(three, PINNED) == list(PINNED_TO)
    assert devices_of_engines(three, PINNED) == [f"cpu:{number}" for number in PINNED_TO]


def test_requests_meet_all_devices_and_their_answers_are_the_ordinary_servers(
    three: ChaosServer, server: LiveServer
) -> None:
    expected = server.predict("flat", GOOD, options=FAST)
    assert expected.status_code == HTTPStatus.OK, expected.text
    labels = ("cpu0", "cpu1", "cpu2")
    before = {label: passes(three, FLAT, label) for label in labels}
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(three.live.predict, "flat", GOOD, options=FAST) for _ in range(12)]
    assert {answer.result().content for answer in answers} == {expected.content}
    wait_for(lambda: all(passes(three, FLAT, label) > before[label] for label in labels))
    metrics = scrape(three.live.server.metrics_url)
    for name in ("nnunet_engine_up", "nnunet_engine_starts_total"):
        assert {labels["device"]: metrics.value(name, **labels) for labels in metrics.labels(name)} == dict.fromkeys(
            labels, 1.0
        )


@pytest.mark.long
def test_engines_are_where_workers_are(three: ChaosServer) -> None:
    before = engines(three.runtime, FLAT)
    three.scale(FLAT, 1)
    [left] = devices_of_workers(three, FLAT)
    wait_for(lambda: devices_of_engines(three, FLAT) == [f"cpu:{left}"])
    [stayed] = engines(three.runtime, FLAT)
    assert stayed in before
    three.scale(FLAT, 1 + 3)  # a multiple of the devices more: TorchServe's counter goes round once
    assert devices_of_workers(three, FLAT) == sorted([0, 1, 2, left])
    assert devices_of_engines(three, FLAT) == ["cpu:0", "cpu:1", "cpu:2"]
    assert stayed in engines(three.runtime, FLAT)


# -- a device that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """While there is this file, engines of ``cpu:1`` do not load again."""
    file = tmp_path / "broken"
    file.touch()
    return file


@pytest.fixture
def failing(broken: Path, unpacked: Callable[[str], Path], model_store: Path, tmp_path: Path) -> Iterator[ChaosServer]:
    """Two devices; :data:`FATAL` is the end of one of them."""
    grid = network_grid(ModelBundle(unpacked("five_folds")), FATAL.shape[::-1], SPACING[::-1])
    yield from start(
        model_store,
        tmp_path,
        ["five_folds.mar"],
        DeviceKind.CUDA,
        [
            StandIn(devices=2),
            Fault(kind=Kind.DEVICE_LOST, shape=(1, *grid), device="cpu:1"),
            LoadFails(device="cpu:1", while_exists=broken),
        ],
    )


def ask(server: ChaosServer, case: Case) -> httpx.Response:
    return server.live.predict("five_folds", case.body, options=case.options)


def ask_until_answered(server: ChaosServer, case: Case) -> list[httpx.Response]:
    """What a client gets that comes again after ``Retry-After``, and else never."""
    answers = [ask(server, case)]
    while answers[-1].status_code == HTTPStatus.SERVICE_UNAVAILABLE and "retry-after" in answers[-1].headers:
        time.sleep(float(answers[-1].headers["retry-after"]))
        answers.append(ask(server, case))
    return answers


def test_a_device_that_fails_takes_its_workers_to_503_and_not_the_others(failing: ChaosServer, broken: Path) -> None:
    expected = ask(failing, ORDINARY).content
    wait_for(lambda: ask(failing, FATAL).status_code == HTTPStatus.SERVICE_UNAVAILABLE)  # as soon as it lands there

    def up() -> dict[str, float]:
        metrics = scrape(failing.live.server.metrics_url)
        return {label: metrics.value("nnunet_engine_up", device=label) for label in ("cpu0", "cpu1")}

    wait_for(lambda: up() == {"cpu0": 1, "cpu1": 0})
    [sick] = [folder for folder in failing.runtime.iterdir() if Outage(folder).read() is not None]
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask_until_answered, failing, ORDINARY) for _ in range(2 * CLIENTS)]
        wait_for(lambda: any(client.done() for client in clients))
        assert up() == {"cpu0": 1, "cpu1": 0}
        broken.unlink()
    answers = [answer for client in clients for answer in client.result()]
    counts = Counter(answer.status_code for answer in answers)
    assert counts[HTTPStatus.OK] == len(clients), counts
    assert counts[HTTPStatus.SERVICE_UNAVAILABLE] > 0, "none of them met the device that failed"
    assert {answer.content for answer in answers if answer.status_code == HTTPStatus.OK} == {expected}
    refused = [answer for answer in answers if answer.status_code != HTTPStatus.OK]
    assert {answer.headers["content-type"] for answer in refused} == {"application/problem+json"}
    assert all(1 <= int(answer.headers["retry-after"]) <= 40 for answer in refused)

    wait_for(lambda: ask(failing, ORDINARY).content == expected and up() == {"cpu0": 1, "cpu1": 1})
    assert Outage(sick).read() is None
    assert devices_of_engines(failing, BLOBS) == ["cpu:0", "cpu:1"]
