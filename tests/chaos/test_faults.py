"""Faults under load, on a real TorchServe: what each costs, and whom."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from nnunet_torchserve import codecs
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import network_grid, price, settings_for
from nnunet_torchserve.engine.faults import Fault, Kind
from nnunet_torchserve.engine.folder import LOG, SOCKET
from nnunet_torchserve.engine.switchboard import IDLE_S
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, parse_options
from nnunet_torchserve_tools.archive import ArchiveRequest, ServingSettings, make_archives
from support.chaos import (
    PATIENCE_S,
    SPACING,
    Case,
    ChaosServer,
    Clients,
    Pending,
    clients_of,
    engines,
    family,
    has_ended,
    shared_memory,
    wait_for,
)
from support.server import running

pytestmark = pytest.mark.serve

WORKERS = 4
GONE_WITHIN_S = IDLE_S + 120
WORKER_DIED = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE)
"""TorchServe's own statuses for a request whose worker it has lost."""

BLOBS, SECOND, OTHER, TIGHT = "blobs/1.0", "blobs/2.0", "other/1.0", "tight/1.0"
SMALL = Case((24, 32, 24))
LONG = '{"tile_step_size": 0.3}'
CASES = [Case((40, 44, 36), seed, LONG) for seed in range(6)]
"""A second of the network each."""

LONGER = replace(CASES[0], options='{"tile_step_size": 0.1}')
"""Some seconds, or with five folds half a minute."""

ENDLESS = replace(CASES[0], options='{"tile_step_size": 0.05}')
"""Longer than workers take to start."""

LARGE = Case((80, 88, 72))

POISON = {
    Kind.RAISE: Case((25, 32, 26)),
    Kind.NAN: Case((26, 32, 26)),
    Kind.KILL: Case((27, 32, 26)),
    Kind.DEVICE_LOST: Case((30, 32, 26)),
    Kind.OUT_OF_MEMORY: Case((28, 32, 26)),
}
OUT_OF_MEMORY_TWICE = Case((29, 32, 26))
BATCH = 4
BATCHES_DIFFER = 1e-3
"""Share of voxels: logits of batches of another size differ in their last bits, which decides near ties."""

DELETIONS = 5
"""As often as an engine looks for its socket while a worker starts."""


@dataclass(frozen=True)
class Store:
    """Archives of one trained model, with the faults and the size that they are served with."""

    folder: Path
    faults: list[Fault]


