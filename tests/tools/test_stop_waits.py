"""What a stop waits for: the real one, on a clock that is not, with clients, workers and a kernel that are told."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from nnunet_torchserve.draining import ORDERS, REPORTS, order_name, retry_after_s
from nnunet_torchserve_tools import connections, ending, stopping
from nnunet_torchserve_tools.cli import servers
from nnunet_torchserve_tools.connections import InUse
from nnunet_torchserve_tools.errors import Lost, ToolError
from nnunet_torchserve_tools.orders import Report, Target, reports
from nnunet_torchserve_tools.server import Server
from nnunet_torchserve_tools.stopping import STALLED_S, Exchanges

WORKER = 1
ANSWERED_S = 0.05


class Clock:
    """In place of the module ``time``."""

    def __init__(self, start: float) -> None:
        self.now = start

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Client:
    """It uploads, is refused, and comes again when it was told, or at once."""

    name: bytes
    upload_s: float
    begins: float
    waits: bool = True
    keeps: bool = True
    taken: int = 0
    number: int = 0

    def at(self, now: float, world: World) -> InUse | None:
        while now >= self.begins + self.upload_s + ANSWERED_S:
            refused_at = self.begins + self.upload_s + ANSWERED_S
            pause = retry_after_s(world.order(), refused_at) + world.random.uniform(0, 0.1) if self.waits else 0.005
            self.begins = refused_at + pause
            self.taken += 100
            self.number += 1
            world.refused += 1
        if now < self.begins:
            return None
        cookie = self.name if self.keeps else self.name + str(self.number).encode()
        return InUse(cookie, 1 + int(1e4 * now), self.taken if self.keeps else 0, is_leaving=False, peer=self.name[:1])


@dataclass
class World:
    """Everything that a stop looks at."""

    clock: Clock
    control: Path
    clients: list[Client] = field(default_factory=list)
    case: Callable[[float], InUse | None] = lambda _: None
    works: Callable[[float], bool] = lambda _: False
    answers: Callable[[], list[dict[str, Any]] | ToolError | None] = list
    refused: int = 0
    signals: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(7))
    told: list[str] = field(default_factory=list)

    def order(self) -> str:
        return (self.control / ORDERS / order_name(None)).read_text()

    def in_use(self, _port: int = 0) -> list[InUse]:
        found = [each.at(self.clock.now, self) for each in self.clients] + [self.case(self.clock.now)]
        return [each for each in found if each is not None]

    def reports(self, _control: Path) -> dict[int, Report]:
        works = self.works(self.clock.now)
        return {WORKER: Report(int(self.clock.now * 10), idle=not works, works=works, refused=self.refused)}

    def stop(self, grace_s: float = 300.0) -> str:
        server = Server("", "http://127.0.0.1:1", "http://127.0.0.1:2", "", [], "", str(self.control))
        stop = stopping._Stop(server, lambda: self.signals > 1, lambda: None, self.told.append)
        return stop.run(grace_s)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    (tmp_path / ORDERS).mkdir()
    (tmp_path / REPORTS).mkdir()
    made = World(Clock(1000.0), tmp_path)

    class Descriptions:
        def __init__(self, _target: Target) -> None:
            pass

        def take(self, _wait_s: float) -> list[dict[str, Any]] | ToolError | None:
            return made.answers()

    monkeypatch.setattr(stopping, "time", made.clock)
    monkeypatch.setattr(connections, "in_use", made.in_use)
    monkeypatch.setattr(stopping, "reports", made.reports)
    monkeypatch.setattr(stopping, "Descriptions", Descriptions)
    monkeypatch.setattr(psutil, "pid_exists", lambda _: True)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_clients_with_uploads_of_seconds_are_all_answered_before_the_end(world: World, seed: int) -> None:
    world.random.seed(seed)
    start = world.clock.now = 1000 + world.random.uniform(0, 8)
    for number in range(8):
        upload_s = world.random.uniform(1, 6)
        world.clients.append(Client(b"%d" % number, upload_s, start - world.random.uniform(0, upload_s)))
    assert world.stop() == ""
    assert world.in_use() == []
    world.clock.now += 0.6  # TorchServe has its port open still
    assert world.in_use() == []
    assert world.clock.now - start < 60


@pytest.mark.parametrize("keeps", [True, False])
def test_who_comes_again_at_once_does_not_hold_a_stop_up_and_is_said(world: World, keeps: bool) -> None:
    world.clients = [Client(b"h%d" % n, 0.3, 1000.0, waits=False, keeps=keeps) for n in range(3)]
    assert world.stop() == "a request or an answer on its way, on 3 connections"
    assert world.clock.now < 1020


def test_no_upload_is_cut_because_others_come_again_at_once(world: World) -> None:
    world.clients = [Client(b"h%d" % n, 0.3, 1000.0, waits=False) for n in range(3)]
    world.clients.append(Client(b"slow", 30.0, 1001.0))
    assert "connections" in world.stop()
    assert world.clients[-1].number == 1, "refused in the end, and not reset"


def test_what_is_in_use_at_the_end_of_the_grace_is_said(world: World) -> None:
    world.clients = [Client(b"slow", 30.0, 999.0)]
    assert world.stop(10.0) == "a request or an answer on its way, on 1 connections"


def test_an_answer_of_a_long_case_is_waited_for_although_its_connection_was_silent(world: World) -> None:
    """The worker is idle two seconds before the client has its first byte."""
    idle_at, taken_at = 2200.0, 2202.0
    world.works = lambda now: now < idle_at
    world.answers = lambda: [
        {"modelName": "m", "modelVersion": "1", "workers": [{"pid": str(WORKER), "status": "READY"}]}
    ]
    world.case = lambda now: InUse(b"case", 10, 0, is_leaving=False) if now < taken_at else None
    assert world.stop(3000.0) == ""
    assert taken_at <= world.clock.now < taken_at + 5


def test_silence_counts_from_the_last_sign_of_life() -> None:
    exchanges = Exchanges()
    waiting, leaving = (InUse(b"one", 10, 0, is_leaving=leaves) for leaves in (False, True))
    assert len(exchanges.look([waiting], 0.0, working=True)) == 1
    assert len(exchanges.look([waiting], 1200.0, working=True)) == 1, "a worker is at it"
    assert len(exchanges.look([waiting], 1200.0 + STALLED_S - 1)) == 1
    assert len(exchanges.look([leaving], 1200.0 + STALLED_S + 1)) == 1, "its answer has begun to leave"
    assert exchanges.look([leaving], 1200.0 + 2 * STALLED_S + 1) == []


def test_one_slow_answer_of_the_management_api_ends_no_stop(world: World) -> None:
    world.works = lambda now: now < 1100
    answers = iter([ToolError("slow")])
    world.answers = lambda: next(answers, None if world.clock.now < 1100 else [])
    assert world.stop() == ""
    assert world.clock.now > 1100


def test_without_the_management_api_workers_and_kernel_are_believed(world: World) -> None:
    world.works = lambda now: now < 1100
    world.answers = lambda: ToolError("it does not answer")
    assert world.stop() == ""
    assert 1100 < world.clock.now < 1120


def test_a_second_signal_is_seen_while_the_management_api_is_silent(world: World) -> None:
    world.answers = lambda: None
    world.signals = 2
    assert world.stop()
    assert world.clock.now < 1002


def test_a_stop_without_room_for_its_order_goes_on_and_says_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stopping, "give_order", full)
    world.case = lambda now: InUse(b"case", 10, 0, is_leaving=False) if now < 1100 else None
    assert world.stop() == ""
    assert world.clock.now > 1100
    assert "No space left on device" in world.told[0]


@pytest.mark.parametrize("heard", [None, Report(7, idle=False, works=True, refused=0)])
def test_workers_that_cannot_report_do_not_hold_a_stop_up_beyond_their_clients(
    world: World, monkeypatch: pytest.MonkeyPatch, heard: Report | None
) -> None:
    """A disk that is full before their first report, or after one."""
    workers = [{"pid": str(pid), "status": "READY"} for pid in (1, 2, 3, 4)]
    said = {} if heard is None else dict.fromkeys((1, 2, 3, 4), heard)
    monkeypatch.setattr(stopping, "reports", lambda _: said)
    world.answers = lambda: [{"modelName": "m", "modelVersion": "1", "workers": workers}]
    world.case = lambda now: InUse(b"case", 10, 0, is_leaving=False) if now < 1200 else None
    assert world.stop(1000.0) == ""
    assert 1200 < world.clock.now < 1200 + 3 * stopping.PERIOD_S
    assert any("a full disk?" in line for line in world.told)


def test_workers_that_cannot_report_are_waited_for_where_the_kernel_does_not_tell_either(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "reports", lambda _: {})
    monkeypatch.setattr(connections, "in_use", lambda _: None)
    worker = {"pid": str(WORKER), "status": "READY"}
    world.answers = lambda: [{"modelName": "m", "modelVersion": "1", "workers": [worker]}]
    assert world.stop(100.0) == f"a request of m/1 with worker {WORKER}"
    assert world.clock.now > 1100


def test_a_worker_that_reports_again_is_believed_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It held Python's lock for long, and goes on with a case whose client's connection is silent."""

    def said(_: Path) -> dict[int, Report]:
        now = world.clock.now
        report = Report(int(now * 10), idle=now >= 1100, works=now < 1100, refused=0)
        return {WORKER: report} if now > 1040 else {}

    monkeypatch.setattr(stopping, "reports", said)
    world.case = lambda now: InUse(b"case", 10, 0, is_leaving=False) if now < 1101 else None
    worker = {"pid": str(WORKER), "status": "READY"}
    world.answers = lambda: [{"modelName": "m", "modelVersion": "1", "workers": [worker]}]
    assert world.stop(1000.0) == ""
    assert 1101 < world.clock.now < 1101 + 3 * stopping.PERIOD_S


