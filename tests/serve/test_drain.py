"""Scaling down, and replacing a version, without a lost request: a drain comes first."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve_tools import drain
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import ToolError, UsageError
from support.chaos import PATIENCE_S, Case, ChaosServer, serving, wait_for
from support.server import LiveServer

pytestmark = pytest.mark.serve

WORKERS = 2
CLIENTS = 4
"""No more than one worker and TorchServe's queue (twice the workers) hold: it refuses others without Retry-After."""

RETRY_AFTER_S = 3000
"""Longer than any change takes: a worker that is scaled away while it refuses somebody loses that request."""

SLOW = Case((40, 44, 12))
"""It can be held."""

LOAD = Case((40, 38, 6))
"""Half a second in the engine, and hardly any work: whoever starts meanwhile is not slowed down."""


@dataclass
class Load:
    """Clients that send one request after another, and repeat those that are refused with Retry-After only.

    That time is over when :meth:`passes` says so.
    """

    server: LiveServer
    answers: list[bytes] = field(default_factory=list)
    refused: int = 0
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _over: threading.Condition = field(default_factory=threading.Condition)
    _passed: int = 0

    def client(self) -> None:
        with httpx.Client(base_url=self.server.server.inference_url, timeout=600, trust_env=False) as client:
            while not self._stop.is_set():
                self._one(client)

    def _one(self, client: httpx.Client) -> None:
        while True:
            passed = self._passed
            try:
                answer = client.post("/predictions/flat", content=LOAD.body, headers={"X-Nnunet-Options": LOAD.options})
            except httpx.HTTPError as error:
                self.lost.append(type(error).__name__)
                return
            if answer.status_code == 200:
                self.answers.append(answer.content)
                return
            if answer.status_code != 503 or "retry-after" not in answer.headers:
                self.lost.append(f"{answer.status_code} {answer.text[:200]}")
                return
            self.refused += 1
            assert answer.json()["code"] == "draining"
            with self._over:
                self._over.wait_for(lambda: self._passed > passed, float(answer.headers["retry-after"]))  # noqa: B023
            if self._stop.is_set():
                return

    def passes(self) -> None:
        """The time after which those that were refused so far come again is over."""
        with self._over:
            self._passed += 1
            self._over.notify_all()

    def stop(self) -> None:
        self._stop.set()
        self.passes()

    def goes_on(self, answers: int = CLIENTS) -> None:
        """Wait for so many answers more."""
        wanted, deadline = len(self.answers) + answers, time.monotonic() + 3000
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, "the server answers no more"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def chaos(
    models: dict[str, Path],
    archive_of: Callable[[str], Path],
    unpacked: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ChaosServer]:
    store = tmp_path_factory.mktemp("store")
    shutil.copy(archive_of("flat"), store)
    [second] = make_archives(ArchiveRequest(models["flat"], store / "new", name="flat", version="2.0"))
    second.rename(store / "flat-2.0.mar")
    member = ModelBundle(unpacked("flat")).lead
    folder = tmp_path_factory.mktemp("state")
    faults = [SLOW.held(member, folder), LOAD.slow(member, pass_s=0.02)]
    with serving(store, folder, faults, models=["flat.mar"], workers=WORKERS) as server:
        yield server


@pytest.fixture
def live(chaos: ChaosServer) -> LiveServer:
    return chaos.live


def manage(live: LiveServer, method: str, path: str, **parameters: object) -> None:
    answer = httpx.request(
        method, live.server.management_url + path, params={k: str(v) for k, v in parameters.items()},
        timeout=600, trust_env=False,
    )  # fmt: skip
    assert answer.is_success, answer.text


