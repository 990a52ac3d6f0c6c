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
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
import pytest

import nnunet_torchserve_client
from nnunet_torchserve import codecs
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import price, settings_for
from nnunet_torchserve.engine.faults import Entry, Fault, Kind
from nnunet_torchserve.engine.folder import LOG, SOCKET
from nnunet_torchserve.engine.switchboard import IDLE_S
from nnunet_torchserve.engine.tally import Total
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.member import Member
from nnunet_torchserve.options import Options, parse_options
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.chaos import (
    PATIENCE_S,
    Case,
    ChaosServer,
    Clients,
    Engine,
    Pending,
    clients_of,
    engines,
    family,
    has_ended,
    serving,
    shared_memory,
    wait_for,
)
from support.metrics import scrape

pytestmark = pytest.mark.serve

WORKERS = 3
GONE_WITHIN_S = IDLE_S + 120
WORKER_DIED = (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.INSUFFICIENT_STORAGE)
"""TorchServe's own statuses for a request whose worker it has lost."""

BLOBS, SECOND, OTHER, TIGHT = "blobs/1.0", "blobs/2.0", "other/1.0", "tight/1.0"
SMALL = Case((24, 32, 24))
CASES = [Case((40, 44, 36), seed, '{"use_mirroring": false, "tile_step_size": 0.4}') for seed in range(5)]
"""They can be held: each batch with one of their 18 passes waits for a second then."""

LONGER = replace(CASES[0], options='{"use_mirroring": false, "tile_step_size": 0.15}')
"""While it is held, minutes in its engine."""

LARGE = Case((80, 88, 72))

POISON = {
    Kind.RAISE: Case((23, 32, 24)),
    Kind.NAN: Case((22, 32, 24)),
    Kind.KILL: Case((21, 32, 24)),
    Kind.DEVICE_LOST: Case((20, 32, 24)),
    Kind.OUT_OF_MEMORY: Case((19, 32, 24)),
}
"""One pass each, which shares its batch with another case's."""

OUT_OF_MEMORY_TWICE = Case((18, 32, 24))
BATCHES, LARGER_BATCH = ServingSettings(max_patch_batch=2), 4
BATCHES_DIFFER = 1e-3
"""Share of voxels: logits of batches of another size differ in their last bits, which decides near ties."""

DELETIONS = 5
"""As often as an engine looks for its socket while a worker starts."""


@dataclass(frozen=True)
class Store:
    """Archives of one trained model, and the faults that they are served with."""

    folder: Path
    model: Path
    faults: list[Fault]
    member: Member

    def add(self, name: str, version: str, fold: int, serving: ServingSettings) -> str:
        """Make an archive of one fold; its file."""
        file = self.folder / f"{name}-{version}.mar"
        with TemporaryDirectory() as made:
            how = {"folds": (fold,), "name": name, "version": version, "serving": serving}
            [archive] = make_archives(ArchiveRequest(self.model, Path(made), **how))  # type: ignore[arg-type]
            shutil.move(archive, file)
        return file.name