def test_after_a_drain_a_stop_waits_for_those_whom_the_drain_told_to_come_again(world: World) -> None:
    (world.control / ORDERS / order_name(None)).write_text('{"retry_after_s": 20}')
    world.refused = 1
    world.clients = [Client(b"told", 1.0, 1015.0)]
    assert world.stop() == ""
    assert world.clients[0].number >= 1
    assert json.loads(world.order()) == {"together_s": stopping.PERIOD_S}
    assert math.isclose(world.clock.now, 1021, abs_tol=stopping.PERIOD_S)


def test_reports_of_older_archives_are_believed(tmp_path: Path) -> None:
    (tmp_path / REPORTS).mkdir()
    for pid, idle in ((1, True), (2, False)):
        (tmp_path / REPORTS / str(pid)).write_text(json.dumps({"report": 3, "idle": idle}))
    assert reports(tmp_path) == {1: Report(3, True, False, 0), 2: Report(3, False, True, 0)}


def test_a_read_only_state_directory_keeps_no_server_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ends:
        pid = 1
        ended = False

        def children(self, **_: bool) -> list[Any]:
            return []

        def terminate(self) -> None:
            self.ended = True

    def refuses(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    process = Ends()
    server = Server(str(tmp_path / "t"), "", "", "", [], "", str(tmp_path / "c"))
    monkeypatch.setattr(Server, "process", lambda _: process)
    monkeypatch.setattr(ending, "read_state", lambda _: server)
    monkeypatch.setattr(ending, "runs", lambda each: not each.ended)
    monkeypatch.setattr(Path, "touch", refuses)
    monkeypatch.setattr(Path, "unlink", refuses)
    assert ending.stop(tmp_path)
    assert process.ended


def is_there(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that can be stopped, as far as whoever stops it sees."""
    server = Server("", "http://127.0.0.1:1", "http://127.0.0.1:2", "", [], "", str(state_dir), ready=True)
    monkeypatch.setattr(Server, "process", lambda _: object())
    monkeypatch.setattr(stopping, "read_state", lambda _: server)
    monkeypatch.setattr(ending, "stop", lambda *_: True)


def test_after_a_second_signal_it_is_never_said_that_nothing_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_there(tmp_path, monkeypatch)
    monkeypatch.setattr(stopping._Stop, "run", lambda *_: "")
    assert stopping.stop_gracefully(tmp_path, hurry=lambda: True).lost
    assert not stopping.stop_gracefully(tmp_path).lost


@pytest.mark.parametrize(
    ("grace_s", "hurries", "is_told"),
    [(0.0, False, True), (300.0, True, False), (300.0, False, False)],
    ids=["the grace period is over", "a second signal", "clients that come again at once"],
)
def test_more_grace_is_proposed_to_whom_it_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_s: float, hurries: bool, is_told: bool
) -> None:
    is_there(tmp_path, monkeypatch)
    monkeypatch.setattr(stopping._Stop, "run", lambda *_: "a request")
    monkeypatch.setattr(stopping._Stop, "let_workers_go", lambda *_: None)
    outcome = stopping.stop_gracefully(tmp_path, grace_s, hurry=lambda: hurries)
    with pytest.raises(Lost) as told:
        servers._say_what_was_lost(outcome)
    assert ("--grace" in str(told.value)) == is_told