@pytest.fixture(scope="module")
def store(models: dict[str, Path], unpacked: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """``blobs`` in two versions, ``other``, and ``tight``, whose memory is one case's."""
    folder = tmp_path_factory.mktemp("chaos_store")
    bundle = ModelBundle(unpacked("five_folds"))

    def archive(name: str, serving: ServingSettings, *, version: str = "1.0", fold: int = 0) -> None:
        made = tmp_path_factory.mktemp("made")
        request = ArchiveRequest(models["five_folds"], made, folds=(fold,), name=name, version=version, serving=serving)
        [archive] = make_archives(request)
        shutil.copy(archive, folder / f"{name}-{version}.mar")

    batches = ServingSettings(max_patch_batch=BATCH)
    archive("blobs", batches)
    archive("blobs", batches, version="2.0", fold=1)
    archive("other", batches, fold=2)
    memory = int(1.5 * _bytes(bundle, CASES[0]))
    archive("tight", replace(batches, limits={"memory_bytes": memory, "waiting_cases": 2}))

    faults = [Fault(kind=kind, shape=_grid(bundle, case)) for kind, case in POISON.items()]
    faults.append(Fault(kind=Kind.OUT_OF_MEMORY, shape=_grid(bundle, OUT_OF_MEMORY_TWICE), times=2))
    return Store(folder, faults)


def _grid(bundle: ModelBundle, case: Case) -> tuple[int, int, int, int]:
    return (1, *network_grid(bundle, case.shape[::-1], SPACING[::-1]))


def _bytes(bundle: ModelBundle, case: Case) -> int:
    image = codecs.open_image(case.body, Limits(), bundle.plans.plans["image_reader_writer"])
    settings = settings_for(bundle, parse_options(case.options.encode()))
    return price(bundle, image.geometry, 1, settings, Options()).bytes


@pytest.fixture(scope="module")
def server(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosServer]:
    """``blobs`` 1.0 with four workers that start at once, and the faults in the engine's environment."""
    folder = tmp_path_factory.mktemp("chaos")
    faults = [fault.model_dump(mode="json") for fault in store.faults]
    serving = running(store.folder, folder / "state", models=["blobs-1.0.mar"], workers=WORKERS, testing=True)
    with ExitStack() as until_the_end:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(RUNTIME_DIR_VARIABLE, str(folder / "run"))
            environment.setenv(FAULTS_VARIABLE, json.dumps(faults))
            live = until_the_end.enter_context(serving)
        assert len(engines(folder / "run")) == 1
        yield ChaosServer(live, folder / "run")


@pytest.fixture(scope="module")
def shared_clients(server: ChaosServer) -> Iterator[Clients]:
    with clients_of(server) as clients:
        yield clients


@pytest.fixture
def clients(server: ChaosServer, shared_clients: Clients) -> Clients:
    """Clients of a server that is as it was when it started, whatever the last test did to it."""
    shared_clients.settle()
    if len(server.workers(BLOBS)) != WORKERS:
        server.scale(BLOBS, WORKERS)
    server.wait_ready(BLOBS, WORKERS)
    assert shared_clients.ask(SMALL, BLOBS).status_code == HTTPStatus.OK
    server.engine(BLOBS)
    return shared_clients


@pytest.fixture(scope="module")
def other(server: ChaosServer) -> None:
    """Two workers of another model."""
    server.register("other-1.0.mar", 2)


@pytest.fixture(scope="module")
def tight(server: ChaosServer) -> None:
    """Four workers of the model that has memory for one case."""
    server.register("tight-1.0.mar", WORKERS)


def in_flight(clients: Clients, server: ChaosServer, cases: Sequence[Case], model: str = BLOBS) -> list[Pending]:
    """Send the cases; returns when as many as there are workers are in the engine."""
    for case in cases:
        clients.alone(case, model)
    pending = clients.send_all(cases, model)
    workers = len(server.workers(model))
    wait_for(lambda: server.engine(model).cases == min(len(cases), workers))
    return pending


def assert_right(clients: Clients, cases: Sequence[Case], pending: Sequence[Pending], model: str = BLOBS) -> None:
    """Every answer is that of the same request alone."""
    for case, each in zip(cases, pending, strict=True):
        answer = each.result(PATIENCE_S)
        assert answer.status_code == HTTPStatus.OK, answer.text
        assert answer.content == clients.alone(case, model)


def lost_with_their_worker(clients: Clients, cases: Sequence[Case], pending: Sequence[Pending]) -> int:
    """How many requests TorchServe lost; the others must have their right answer."""
    answers = [each.result(PATIENCE_S) for each in pending]
    lost = [number for number, answer in enumerate(answers) if answer.status_code != HTTPStatus.OK]
    for number in lost:
        assert answers[number].status_code in WORKER_DIED
        assert answers[number].json()["message"] == "Worker died."
    right = [number for number in range(len(cases)) if number not in lost]
    assert_right(clients, [cases[number] for number in right], [pending[number] for number in right])
    return len(lost)


def code(pending: Pending) -> tuple[int, str]:
    """Status and code of a problem."""
    answer = pending.result(PATIENCE_S)
    assert answer.headers["content-type"] == "application/problem+json", answer.content[:100]
    return answer.status_code, answer.json()["code"]


def labels(body: bytes) -> npt.NDArray[np.integer]:
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj)


# -- the engine -------------------------------------------------------------------------------------------------------


def test_a_killed_engine_costs_nothing_but_time(clients: Clients, server: ChaosServer) -> None:
    pending = in_flight(clients, server, CASES)
    killed = server.engine(BLOBS)
    starts = killed.starts
    killed.kill()
    assert_right(clients, CASES, pending)
    assert server.engine(BLOBS) != killed
    assert killed.starts == starts + 1


@pytest.mark.long
@pytest.mark.parametrize("in_engine", [0, 1, 2, 3, 4] * 4)
def test_whenever_the_engine_is_killed(in_engine: int, clients: Clients, server: ChaosServer) -> None:
    for case in CASES:
        clients.alone(case, BLOBS)
    pending = clients.send_all(CASES, BLOBS)
    wait_for(lambda: server.engine(BLOBS).cases >= in_engine)
    server.engine(BLOBS).kill()
    assert_right(clients, CASES, pending)
    server.engine(BLOBS)


