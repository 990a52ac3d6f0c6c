"""``serve --foreground`` as a process of its own, and clients that keep to what a server tells them."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from nnunet_torchserve.engine.faults import Entry
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE
from nnunet_torchserve_tools import launcher

from . import warm
from .chaos import HOLD, ChaosServer, wait_for
from .ports import free_port, free_ports
from .server import LiveServer


@dataclass
class Foreground:
    """A running ``serve --foreground``."""

    process: subprocess.Popen[str]
    state_dir: Path
    runtime: Path
    health_url: str

    def ask(self, probe: str) -> tuple[int, dict[str, Any], float]:
        """Status, document and seconds of a probe's answer."""
        with httpx.Client(timeout=120, trust_env=False) as client:  # which takes a while to make
            began = time.monotonic()
            answer = client.get(f"{self.health_url}/{probe}")
            took = time.monotonic() - began
        return answer.status_code, answer.json(), took

    def comes_to_say(self, probe: str, status: int, code: str, within_s: float = math.inf) -> dict[str, Any]:
        """The document of an answer that is this one and came in so many seconds; others are asked for again.

        On a machine that does much else the JVM may not answer in time, so that a probe says that for a moment, or is
        cut because it took too long.
        """
        found: dict[str, Any] = {}

        def is_said() -> bool:
            nonlocal found
            try:
                given, found, seconds = self.ask(probe)
            except httpx.TransportError:
                return False
            return (given, found["code"]) == (status, code) and seconds < within_s

        wait_for(is_said)
        return found

    def says(self, probe: str, code: str) -> bool:
        """Whether that is the code of a probe's answer; there may be none for a moment."""
        try:
            return bool(self.ask(probe)[1]["code"] == code)
        except httpx.TransportError:
            return False

    def chaos(self) -> ChaosServer:
        """The server, as chaos sees it; it must be ready."""
        server = launcher.read_state(self.state_dir)
        assert server is not None
        return ChaosServer(LiveServer(server, self.state_dir), self.runtime, holds=True)

    def wait_until_ready(self) -> str:
        """The line that says so."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), self.process.stderr and self.process.stderr.read()
        return line

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to ``serve`` alone."""
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit code, and what it said on stderr."""
        _, said = self.process.communicate(timeout=600)
        return self.process.returncode, said


@contextmanager
def foreground(
    store: Path,
    folder: Path,
    *arguments: str,
    faults: Sequence[Entry] = (),
    wrapper: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    python: Path | None = None,
) -> Iterator[Foreground]:
    """Start one on free ports, and leave nothing of it; returns before it is ready.

    Args:
        store: the model store.
        folder: for everything that it writes.
        arguments: of ``serve``.
        faults: for its engines.
        wrapper: what runs it.
        environment: beside this process's.
        python: that runs it; ``None``: one whose engines are :mod:`.warm`.
    """
    ports, health = free_ports(), free_port()
    command = [*wrapper, str(python or warm.python()), "-m", "nnunet_torchserve_tools.cli", "serve", "--foreground"]
    command += ["--device", "cpu", "--heap", "512", "--model-store", str(store), "--state-dir", str(folder / "state")]
    command += ["--inference-port", str(ports.inference), "--management-port", str(ports.management)]
    command += ["--metrics-port", str(ports.metrics), "--grpc-inference-port", str(ports.grpc_inference)]
    command += ["--grpc-management-port", str(ports.grpc_management), "--health-port", str(health), *arguments]
    variables = dict(os.environ) | {RUNTIME_DIR_VARIABLE: str(folder / "run")} | dict(environment or {})
    if faults:
        command.append("--testing")
        variables[FAULTS_VARIABLE] = json.dumps([each.model_dump(mode="json") for each in faults])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        yield Foreground(process, folder / "state", folder / "run", f"http://127.0.0.1:{health}")
    finally:
        process.kill()
        process.communicate()
        (folder / HOLD).unlink(missing_ok=True)
        launcher.stop(folder / "state")


@dataclass
class Clients:
    """Clients that send one request after another and come again when they are told to, until nobody is there.

    Attributes:
        url: of the model.
        body: the image that they send.
        options: as JSON.
        answers: to requests that were served.
        seconds: from sending to the answer of each of them.
        refused: how many were told to come again.
        turned_away: whose connection was refused: nothing of them was sent.
        lost: everything else, in words.
    """

    url: str
    body: bytes
    options: str
    answers: list[bytes] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    turned_away: int = 0
    lost: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Be one of them; each request has a connection of its own, as behind a balancer that closes them."""
        while not self._stop.is_set() and self._one():
            pass

    def stop(self) -> None:
        """Let them go after their answers."""
        self._stop.set()

    def _one(self) -> bool:
        headers = {"X-Nnunet-Options": self.options}
        began = time.monotonic()
        try:
            with httpx.Client(timeout=600, trust_env=False, verify=False) as client:  # noqa: S501 (plain http, at once)
                answer = client.post(self.url, content=self.body, headers=headers)
        except httpx.ConnectError:
            self.turned_away += 1
            return False
        except httpx.HTTPError as error:
            self.lost.append(type(error).__name__)
            return False
        if answer.status_code == httpx.codes.OK:
            self.answers.append(answer.content)
            self.seconds.append(time.monotonic() - began)
        elif answer.status_code == httpx.codes.SERVICE_UNAVAILABLE and "retry-after" in answer.headers:
            self.refused += 1
            self._stop.wait(float(answer.headers["retry-after"]))
        else:
            self.lost.append(f"{answer.status_code} {answer.text[:200]}")
            return False
        return True