def test_scaling_and_a_new_version_lose_no_request_under_load(live: LiveServer) -> None:
    load = Load(live)
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(load.client) for _ in range(CLIENTS)]
        try:
            load.goes_on()
            whole = drain.find_target(live.state_dir, None, "flat")
            drain.drain(whole, 300, RETRY_AFTER_S)
            wait_for(lambda: load.refused == CLIENTS)
            manage(live, "PUT", "/models/flat", min_worker=1, max_worker=1, synchronous="true")
            drain.resume(whole)
            load.passes()
            load.goes_on()
            assert len(live.workers("flat")) == 1
            manage(live, "PUT", "/models/flat", min_worker=WORKERS, max_worker=WORKERS, synchronous="true")
            load.goes_on()
            manage(live, "POST", "/models", url="flat-2.0.mar", initial_workers=1, synchronous="true")
            manage(live, "PUT", "/models/flat/2.0/set-default")
            old = drain.find_target(live.state_dir, None, "flat/1.0")
            drain.drain(old, 300, RETRY_AFTER_S)
            manage(live, "DELETE", "/models/flat/1.0")
            load.passes()
            load.goes_on()
        finally:
            load.stop()
        for client in clients:
            client.result()
    assert load.lost == []
    assert len(set(load.answers)) == 1, "both versions hold the same weights"


def test_a_drained_model_refuses_and_says_when_to_come_again(live: LiveServer) -> None:
    target = drain.find_target(live.state_dir, None, None)
    drain.drain(target, 300, 7)
    try:
        answer = live.predict("flat", LOAD.body, options=LOAD.options)
        assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "draining", "7")
        assert "come again" in answer.json()["detail"]
        description = live.predict("flat", options='{"describe": true}')
        assert description.status_code == 200
        assert [model["version"] for model in description.json()["served"]] == ["1.0"], "2.0 was registered later"
    finally:
        assert drain.resume(target)
    assert not drain.resume(target)
    assert live.predict("flat", LOAD.body, options=LOAD.options).status_code == 200


def test_a_drain_waits_for_what_is_in_flight_and_says_so_when_it_cannot(live: LiveServer, chaos: ChaosServer) -> None:
    target = drain.find_target(live.state_dir, live.server.management_url, "flat")
    before = received(live)
    with ThreadPoolExecutor(1) as pool:
        try:
            with chaos.held():
                slow = pool.submit(live.predict, "flat", SLOW.body, options=SLOW.options)
                wait_for(lambda: received(live) > before)
                with pytest.raises(ToolError, match=r"still has a request .* takes no new requests"):
                    drain.drain(target, 0.0)
                assert not slow.done()
            drain.drain(target, 300)
            assert slow.result(timeout=PATIENCE_S).status_code == 200
        finally:
            drain.resume(target)


def received(live: LiveServer) -> int:
    """Requests that TorchServe has handed to a worker so far."""
    return (Path(live.server.log_dir) / "model_log.log").read_text().count("Backend received inference")


def test_drain_and_resume_from_the_command_line(live: LiveServer) -> None:
    command = [sys.executable, "-m", "nnunet_torchserve_tools.cli"]
    where = ["--model", "flat", "--management-url", live.server.management_url]
    drained = subprocess.run(
        [*command, "drain", *where, "--timeout", "300"], capture_output=True, text=True, timeout=600, check=False
    )
    assert (drained.returncode, drained.stdout[:12]) == (0, "drained flat"), drained.stderr
    assert live.predict("flat", LOAD.body, options=LOAD.options).status_code == 503
    resumed = subprocess.run([*command, "resume", *where], capture_output=True, text=True, timeout=600, check=False)
    assert (resumed.returncode, resumed.stdout) == (0, "resumed flat\n")
    assert live.predict("flat", LOAD.body, options=LOAD.options).status_code == 200


def test_what_cannot_be_drained_is_named(live: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model nothing"):
        drain.find_target(live.state_dir, None, "nothing")
    with pytest.raises(UsageError, match="no server of"):
        drain.find_target(tmp_path, None, None)
    with pytest.raises(UsageError, match="no server of this machine"):
        drain.find_target(live.state_dir, "http://127.0.0.1:9", None)