def test_a_stopped_engine_is_noticed_and_replaced(clients: Clients, server: ChaosServer) -> None:
    pending = in_flight(clients, server, CASES)
    stopped = server.engine(BLOBS)
    stopped.process.suspend()
    assert_right(clients, CASES, pending)
    assert has_ended(stopped.process)
    server.engine(BLOBS)


def test_a_deleted_socket_does_not_lead_new_workers_to_a_second_engine(clients: Clients, server: ChaosServer) -> None:
    server.scale(BLOBS, 2)
    pending = in_flight(clients, server, CASES)
    engine = server.engine(BLOBS)
    with ThreadPoolExecutor() as pool:
        arriving = pool.submit(server.scale, BLOBS, WORKERS)
        for _ in range(DELETIONS):
            wait_for((engine.folder / SOCKET).exists)
            (engine.folder / SOCKET).unlink()
        arriving.result()
    assert_right(clients, CASES, pending)
    assert_right(clients, CASES[:WORKERS], clients.send_all(CASES[:WORKERS], BLOBS))
    assert engines(server.runtime, BLOBS) == [engine]


@pytest.mark.long  # tests/handler/test_engine_process.py has an engine without its log
def test_a_full_disk_under_the_engines_log_is_borne(clients: Clients, server: ChaosServer) -> None:
    engine = server.engine(BLOBS)
    log = engine.folder / LOG
    log.unlink()
    log.symlink_to("/dev/full")
    try:
        engine.kill()
        for _ in range(2):
            assert_right(clients, CASES[:1], clients.send_all(CASES[:1], BLOBS))
            logged = clients.send(POISON[Kind.RAISE], BLOBS)
            assert code(logged) == (HTTPStatus.INTERNAL_SERVER_ERROR, "case_failed")
        assert Path(f"/proc/{server.engine(BLOBS).process.pid}/fd/2").readlink() == Path("/dev/full")
    finally:
        log.unlink()
        server.engine(BLOBS).kill()


