"""The server's container as the chart has it, its command, configuration, probes and hook, run on this machine.

Only paths and ports are this machine's. What a cluster adds (users, limits, a Service) is tested on one.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest
import typer

from nnunet_torchserve_tools.cli import app
from support.bad_requests import FAST, GOOD
from support.chaos import wait_for
from support.charts import Values, serve
from support.ports import free_port, free_ports

CLIENTS = 4

EVERYTHING: Values = {
    "metrics": {"enabled": True},
    "management": {"enabled": True},
    "server": {"workers": 2, "queue": 4, "bodyLimitMiB": 64, "heapMiB": 2048},
}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
def test_the_command_line_takes_the_containers_arguments(values: Values) -> None:
    container = serve(values).container()
    program, verb = container["command"]
    assert program == "nnunet-torchserve"
    command = typer.main.get_command(app)
    parsed = command.commands[verb].make_context(verb, list(container["args"])).params  # type: ignore[attr-defined]
    assert parsed["foreground"] is True
    assert parsed["grace"] > 1200
    assert parsed["ready_timeout"] == 210


def test_a_pod_with_nginx_refuses_what_nginx_still_brings_while_it_waits_for_its_end() -> None:
    container = serve({"proxy": {"enabled": True, "tls": {"secretName": "tls"}}}).container()
    words = shlex.split(container["lifecycle"]["preStop"]["exec"]["command"][-1].split(";")[1])
    assert words[:2] == ["nnunet-torchserve", "drain"]
    command = typer.main.get_command(app)
    parsed = command.commands["drain"].make_context("drain", words[2:]).params  # type: ignore[attr-defined]
    [state_dir] = [each.partition("=")[2] for each in container["args"] if each.startswith("--state-dir=")]
    assert (str(parsed["state_dir"]), parsed["timeout"], parsed["retry_after"]) == (state_dir, 0, 1)


@pytest.mark.parametrize(
    ("values", "times"),
    [({}, 3), ({"workers": 4, "queue": 1}, 2), ({"workers": 2, "queue": 9}, 6), ({"queue": 16}, 5)],
)
def test_nginx_waits_for_a_request_as_long_as_it_may_wait_in_the_queue(values: Values, times: int) -> None:
    proxied = serve({"proxy": {"enabled": True, "tls": {"secretName": "tls"}}, "server": values})
    text = proxied.kind("ConfigMap", "-proxy")["data"]["nginx.conf"]
    assert f"proxy_read_timeout {times * 1200 + 60}s;" in text


@dataclass(frozen=True)
class Pod:
    """The container's process and where it is reached."""

    process: subprocess.Popen[bytes]
    inference: str
    health: str
    hook: str
    environment: dict[str, str]
    probes: dict[str, str]

    def probe(self, name: str) -> int:
        """The status that the kubelet would see; 0 if nothing answers."""
        try:
            return httpx.get(f"{self.health}{self.probes[name]}", timeout=30, trust_env=False).status_code
        except httpx.TransportError:
            return 0


@pytest.fixture(scope="module")
def pod(archive_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    rendered = serve({"models": {"serve": ["five_folds.mar"]}, "server": {"workers": 2, "heapMiB": 1024}})
    container = rendered.container()
    folder = tmp_path_factory.mktemp("pod")
    for name in ("config", "state", "run"):
        (folder / name).mkdir()
    (folder / "config" / "config.properties").write_text(rendered.kind("ConfigMap")["data"]["config.properties"])
    ports = free_ports()
    here = {
        "/models": str(archive_of("five_folds").parent),
        "/etc/nnunet-torchserve/config": str(folder / "config"),
        "/var/lib/nnunet-torchserve": str(folder / "state"),
        "/run/nnunet-torchserve": str(folder / "run"),
    }
    own = {"inference": ports.inference, "management": ports.management, "metrics": ports.metrics}
    own |= {"grpc-inference": ports.grpc_inference, "grpc-management": ports.grpc_management}
    with tempfile.TemporaryDirectory() as short:
        environment = os.environ | {each["name"]: moved(each["value"], here) for each in container["env"]}
        environment |= {"TMPDIR": short, "HOME": short, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        health = free_port()
        arguments = [
            moved(each, here).replace("health-port=8083", f"health-port={health}").replace("0.0.0.0", "127.0.0.1")
            for each in container["args"]
            if not each.startswith("--inference-port")
        ]
        arguments += [f"--{name}-port={port}" for name, port in own.items()]
        command = [str(Path(sys.executable).parent / container["command"][0]), container["command"][1], *arguments]
        hook = moved(container["lifecycle"]["preStop"]["exec"]["command"][-1], here).replace("sleep 5;", "")
        probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, env=environment, cwd=folder / "state", stdout=log, stderr=log) as process,
        ):
            url = f"http://127.0.0.1:{ports.inference}"
            pod = Pod(process, url, f"http://127.0.0.1:{health}", hook, environment, probes)

            def started() -> bool:
                assert process.poll() is None, (folder / "log").read_text()
                return pod.probe("startup") == HTTPStatus.OK

            try:
                wait_for(started)
                yield pod
            finally:
                process.terminate()


def moved(text: str, here: dict[str, str]) -> str:
    for there, place in here.items():
        text = text.replace(there, place)
    return text


@pytest.mark.long  # tests/serve has the stop itself; this is the chart's hook and probes
@pytest.mark.serve
def test_a_pod_that_stops_under_load_loses_nothing(pod: Pod) -> None:
    assert (pod.probe("readiness"), pod.probe("liveness")) == (HTTPStatus.OK, HTTPStatus.OK)
    answered: list[int] = []
    stopped = threading.Event()

    def client() -> None:
        with httpx.Client(timeout=600, trust_env=False) as http:
            while not stopped.is_set():
                answer = http.post(
                    f"{pod.inference}/predictions/five_folds", content=GOOD, headers={"X-Nnunet-Options": FAST}
                )
                answered.append(answer.status_code)
                if answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
                    assert int(answer.headers["retry-after"]) >= 1
                    return  # to another pod

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client) for _ in range(CLIENTS)]
        wait_for(lambda: answered.count(HTTPStatus.OK) >= 2 * CLIENTS)
        subprocess.run(["/bin/sh", "-c", pod.hook], env=pod.environment, check=True)
        assert pod.probe("readiness") == HTTPStatus.OK, "it serves until SIGTERM"
        pod.process.terminate()
        wait_for(lambda: pod.probe("readiness") != HTTPStatus.OK)
        stopped.set()
        for each in clients:
            each.result()
    assert pod.process.wait() == 0
    assert set(answered) == {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}