@pytest.fixture(scope="module")
def store(models: dict[str, Path], unpacked: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With ``blobs`` 1.0; whoever needs another archive adds it."""
    member = ModelBundle(unpacked("five_folds")).lead
    faults = [Fault(kind=kind, shape=case.grid(member)) for kind, case in POISON.items()]
    faults.append(Fault(kind=Kind.OUT_OF_MEMORY, shape=OUT_OF_MEMORY_TWICE.grid(member), times=2))
    store = Store(tmp_path_factory.mktemp("chaos_store"), models["five_folds"], faults, member)
    store.add("blobs", "1.0", 0, BATCHES)
    return store


def _bytes(member: Member, case: Case) -> int:
    image = codecs.open_image(case.body, Limits(), member.plans.plans["image_reader_writer"])
    settings = settings_for(member, parse_options(case.options.encode()))
    return price(member, image.geometry, 1, settings, Options()).bytes


@contextmanager
def serving_blobs(store: Store, folder: Path, workers: int = WORKERS, **how: object) -> Iterator[ChaosServer]:
    """``blobs`` 1.0 with workers that start at once, and the faults in the engine's environment."""
    faults: list[Entry] = [*store.faults, CASES[0].held(store.member, folder)]
    with serving(store.folder, folder, faults, models=["blobs-1.0.mar"], workers=workers, **how) as server:
        assert len(engines(server.runtime)) == 1
        yield server


@pytest.fixture(scope="module")
def server(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosServer]:
    with serving_blobs(store, tmp_path_factory.mktemp("chaos")) as server:
        yield server


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
def other(store: Store, server: ChaosServer) -> None:
    """Two workers of another model."""
    server.register(store.add("other", "1.0", 2, ServingSettings(max_patch_batch=LARGER_BATCH)), 2)


@pytest.fixture(scope="module")
def tight(store: Store, server: ChaosServer) -> None:
    """Workers of the model that has memory for one case, and lets one more wait."""
    limits = {"memory_bytes": int(1.5 * _bytes(store.member, CASES[0])), "waiting_cases": 1}
    server.register(store.add("tight", "1.0", 3, ServingSettings(max_patch_batch=1, limits=limits)), WORKERS)


@contextmanager
def in_flight(
    clients: Clients, server: ChaosServer, cases: Sequence[Case], model: str = BLOBS
) -> Iterator[list[Pending]]:
    """As :func:`held_in_flight`, and it is known what each of them is answered alone."""
    for case in cases:
        clients.alone(case, model)
    with held_in_flight(clients, server, cases, model) as pending:
        yield pending


@contextmanager
def held_in_flight(
    clients: Clients, server: ChaosServer, cases: Sequence[Case], model: str = BLOBS
) -> Iterator[list[Pending]]:
    """Send the cases; as many as there are workers are in the engine, and stay there for the length of the block."""
    workers = len(server.workers(model))
    with server.held():
        pending = clients.send_all(cases, model)
        arrive(server, min(len(cases), workers), model)
        yield pending


def arrive(server: ChaosServer, count: int, model: str = BLOBS) -> None:
    """Wait until there are so many cases in the engine."""
    wait_for(lambda: server.engine(model).cases == count)


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


def passes(engine: Engine) -> int:
    """Forward passes that it has made, as it counts them itself; a server tells of them later."""
    with engine.tally() as tally:
        return int(np.frombuffer(os.pread(tally.fileno(), 8 * len(Total), 0), np.int64)[Total.PASSES])


def labels(body: bytes) -> npt.NDArray[np.integer]:
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(body)).dataobj)


# -- the engine -------------------------------------------------------------------------------------------------------


def test_a_killed_engine_costs_nothing_but_time(clients: Clients, server: ChaosServer) -> None:
    """It dies in the middle: some passes of the cases are made."""
    with in_flight(clients, server, CASES) as pending:
        killed = server.engine(BLOBS)
        made = passes(killed)
        wait_for(lambda: passes(killed) > made)
        starts = killed.starts
        killed.kill()
    assert_right(clients, CASES, pending)
    assert server.engine(BLOBS) != killed
    assert killed.starts == starts + 1


@pytest.mark.long
@pytest.mark.parametrize("in_engine", [*range(WORKERS + 1)] * 5)
def test_whenever_the_engine_is_killed(in_engine: int, clients: Clients, server: ChaosServer) -> None:
    for case in CASES:
        clients.alone(case, BLOBS)
    with server.held():
        pending = clients.send_all(CASES, BLOBS)
        wait_for(lambda: server.engine(BLOBS).cases >= in_engine)
        server.engine(BLOBS).kill()
    assert_right(clients, CASES, pending)
    server.engine(BLOBS)


@pytest.mark.long  # tests/handler/test_outage.py has a pass that never ends, on an engine without a server
def test_a_stopped_engine_is_noticed_and_replaced(clients: Clients, server: ChaosServer) -> None:
    with in_flight(clients, server, CASES) as pending:
        stopped = server.engine(BLOBS)
        stopped.process.suspend()
    assert_right(clients, CASES, pending)
    assert has_ended(stopped.process)
    server.engine(BLOBS)