def test_another_users_connection_is_refused(clients: Clients, server: ChaosServer) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can try it as another user")
    program = (
        "import os, socket, sys; os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534);"
        "link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); link.settimeout(300);"
        f"link.connect({SOCKET!r}); print(link.recv(1000))"
    )
    engine = server.engine(BLOBS)
    engine.folder.chmod(0o711)
    (engine.folder / SOCKET).chmod(0o777)
    try:
        stranger = subprocess.run(
            [sys.executable, "-c", program, str(engine.folder)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
    finally:
        engine.folder.chmod(0o700)
    assert stranger.stdout == "b''\n", stranger.stderr
    assert "belongs to user 65534" in engine.log
    assert clients.ask(SMALL, BLOBS).status_code == HTTPStatus.OK
    assert engines(server.runtime, BLOBS) == [engine]


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_killed_workers_request_is_the_only_one_lost(clients: Clients, server: ChaosServer) -> None:
    pending = in_flight(clients, server, CASES)
    engine = server.engine(BLOBS)
    worker = next(iter(server.workers(BLOBS)))
    psutil.Process(worker).kill()
    assert lost_with_their_worker(clients, CASES, pending) == 1
    server.wait_ready(BLOBS, WORKERS, without=[worker])
    assert server.engine(BLOBS) == engine
    wait_for(lambda: (engine.cases, engine.reserved_bytes) == (0, 0))


@pytest.mark.parametrize("when", ["together", pytest.param("while the next engine starts", marks=pytest.mark.long)])
def test_a_worker_killed_with_its_engine_costs_one_request(when: str, clients: Clients, server: ChaosServer) -> None:
    pending = in_flight(clients, server, CASES)
    engine = server.engine(BLOBS)
    worker = next(iter(server.workers(BLOBS)))
    engine.kill()
    if when != "together":
        wait_for(lambda: engines(server.runtime, BLOBS) != [])
    psutil.Process(worker).kill()
    assert lost_with_their_worker(clients, CASES, pending) == 1
    server.wait_ready(BLOBS, WORKERS, without=[worker])
    assert server.engine(BLOBS) != engine


def test_scaling_under_load(clients: Clients, server: ChaosServer) -> None:
    server.scale(BLOBS, 1)
    engine = server.engine(BLOBS)
    growing = in_flight(clients, server, CASES[:4])
    server.scale(BLOBS, WORKERS)
    growing += clients.send_all(CASES, BLOBS)
    wait_for(lambda: engine.cases == WORKERS)
    server.scale(BLOBS, 2)
    assert lost_with_their_worker(clients, [*CASES[:4], *CASES], growing) <= 2
    assert engines(server.runtime, BLOBS) == [engine]
    wait_for(lambda: (engine.cases, engine.reserved_bytes) == (0, 0))


# -- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"), [(Kind.RAISE, "the network failed on this case"), (Kind.NAN, "not finite")]
)
def test_a_case_that_fails_in_the_network_fails_alone(
    kind: Kind, reason: str, clients: Clients, server: ChaosServer
) -> None:
    cases = CASES[:3]
    pending = in_flight(clients, server, cases)
    engine = server.engine(BLOBS)
    guilty = clients.send(POISON[kind], BLOBS)
    assert code(guilty) == (HTTPStatus.INTERNAL_SERVER_ERROR, "case_failed")
    assert reason in guilty.result().json()["detail"]
    assert_right(clients, cases, pending)
    assert server.engine(BLOBS) == engine


@pytest.mark.parametrize("kind", [Kind.KILL, pytest.param(Kind.DEVICE_LOST, marks=pytest.mark.long)])
def test_a_case_that_kills_every_engine_fails_alone(kind: Kind, clients: Clients, server: ChaosServer) -> None:
    """It shares its first batch with another case, and dies with the second engine, alone."""
    for case in CASES[3:5]:
        clients.alone(case, BLOBS)
    pending = in_flight(clients, server, CASES[:3])
    starts = server.engine(BLOBS).starts
    guilty = clients.send(POISON[kind], BLOBS)
    pending += clients.send_all(CASES[3:5], BLOBS)
    assert_right(clients, CASES[:5], pending)
    assert code(guilty) == (HTTPStatus.INTERNAL_SERVER_ERROR, "case_failed")
    assert server.engine(BLOBS).starts == starts + 2


@pytest.mark.usefixtures("other")
def test_out_of_memory_halves_the_batch_and_then_costs_the_case(clients: Clients, server: ChaosServer) -> None:
    innocent = replace(CASES[0], options="{}")
    expected = clients.alone(innocent, OTHER)
    [spared] = in_flight(clients, server, [innocent], OTHER)
    twice = clients.send(OUT_OF_MEMORY_TWICE, OTHER)
    assert twice.result(PATIENCE_S).status_code == HTTPStatus.OK, twice.result().text
    assert spared.result(PATIENCE_S).status_code == HTTPStatus.OK, spared.result().text
    assert np.mean(labels(spared.result().content) != labels(expected)) < BATCHES_DIFFER
    engine = server.engine(OTHER)
    assert re.findall("batches of (.) from now on", engine.log) == ["2", "1"]

    expected = clients.ask(innocent, OTHER).content
    [spared] = in_flight(clients, server, [innocent], OTHER)
    always = clients.send(POISON[Kind.OUT_OF_MEMORY], OTHER)
    assert code(always) == (HTTPStatus.INSUFFICIENT_STORAGE, "out_of_memory")
    assert spared.result(PATIENCE_S).content == expected
    assert server.engine(OTHER) == engine


# -- admission --------------------------------------------------------------------------------------------------------


def in_tight_memory(clients: Clients, server: ChaosServer, case: Case = LONGER) -> Pending:
    """A case that has taken the memory of ``tight``."""
    running = clients.send(case, TIGHT)
    wait_for(lambda: server.engine(TIGHT).cases == 1)
    return running


@pytest.mark.usefixtures("tight")
def test_cases_wait_for_memory(clients: Clients, server: ChaosServer) -> None:
    """Room for one, and two may wait."""
    for case in CASES[:3]:
        clients.alone(case, TIGHT)
    assert_right(clients, CASES[:3], clients.send_all(CASES[:3], TIGHT), TIGHT)


@pytest.mark.usefixtures("tight")
def test_more_cases_than_may_wait_are_told_to_come_again(clients: Clients, server: ChaosServer) -> None:
    cases = CASES[:4]
    for case in cases:
        clients.alone(case, TIGHT)
    running = in_tight_memory(clients, server)
    pending = clients.send_all(cases, TIGHT)
    admitted = [number for number, each in enumerate(pending) if each.result(PATIENCE_S).status_code == HTTPStatus.OK]
    assert_right(clients, [cases[n] for n in admitted], [pending[n] for n in admitted], TIGHT)
    refused = [each for number, each in enumerate(pending) if number not in admitted]
    assert len(refused) == 2
    for each in refused:
        assert code(each) == (HTTPStatus.TOO_MANY_REQUESTS, "busy")
        assert re.fullmatch(r"[1-9]\d*", each.result().headers["retry-after"])
    assert running.result(PATIENCE_S).status_code == HTTPStatus.OK


@pytest.mark.usefixtures("tight")
def test_a_case_that_never_fits_is_refused_at_once(clients: Clients, server: ChaosServer) -> None:
    running = in_tight_memory(clients, server)
    assert code(clients.send(LARGE, TIGHT)) == (HTTPStatus.INSUFFICIENT_STORAGE, "out_of_memory")
    assert not running.done()
    assert running.result(PATIENCE_S).status_code == HTTPStatus.OK


@pytest.mark.usefixtures("tight")
def test_a_killed_workers_memory_goes_to_those_who_wait_for_it(clients: Clients, server: ChaosServer) -> None:
    cases = CASES[:2]
    for case in cases:
        clients.alone(case, TIGHT)
    server.scale(TIGHT, 1)
    [busy] = server.workers(TIGHT)
    lost = in_tight_memory(clients, server, ENDLESS)
    engine = server.engine(TIGHT)
    server.scale(TIGHT, WORKERS)
    waiting = clients.send_all(cases, TIGHT)
    psutil.Process(busy).kill()
    assert lost.result(PATIENCE_S).status_code in WORKER_DIED
    assert_right(clients, cases, waiting, TIGHT)
    server.wait_ready(TIGHT, WORKERS, without=[busy])
    assert server.engine(TIGHT) == engine


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("other")
def test_versions_and_models_have_an_engine_each_and_leave_alone(clients: Clients, server: ChaosServer) -> None:
    """One of them is unregistered while another works."""
    server.register("blobs-2.0.mar", 1)
    cases = [replace(case, options="{}") for case in CASES[:2]]
    alone = {model: [clients.alone(case, model) for case in cases] for model in (BLOBS, SECOND, OTHER)}
    assert len({answers[0] for answers in alone.values()}) == len(alone)
    pending = {model: clients.send_all(cases, model) for model in alone}
    for model in alone:
        assert_right(clients, cases, pending[model], model)

    before = {model: server.engine(model) for model in alone}
    busy = in_flight(clients, server, CASES)
    server.unregister(SECOND)
    assert_right(clients, CASES, busy)
    wait_for(lambda: has_ended(before[SECOND].process), GONE_WITHIN_S)
    assert (server.engine(BLOBS), server.engine(OTHER)) == (before[BLOBS], before[OTHER])


# -- the front end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_nothing_is_left_of_a_server_that_ended_under_load(
    how: signal.Signals, model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "run"
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(runtime))
    with running(model_store, tmp_path / "state", models=["five_folds.mar"], workers=2) as live:
        server = ChaosServer(live, runtime)
        [engine] = engines(runtime)
        with clients_of(server) as clients:
            pending = clients.send_all([replace(LONGER, seed=seed) for seed in range(3)], "five_folds")
            wait_for(lambda: engine.cases == 2)
            memory = shared_memory(family(runtime))
            front_end = live.server.process()
            assert front_end is not None
            assert memory
            assert {front_end, engine.process, *map(psutil.Process, server.workers("five_folds"))} <= {*family(runtime)}
            front_end.send_signal(how)
            for each in pending:
                assert isinstance(each.exception(PATIENCE_S), httpx.TransportError)
        wait_for(lambda: not family(runtime), GONE_WITHIN_S)
        assert not shared_memory(psutil.process_iter()) & memory
        assert not list(runtime.rglob(SOCKET))
