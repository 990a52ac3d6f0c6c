"""Verdicts on what a management API says; a real server's are in tests/serve/test_foreground.py."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nnunet_torchserve.draining import ORDERS, order_name
from nnunet_torchserve.engine.folder import SOCKET, listen, take_life_lock
from nnunet_torchserve.engine.roster import ENGINES
from nnunet_torchserve_tools import health
from nnunet_torchserve_tools.health import Health
from nnunet_torchserve_tools.probes import Probe, Verdict
from nnunet_torchserve_tools.server import Server, read_state
from support.chaos import wait_for

Models = dict[tuple[str, str], list[tuple[int, str]]]


@dataclass
class Site:
    """A state directory, a process that stands for the JVM, and what its API says.

    Attributes:
        models: by name and version, the number and the status of each worker; that process stands for number 1 too, and
            this one for number 2.
    """

    state_dir: Path
    jvm: subprocess.Popen[bytes]
    models: Models = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)
    health: Health = field(init=False)

    @property
    def control(self) -> Path:
        return self.state_dir / "control"

    def listing(self, path: str) -> Any:
        if path.startswith("/models?"):
            return {"models": [{"modelName": name} for name in dict.fromkeys(name for name, _ in self.models)]}
        wanted = path.split("/")[2]
        return [
            {
                "modelName": name,
                "modelVersion": version,
                "workers": [
                    {"id": str(n), "pid": (self.jvm.pid, os.getpid())[n - 1], "status": status} for n, status in workers
                ],
            }
            for (name, version), workers in self.models.items()
            if name == wanted
        ]

    def ask(self, probe: Probe = Probe.READY) -> Verdict:
        """Look, and judge."""
        self.health.look()
        return self.health.verdict(probe)


PATIENCE_S = 120.0
"""Of each look, for what answers: a machine that does much else is not what these tests are about."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in ("ANSWER_S", "DESCRIPTION_S", "HELLO_S"):
        monkeypatch.setattr(health, name, PATIENCE_S)
    mark = f"-Djava.io.tmpdir={tmp_path / 'tmp'}"
    jvm = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()", mark], stdin=subprocess.PIPE)
    site = Site(tmp_path, jvm)
    site.answers.set()

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            if self.path.endswith("/all"):
                site.answers.wait()
            body = json.dumps(site.listing(self.path)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    for name in (ORDERS, ENGINES):
        (site.control / name).mkdir(parents=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as api:
        threading.Thread(target=api.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{api.server_port}"
        server = Server(str(tmp_path / "tmp"), url, url, url, ["m"], str(tmp_path), str(site.control), ready=True)
        server.write(tmp_path)
        with closing(Health(tmp_path)) as site.health:
            yield site
        api.shutdown()
    jvm.communicate()


READY, GONE = "READY", "UNLOADED"


@pytest.mark.parametrize(
    ("models", "detail"),
    [
        ({}, "there is no model"),
        ({("m", "1.0"): [(1, READY), (2, GONE)]}, "1 of 2 workers of m/1.0 are READY"),
        ({("m", "1.0"): [(1, READY)], ("n", "1.0"): [(2, GONE)]}, "0 of 1 workers of n/1.0 are READY"),
        ({("m", "1.0"): []}, "m has no workers"),
    ],
)
def test_every_worker_of_every_model_must_be_ready(models: Models, detail: str, site: Site) -> None:
    site.models = models
    assert site.ask() == Verdict(False, "workers", detail)
    assert site.ask(Probe.LIVE).ok, "TorchServe may start them"


def test_an_old_version_without_workers_is_nobodys_loss(site: Site) -> None:
    site.models = {("m", "1.0"): [], ("m", "2.0"): [(1, READY)]}
    assert site.ask().ok


@pytest.mark.parametrize(
    ("orders", "detail"),
    [
        ([order_name(None)], "every model is being drained"),
        ([order_name("m")], "m is being drained"),
        ([order_name("m", "1.0"), order_name("m", "2.0")], "m is being drained"),
        ([order_name("m", "1.0")], None),
        ([order_name("other")], None),
    ],
)
def test_a_model_that_takes_requests_in_one_version_is_not_drained(
    orders: list[str], detail: str | None, site: Site
) -> None:
    site.models = {("m", "1.0"): [(1, READY)], ("m", "2.0"): [(2, READY)]}
    for name in orders:
        (site.control / ORDERS / name).write_text("{}")
    verdict = site.ask()
    assert (verdict.ok, verdict.code) == ((True, "ok") if detail is None else (False, "draining"))
    assert detail in (None, verdict.detail)
    assert site.ask(Probe.LIVE).ok


def test_a_model_without_a_worker_for_longer_than_torchserve_tries_is_a_reason_to_restart(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.models = {("m", "1.0"): [(1, READY), (2, GONE)]}
    assert site.ask(Probe.LIVE).ok
    monkeypatch.setattr(health, "AWAY_S", 0.0)
    assert site.ask(Probe.LIVE).ok, "the other one works; a restart would cut what it has"
    assert not site.ask().ok
    site.models = {("m", "1.0"): [(1, GONE), (2, GONE)]}
    site.ask(Probe.LIVE)
    verdict = site.ask(Probe.LIVE)
    assert (verdict.ok, verdict.code) == (False, "workers")
    assert "every worker of m/1.0 has been away for" in verdict.detail
    site.models = {("m", "1.0"): [(1, READY)]}  # it was scaled away
    assert site.ask(Probe.LIVE).ok


def test_what_is_not_known_any_more_kills_no_server(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker was READY when the JVM last said so; since then it says nothing, as where nvidia-smi hangs."""
    monkeypatch.setattr(health, "AWAY_S", 0.2)
    site.models = {("m", "1.0"): [(1, GONE)]}
    assert site.ask(Probe.LIVE).ok
    monkeypatch.setattr(health, "DESCRIPTION_S", 0.05)
    site.answers.clear()
    began = time.monotonic()
    while time.monotonic() < began + 0.3:
        assert site.ask(Probe.LIVE).ok
    site.answers.set()
    monkeypatch.setattr(health, "DESCRIPTION_S", PATIENCE_S)
    wait_for(lambda: site.ask(Probe.LIVE).code == "workers")  # now it has said it


def test_a_jvm_whose_description_hangs_is_not_asked_for_another(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU machine it runs nvidia-smi, and holds a thread of the JVM for as long as that hangs."""
    monkeypatch.setattr(health, "DESCRIPTION_S", 0.05)
    site.models = {("m", "1.0"): [(1, READY)]}
    site.answers.clear()

    def descriptions() -> int:
        return sum(path.endswith("/all") for path in site.asked)

    assert site.ask(Probe.LIVE).ok
    wait_for(lambda: descriptions() == 1)
    for _ in range(5):
        assert site.ask(Probe.LIVE).ok
    assert descriptions() == 1
    site.answers.set()
    monkeypatch.setattr(health, "DESCRIPTION_S", PATIENCE_S)
    assert site.ask().ok
    assert site.ask().ok


def test_a_server_whose_start_has_not_ended_is_live_and_not_ready(site: Site) -> None:
    server = read_state(site.state_dir)
    assert server is not None
    replace(server, ready=False).write(site.state_dir)
    assert site.ask(Probe.LIVE).code == "loading"
    assert site.ask() == Verdict(False, "loading", "TorchServe is being started")


def test_without_its_jvm_a_server_is_nothing(site: Site) -> None:
    site.models = {("m", "1.0"): [(1, READY)]}
    assert site.ask().ok
    site.jvm.communicate()
    for probe in Probe:
        assert site.ask(probe) == Verdict(False, "front_end", "the JVM is not running")


def test_an_engine_that_hangs_does_not_count_and_one_of_several_devices_is_enough(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.models = {("m", "1.0"): [(1, READY), (2, READY)]}
    folders = {pid: tmp_path / f"engine of {pid}" for pid in (site.jvm.pid, os.getpid())}
    for number, (pid, folder) in enumerate(folders.items()):
        folder.mkdir()
        take_life_lock(folder)
        roster = site.control / ENGINES / str(pid)
        roster.write_text(json.dumps({"folder": str(folder), "device": f"cuda:{number}"}))
    sockets = [listen(folder / SOCKET) for folder in folders.values()]
    with sockets[0], sockets[1]:
        monkeypatch.setattr(health, "HELLO_S", 0.05)
        assert site.ask() == Verdict(False, "engine", "no engine of m/1.0 on cuda:0 and cuda:1 says hello")
        over = threading.Event()
        greeting = threading.Thread(target=greet, args=(sockets[1], over))
        greeting.start()
        monkeypatch.setattr(health, "HELLO_S", 0.5)  # for which the other one is waited for each time
        wait_for(lambda: site.ask().ok)
        over.set()
        greeting.join()


def greet(listener: socket.socket, over: threading.Event) -> None:
    """Say hello to each connection, as an engine does."""
    listener.settimeout(0.02)
    while not over.is_set():
        with suppress(TimeoutError, BrokenPipeError):
            endpoint, _ = listener.accept()
            with endpoint:
                endpoint.send(b'{"kind": "hello"}')