@pytest.mark.long  # tests/handler/test_engine_process.py has one that is deleted once, at rest
def test_a_deleted_socket_does_not_lead_new_workers_to_a_second_engine(clients: Clients, server: ChaosServer) -> None:
    server.scale(BLOBS, WORKERS - 1)
    with in_flight(clients, server, CASES) as pending, ThreadPoolExecutor() as pool:
        engine = server.engine(BLOBS)
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
    with in_flight(clients, server, CASES) as pending:
        engine = server.engine(BLOBS)
        worker = next(iter(server.workers(BLOBS)))
        psutil.Process(worker).kill()
    assert lost_with_their_worker(clients, CASES, pending) == 1
    server.wait_ready(BLOBS, WORKERS, without=[worker])
    assert server.engine(BLOBS) == engine
    wait_for(lambda: (engine.cases, engine.reserved_bytes) == (0, 0))


def test_a_killed_worker_costs_the_client_library_one_more_try(clients: Clients, server: ChaosServer) -> None:
    expected = [clients.alone(case, BLOBS) for case in CASES]
    cases = [nnunet_torchserve_client.Case(str(each.seed), each.body, json.loads(each.options)) for each in CASES]
    url = server.live.server.inference_url
    with nnunet_torchserve_client.Client(url, "blobs", "1.0") as client, ThreadPoolExecutor(1) as pool:
        with server.held():
            predicting = pool.submit(lambda: list(client.predict_many(cases)))
            arrive(server, WORKERS)
            psutil.Process(next(iter(server.workers(BLOBS)))).kill()
        outcomes = predicting.result(PATIENCE_S)
    assert [outcome.value and outcome.value.content for outcome in outcomes] == expected
    assert sorted(outcome.answer.tries for outcome in outcomes if outcome.answer) == [1] * (len(CASES) - 1) + [2]


@pytest.mark.parametrize("when", ["together", pytest.param("while the next engine starts", marks=pytest.mark.long)])
def test_a_worker_killed_with_its_engine_costs_one_request(when: str, clients: Clients, server: ChaosServer) -> None:
    with in_flight(clients, server, CASES) as pending:
        engine = server.engine(BLOBS)
        worker = next(iter(server.workers(BLOBS)))
        engine.kill()
        if when != "together":
            wait_for(lambda: engines(server.runtime, BLOBS) != [])
        psutil.Process(worker).kill()
    assert lost_with_their_worker(clients, CASES, pending) == 1
    server.wait_ready(BLOBS, WORKERS, without=[worker])
    assert server.engine(BLOBS) != engine


@pytest.mark.long  # tests/serve/test_drain.py scales under load
def test_scaling_under_load(clients: Clients, server: ChaosServer) -> None:
    server.scale(BLOBS, 1)
    engine = server.engine(BLOBS)
    with in_flight(clients, server, CASES[:2]) as growing:
        server.scale(BLOBS, WORKERS)
        growing.extend(clients.send_all(CASES, BLOBS))
        arrive(server, WORKERS)
        server.scale(BLOBS, WORKERS - 1)
    assert lost_with_their_worker(clients, [*CASES[:2], *CASES], growing) <= 1
    assert engines(server.runtime, BLOBS) == [engine]
    wait_for(lambda: (engine.cases, engine.reserved_bytes) == (0, 0))


# -- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"), [(Kind.RAISE, "the network failed on this case"), (Kind.NAN, "not finite")]
)
def test_a_case_that_fails_in_the_network_fails_alone(
    kind: Kind, reason: str, clients: Clients, server: ChaosServer
) -> None:
    cases = CASES[: WORKERS - 1]
    with in_flight(clients, server, cases) as pending:
        engine = server.engine(BLOBS)
        guilty = clients.send(POISON[kind], BLOBS)
        assert code(guilty) == (HTTPStatus.INTERNAL_SERVER_ERROR, "case_failed")
    assert reason in guilty.result().json()["detail"]
    assert_right(clients, cases, pending)
    assert server.engine(BLOBS) == engine


