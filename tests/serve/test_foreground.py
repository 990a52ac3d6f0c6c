"""``serve --foreground``: what its probes say, and a stop under load that loses nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.faults import Entry, LoadFails
from nnunet_torchserve_tools import drain, health, launcher
from nnunet_torchserve_tools.health import ANSWER_S, Health
from nnunet_torchserve_tools.probes import Probe
from support.chaos import Case, ChaosServer, has_ended, wait_for
from support.foreground import Clients, Foreground, foreground
from support.server import LiveServer

pytestmark = pytest.mark.serve

WORKERS, QUEUE, CLIENTS = 2, 10, 8
MODEL = "mine/1.0"
SLOW = Case((40, 44, 12))
"""It can be held."""

LOAD = Case((40, 38, 6))
SLOW_BYTES, SLOW_BYTE_S = 25, 0.15
"""The end of an upload over a slow line."""

AT_ONCE_S = 1.0
"""Within which a probe is answered, whatever goes on; on a machine that does much else, not each of them."""


@dataclass
class Served:
    """The server of this file, and what its probes said before it was ready."""

    serve: Foreground
    broken: Path
    while_loading: tuple[tuple[int, str], tuple[int, str]]
    line: str

    @property
    def chaos(self) -> ChaosServer:
        return self.serve.chaos()

    @property
    def live(self) -> LiveServer:
        return self.chaos.live


@pytest.fixture(scope="module")
def served(
    archive_of: Callable[[str], Path], unpacked: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("foreground")
    member = ModelBundle(unpacked("flat")).lead
    broken = folder / "broken"
    faults: list[Entry] = [SLOW.held(member, folder), LoadFails(while_exists=broken)]
    arguments = ["--models", "mine=flat.mar", "--workers", str(WORKERS), "--queue", str(QUEUE)]
    evil = folder / "evil"
    (evil / "nnunet_torchserve").mkdir(parents=True)
    environment = {"PYTHONPATH": str(evil), "HOME": str(folder / "nowhere")}
    with foreground(archive_of("flat").parent, folder, *arguments, faults=faults, environment=environment) as serve:
        first: dict[str, tuple[int, str]] = {}

        def both_answer() -> bool:
            try:
                for probe in ("live", "ready"):
                    status, document, _ = serve.ask(probe)
                    first.setdefault(probe, (status, document["code"]))
            except httpx.TransportError:
                assert serve.process.poll() is None, serve.process.communicate()
                return False
            return True

        wait_for(both_answer)
        line = serve.wait_until_ready()
        yield Served(serve, broken, (first["live"], first["ready"]), line)


def command(*arguments: str) -> tuple[int, str]:
    """Exit code of the command, and what it said."""
    health = [sys.executable, "-m", "nnunet_torchserve_tools.cli", "health", *arguments]
    done = subprocess.run(health, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_server_that_loads_is_live_and_not_ready(served: Served) -> None:
    assert served.while_loading == ((200, "loading"), (503, "loading"))


def test_a_server_is_ready_when_every_worker_is(served: Served) -> None:
    assert served.line == f"ready {served.live.server.inference_url} mine\n"
    detail = f"{WORKERS} workers of {MODEL} are READY"
    document = served.serve.comes_to_say("ready", 200, "ok")
    assert document == {"status": 200, "title": "OK", "code": "ok", "detail": detail}
    wait_for(lambda: command("--state-dir", str(served.serve.state_dir)) == (0, f"{detail}\n"))

    def is_live() -> bool:
        code, said = command("--live", "--json", "--url", served.serve.health_url)
        detail = json.loads(said)["detail"]
        return (code, detail) == (0, "the JVM answers, and no model has lost every worker")

    wait_for(is_live)


def test_with_every_worker_busy_and_the_queue_full_probes_are_answered_at_once(served: Served) -> None:
    chaos = served.chaos
    before = received(chaos.live)
    with ThreadPoolExecutor(WORKERS + QUEUE) as pool:
        with chaos.held():
            asked = [pool.submit(chaos.live.predict, "mine", SLOW.body, options=SLOW.options) for _ in range(WORKERS)]
            wait_for(lambda: received(chaos.live) == before + WORKERS)
            others = [pool.submit(chaos.live.predict, "mine", b"no image") for _ in range(QUEUE)]
            wait_for(lambda: pending(chaos.live) == QUEUE)
            assert chaos.live.predict("mine", LOAD.body).status_code == 503, "the queue is full"
            for probe in ("live", "ready"):
                served.serve.comes_to_say(probe, 200, "ok", AT_ONCE_S)
            assert not any(each.done() for each in asked)
        assert {answer.result().status_code for answer in asked} == {200}
        assert {answer.result().status_code for answer in others} == {415}


def received(live: LiveServer) -> int:
    """Requests that TorchServe has handed to a worker so far."""
    return (Path(live.server.log_dir) / "model_log.log").read_text().count("Backend received inference")


def pending(live: LiveServer) -> int:
    """Requests in TorchServe's queue."""
    answer = httpx.get(f"{live.server.management_url}/models/mine", timeout=300, trust_env=False)
    return int(answer.json()[0]["jobQueueStatus"]["pendingRequests"])


