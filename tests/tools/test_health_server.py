"""The port where health is asked for: what it answers, and that nobody can keep others from asking."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve_tools import asking_health, health_server
from nnunet_torchserve_tools.asking_health import ask
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.health import Health, Phase
from nnunet_torchserve_tools.health_server import MOST_CONNECTIONS, HealthServer
from support.ports import free_port
from support.sockets import read_all

PATIENCE_S = 120


@pytest.fixture(scope="module")
def health(tmp_path_factory: pytest.TempPathFactory) -> Health:
    return Health(tmp_path_factory.mktemp("health"), Phase.LOADING)


@pytest.fixture(scope="module")
def answering(health: Health) -> Iterator[HealthServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health_server, "_REQUEST_S", PATIENCE_S)
        server = HealthServer(health, "127.0.0.1", 0)
        server.start()
        yield server
        server.close()


def connect(answering: HealthServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(answering.url.rpartition(":")[2])), timeout=PATIENCE_S)


def test_a_probe_that_does_not_hold_is_a_problem_without_a_path(answering: HealthServer, health: Health) -> None:
    health.progress = "1 of 4 workers are ready"
    answer = httpx.get(f"{answering.url}/ready?from=kubelet", timeout=PATIENCE_S, trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.json() == {
        "type": "about:blank",
        "status": 503,
        "title": "Service Unavailable",
        "code": "loading",
        "detail": "1 of 4 workers are ready",
    }
    assert httpx.get(f"{answering.url}/live", timeout=PATIENCE_S, trust_env=False).status_code == 200


def test_the_head_alone_may_be_asked_for_and_nothing_else_is_there(answering: HealthServer) -> None:
    head = httpx.head(f"{answering.url}/live", timeout=PATIENCE_S, trust_env=False)
    assert (head.status_code, head.content) == (200, b"")
    assert httpx.get(f"{answering.url}/", timeout=PATIENCE_S, trust_env=False).status_code == 404
    assert httpx.post(f"{answering.url}/live", timeout=PATIENCE_S, trust_env=False).status_code == 405


def test_the_command_says_the_same(answering: HealthServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_health, "_PATIENCE_S", PATIENCE_S)
    assert ask(answering.url, tmp_path, live=True).ok
    assert not ask(answering.url, tmp_path, live=False).ok
    assert ask(None, tmp_path, live=True).detail.startswith("no server of ")
    assert ask(f"http://127.0.0.1:{free_port()}", tmp_path, live=True).detail.startswith(
        "the health port does not answer"
    )
    with pytest.raises(UsageError, match="http://ADDRESS:PORT"):
        ask("8083", tmp_path, live=True)


@pytest.mark.parametrize(
    "sent", [b"", b"GET /live HTTP/1.1\r\nHost: a", b"\x16\x03\x01\x02", b"\r\n\r\n", b"x" * 10_000]
)
def test_what_is_no_request_is_cut(sent: bytes, answering: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_server, "_REQUEST_S", 0.1)
    with connect(answering) as connection:
        connection.sendall(sent)
        assert not read_all(connection).startswith(b"HTTP/1.1 200")


def test_who_says_nothing_keeps_nobody_from_asking(answering: HealthServer) -> None:
    """The connections' time is not over when the others ask."""
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(answering)) for _ in range(2 * MOST_CONNECTIONS)]
        for connection in silent[-MOST_CONNECTIONS // 2 :]:
            connection.sendall(b"GET /li")
        assert httpx.get(f"{answering.url}/live", trust_env=False, timeout=PATIENCE_S).status_code == 200


def test_a_port_that_is_taken_is_named(health: Health) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ToolError, match=f"port {port} .* --health-port"):
            HealthServer(health, "127.0.0.1", port)