@pytest.mark.long  # tests/handler/test_engine_process.py has it with workers that are threads
@pytest.mark.parametrize("kind", [Kind.KILL, Kind.DEVICE_LOST])
def test_a_case_that_kills_every_engine_fails_alone(kind: Kind, clients: Clients, server: ChaosServer) -> None:
    """It shares its first batch with another case, and dies with the second engine, alone."""
    first, then = CASES[: WORKERS - 1], CASES[WORKERS - 1 :]
    for case in then:
        clients.alone(case, BLOBS)
    with in_flight(clients, server, first) as pending:
        engine = server.engine(BLOBS)
        starts = engine.starts
        guilty = clients.send(POISON[kind], BLOBS)
        pending.extend(clients.send_all(then, BLOBS))
        wait_for(lambda: has_ended(engine.process))
    assert_right(clients, CASES, pending)
    assert code(guilty) == (HTTPStatus.INTERNAL_SERVER_ERROR, "case_failed")
    assert server.engine(BLOBS).starts == starts + 2


@pytest.mark.long  # tests/handler/test_engine.py has it with an engine in the process
@pytest.mark.usefixtures("other")
def test_out_of_memory_halves_the_batch_and_then_costs_the_case(clients: Clients, server: ChaosServer) -> None:
    innocent = CASES[0]
    expected = clients.alone(innocent, OTHER)
    with in_flight(clients, server, [innocent], OTHER) as [spared]:
        twice = clients.send(OUT_OF_MEMORY_TWICE, OTHER)
        wait([twice], PATIENCE_S)
    assert twice.result(PATIENCE_S).status_code == HTTPStatus.OK, twice.result().text
    assert spared.result(PATIENCE_S).status_code == HTTPStatus.OK, spared.result().text
    assert np.mean(labels(spared.result().content) != labels(expected)) < BATCHES_DIFFER
    engine = server.engine(OTHER)
    assert re.findall("batches of (.) from now on", engine.log) == ["2", "1"]

    expected = clients.ask(innocent, OTHER).content
    with in_flight(clients, server, [innocent], OTHER) as [spared]:
        always = clients.send(POISON[Kind.OUT_OF_MEMORY], OTHER)
        assert code(always) == (HTTPStatus.INSUFFICIENT_STORAGE, "out_of_memory")
    assert spared.result(PATIENCE_S).content == expected
    assert server.engine(OTHER) == engine


# -- admission --------------------------------------------------------------------------------------------------------


@contextmanager
def in_tight_memory(clients: Clients, server: ChaosServer) -> Iterator[Pending]:
    """A case has taken the memory of ``tight``, and keeps it for the length of the block."""
    with server.held():
        running = clients.send(LONGER, TIGHT)
        arrive(server, 1, TIGHT)
        yield running
        assert not running.done()
    assert running.result(PATIENCE_S).status_code == HTTPStatus.OK


def cases_waiting(server: ChaosServer) -> float:
    return scrape(server.live.server.metrics_url).value("nnunet_cases_waiting", model_name="tight")


@pytest.mark.usefixtures("tight")
def test_a_case_waits_for_memory(clients: Clients, server: ChaosServer) -> None:
    clients.alone(CASES[1], TIGHT)
    with in_tight_memory(clients, server):
        waiting = clients.send(CASES[1], TIGHT)
        wait_for(lambda: cases_waiting(server) == 1)
        assert server.engine(TIGHT).cases == 1
    assert_right(clients, CASES[1:2], [waiting], TIGHT)


@pytest.mark.usefixtures("tight")
def test_more_cases_than_may_wait_are_told_to_come_again(clients: Clients, server: ChaosServer) -> None:
    cases = CASES[1:4]
    for case in cases:
        clients.alone(case, TIGHT)
    with in_tight_memory(clients, server):
        pending = clients.send_all(cases, TIGHT)
        for refused in islice(as_completed(pending, PATIENCE_S), 2):
            assert code(refused) == (HTTPStatus.TOO_MANY_REQUESTS, "busy")
            assert re.fullmatch(r"[1-9]\d*", refused.result().headers["retry-after"])
        [admitted] = [number for number, each in enumerate(pending) if not each.done()]
    assert_right(clients, [cases[admitted]], [pending[admitted]], TIGHT)