def test_a_drained_server_is_live_and_not_ready(served: Served) -> None:
    target = drain.find_target(served.serve.state_dir, None, "mine")
    drain.drain(target, 300, 1)
    try:
        served.serve.comes_to_say("live", 200, "ok")
        document = served.serve.comes_to_say("ready", 503, "draining")
        assert document["detail"] == "mine is being drained"
        wait_for(
            lambda: command("--state-dir", str(served.serve.state_dir), "--ready") == (1, "mine is being drained\n")
        )
    finally:
        drain.resume(target)
    served.serve.comes_to_say("ready", 200, "ok")


def test_without_an_engine_a_server_is_not_ready_and_becomes_so_again_although_nobody_asks(served: Served) -> None:
    served.broken.touch()
    served.chaos.engine("flat/1.0").kill()
    document = served.serve.comes_to_say("ready", 503, "engine")  # it is dead some time after it was killed
    assert document["detail"] == f"no engine of {MODEL} on cpu says hello"
    served.serve.comes_to_say("live", 200, "ok")  # a restart of the server would mend nothing
    served.broken.unlink()
    wait_for(lambda: served.serve.says("ready", "ok"))
    assert served.live.predict("mine", LOAD.body, options=LOAD.options).status_code == 200


@pytest.mark.long  # tests/tools/test_health.py has it without a server
def test_a_worker_that_is_gone_is_noticed_and_for_good_is_a_reason_to_restart(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "AWAY_S", 0.0)
    with closing(Health(served.serve.state_dir)) as impatient:

        def says(code: str) -> bool:
            impatient.look_at_front_end()
            impatient.look_at_workers()
            return impatient.verdict(Probe.LIVE).code == code

        assert says("ok")
        for worker in served.live.workers("mine"):
            worker.kill()
        wait_for(lambda: served.serve.says("ready", "workers"))
        wait_for(lambda: says("workers"))
        assert served.serve.ask("live")[0] == 200, "TorchServe starts another"
        wait_for(lambda: served.serve.says("ready", "ok"))
        assert says("ok")


def test_a_jvm_that_stands_still_is_neither_live_nor_ready_and_that_is_said_within_a_second(served: Served) -> None:
    jvm = served.live.server.process()
    assert jvm is not None
    jvm.suspend()
    try:
        for probe in ("live", "ready"):
            document = served.serve.comes_to_say(probe, 503, "front_end", AT_ONCE_S + ANSWER_S)
            assert "does not answer" in document["detail"] or "has not answered" in document["detail"]
    finally:
        jvm.resume()
    served.serve.comes_to_say("live", 200, "ok")
    served.serve.comes_to_say("ready", 200, "ok")


@contextmanager
def uploading(server: launcher.Server) -> Iterator[socket.socket]:
    """A connection with a request on it whose last bytes are missing."""
    address = urlsplit(server.inference_url)
    head = f"POST /predictions/mine HTTP/1.1\r\nHost: here\r\nContent-Length: {len(LOAD.body)}\r\n"
    head += f"X-Nnunet-Options: {LOAD.options}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=300) as connection:
        connection.sendall(head.encode() + LOAD.body[:-SLOW_BYTES])
        yield connection


def test_a_stop_under_load_loses_nothing(served: Served) -> None:
    """The last test of this file: it ends the server."""
    chaos, serve = served.chaos, served.serve
    server = chaos.live.server
    jvm = server.process()
    assert jvm is not None
    family = [jvm, *jvm.children(recursive=True)]
    alone = chaos.live.predict("mine", SLOW.body, options=SLOW.options).content
    clients = Clients(f"{server.inference_url}/predictions/mine", LOAD.body, LOAD.options)
    before = received(chaos.live)
    with ThreadPoolExecutor(CLIENTS + WORKERS) as pool, uploading(server) as upload:
        with chaos.held():
            slow = [pool.submit(chaos.live.predict, "mine", SLOW.body, options=SLOW.options) for _ in range(WORKERS)]
            wait_for(lambda: received(chaos.live) == before + WORKERS)
            running = [pool.submit(clients.run) for _ in range(CLIENTS)]
            wait_for(lambda: pending(chaos.live) == CLIENTS)
            serve.signal()
            wait_for(lambda: serve.says("ready", "stopping"))
            serve.comes_to_say("live", 200, "ok")  # it is not to be killed while it finishes
            assert serve.process.stderr is not None
            first = next(line for line in iter(serve.process.stderr.readline, "") if "stopping" in line)
            assert "stopping; first, a request of mine/1.0 with worker " in first, "warnings may stand before it"
            assert not any(each.done() for each in slow)
        released = time.monotonic()
        for answer in slow:
            answer.result()
        for byte in LOAD.body[-SLOW_BYTES:]:  # in the time that everything else needs to end
            upload.sendall(bytes([byte]))
            time.sleep(SLOW_BYTE_S)
        assert upload.recv(2**16).startswith(b"HTTP/1.1 503"), "refused, and not reset"
        code, said = serve.end()
        took = time.monotonic() - released
        assert [(each.result().status_code, each.result().content) for each in slow] == [(200, alone)] * WORKERS
        for each in running:
            each.result()
    assert code == 0, said
    assert clients.lost == []
    assert clients.answers == [], "whoever waited in the queue was refused"
    assert clients.refused >= CLIENTS
    assert clients.turned_away == CLIENTS, "each found the port closed in the end"
    assert took < server.response_timeout_s / 4, "which is the time that it has"
    assert not [process for process in family if not has_ended(process)]
    assert not Path(server.temp_dir).exists()
    assert launcher.read_state(serve.state_dir) is None