@pytest.mark.usefixtures("tight")
def test_a_case_that_never_fits_is_refused_at_once(clients: Clients, server: ChaosServer) -> None:
    assert LARGE.body
    with in_tight_memory(clients, server):
        assert code(clients.send(LARGE, TIGHT)) == (HTTPStatus.INSUFFICIENT_STORAGE, "out_of_memory")


@pytest.mark.long  # a killed worker gives its memory back above; others wait for memory above
@pytest.mark.usefixtures("tight")
def test_a_killed_workers_memory_goes_to_those_who_wait_for_it(clients: Clients, server: ChaosServer) -> None:
    clients.alone(CASES[1], TIGHT)
    server.scale(TIGHT, 1)
    [busy] = server.workers(TIGHT)
    engine = server.engine(TIGHT)
    with server.held():
        lost = clients.send(LONGER, TIGHT)
        arrive(server, 1, TIGHT)
        server.scale(TIGHT, 2)
        waiting = clients.send(CASES[1], TIGHT)
        psutil.Process(busy).kill()
        assert lost.result(PATIENCE_S).status_code in WORKER_DIED
    assert_right(clients, [CASES[1]], [waiting], TIGHT)
    server.wait_ready(TIGHT, 2, without=[busy])
    assert server.engine(TIGHT) == engine


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tight")
def test_versions_and_models_have_an_engine_each_and_leave_alone(
    clients: Clients, server: ChaosServer, store: Store
) -> None:
    """One of them is unregistered while another works."""
    server.register(store.add("blobs", "2.0", 1, BATCHES), 1)
    cases = CASES[:2]
    alone = {model: [clients.alone(case, model) for case in cases] for model in (BLOBS, SECOND, TIGHT)}
    assert len({answers[0] for answers in alone.values()}) == len(alone)
    with server.held():
        pending = {model: clients.send_all(cases, model) for model in alone}
        for model in alone:
            wait_for(lambda: server.engine(model).cases >= 1)  # noqa: B023 (waited for at once)
    for model in alone:
        assert_right(clients, cases, pending[model], model)

    before = {model: server.engine(model) for model in alone}
    with in_flight(clients, server, CASES) as busy:
        server.unregister(SECOND)
    assert_right(clients, CASES, busy)
    wait_for(lambda: has_ended(before[SECOND].process), GONE_WITHIN_S)
    assert (server.engine(BLOBS), server.engine(TIGHT)) == (before[BLOBS], before[TIGHT])


# -- the front end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),  # tests/serve ends servers by their launcher
    ],
    ids=lambda how: how.name,
)
def test_nothing_is_left_of_a_server_that_was_ended_under_load(
    how: signal.Signals, store: Store, tmp_path: Path
) -> None:
    """Its workers are children of the front end, as they should be, and not of a fork server."""
    with serving_blobs(store, tmp_path, 2, cold_workers=True) as server, clients_of(server) as clients:
        assert_nothing_is_left(server, clients, how)


def assert_nothing_is_left(server: ChaosServer, clients: Clients, how: signal.Signals) -> None:
    with held_in_flight(clients, server, CASES) as pending:
        before = family(server.runtime)
        memory = shared_memory(before)
        front_end = server.live.server.process()
        assert front_end is not None
        assert memory
        workers = [psutil.Process(worker) for worker in server.workers(BLOBS)]
        assert {front_end, server.engine(BLOBS).process, *workers} <= {*before}
        front_end.send_signal(how)
        for each in pending:
            assert isinstance(each.exception(PATIENCE_S), httpx.TransportError)
    wait_for(lambda: not family(server.runtime), GONE_WITHIN_S)
    assert not shared_memory(psutil.process_iter()) & memory
    assert not list(server.runtime.rglob(SOCKET))
