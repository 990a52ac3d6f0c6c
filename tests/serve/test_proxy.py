"""deploy/nginx.conf in front of a real server: what the proxy passes, and what it keeps from TorchServe."""

from __future__ import annotations

import getpass
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from nnunet_torchserve_client.client import Client
from nnunet_torchserve_client.credentials import TOKEN_VARIABLE
from nnunet_torchserve_tools import drain
from nnunet_torchserve_tools.asking_health import ask
from nnunet_torchserve_tools.list_models import Sources, list_models, of_state_dir
from support import volumes
from support.bad_requests import FAST, GOOD
from support.chaos import wait_for
from support.ports import free_port
from support.server import SERVED, LiveServer
from support.sockets import read_all

pytestmark = pytest.mark.serve

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"
BODY_LIMIT = 3 * 1024**2
"""The session server's max_request_size."""

PER_ADDRESS = 16
TIMEOUT_S, OWN_TIMEOUT_S = 2, 60
"""Of an impatient proxy; and nginx's own, if it were told of none."""

STALLED = 100
OF_ONE_ANSWER = {"date", "server", "connection", "server-timing", "x-request-id"}
"""Headers that differ between two answers to the same request, or belong to the connection."""


@dataclass(frozen=True)
class Proxy:
    """A running nginx."""

    process: psutil.Process
    port: int
    upstream_port: int
    log: Path

    def predict(self, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        with httpx.Client(timeout=600, trust_env=False) as client:
            return client.post(f"http://127.0.0.1:{self.port}/predictions/five_folds", content=body, headers=headers)

    def upload(self, sent: bytes, length: int, source: str = "127.0.0.1") -> socket.socket:
        """A connection from an address of its own, with the header and the beginning of a body sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=300, source_address=(source, 0))
        head = f"POST /predictions/five_folds HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
        connection.sendall(f"{head}X-Nnunet-Options: {FAST}\r\nConnection: close\r\n\r\n".encode() + sent)
        return connection

    def upstream_connections(self) -> int:
        """Connections that nginx has to TorchServe."""
        family = [self.process, *self.process.children(recursive=True)]
        every = [connection for process in family for connection in process.net_connections("tcp")]
        return sum(bool(each.raddr) and each.raddr.port == self.upstream_port for each in every)


@pytest.fixture(scope="module")
def proxy(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with proxying(server, tmp_path_factory.mktemp("nginx")) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def impatient(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One that cuts what says nothing for ``TIMEOUT_S``, as any request may on a machine that does much else."""
    times = {
        "client_header_timeout 15s": f"client_header_timeout {TIMEOUT_S}s",
        "client_body_timeout 30s": f"client_body_timeout {TIMEOUT_S}s",
    }
    with proxying(server, tmp_path_factory.mktemp("impatient"), changes=times) as proxy:
        yield proxy


@contextmanager
def proxying(
    server: LiveServer, folder: Path, tokens: str | None = None, changes: Mapping[str, str] | None = None
) -> Iterator[Proxy]:
    """Run nginx with the project's file, and with authentication if there are tokens for it.

    Args:
        server: behind it.
        folder: for everything that it writes.
        tokens: its file of them.
        changes: of the file, beside its ports and the largest body.
    """
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    port = free_port()
    upstream_port = int(server.server.inference_url.rpartition(":")[2])
    text = CONFIG.read_text()
    everywhere = {
        "server 127.0.0.1:8080": f"server 127.0.0.1:{upstream_port}",
        "listen 127.0.0.1:8443": f"listen 127.0.0.1:{port}",
        "client_max_body_size 537919488": f"client_max_body_size {BODY_LIMIT}",
    }
    for ours, here in (everywhere | dict(changes or {})).items():
        assert text.count(ours) == 1, ours
        text = text.replace(ours, here)
    if tokens is not None:
        assert text.count("# auth: ") == 13
        text = text.replace("# auth: ", "")
        volumes.write(folder, "tokens", tokens.encode())
    config = volumes.write(folder, "nginx.conf", text.encode())
    log = folder / "requests.log"
    command = [nginx, "-p", str(folder), "-c", str(config), "-g", f"daemon off; user {getpass.getuser()};"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert process.poll() is None, process.stderr and process.stderr.read()
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield Proxy(psutil.Process(process.pid), port, upstream_port, log)
        finally:
            process.terminate()


def test_an_answer_passes_with_the_same_bytes_and_headers(server: LiveServer, proxy: Proxy) -> None:
    headers = {"X-Request-Id": "study-7", "X-Nnunet-Options": FAST}
    direct = server.predict("five_folds", GOOD, headers=headers)
    passed = proxy.predict(GOOD, headers)
    assert (passed.status_code, passed.content) == (200, direct.content)
    assert passed.headers["x-nnunet-request-id"] == "study-7"
    assert "server-timing" in passed.headers
    same = [{n: v for n, v in a.headers.items() if n not in OF_ONE_ANSWER} for a in (direct, passed)]
    assert same[0] == same[1]
    assert "x-nnunet-model" in same[1]


def test_a_problem_passes_and_a_request_without_an_id_gets_the_proxys(proxy: Proxy) -> None:
    refused = proxy.predict(b"this is not an image")
    assert (refused.status_code, refused.headers["content-type"]) == (415, "application/problem+json")
    assert refused.json()["code"] == "unknown_format"
    wait_for(lambda: f"id={refused.json()['request_id']}" in proxy.log.read_text())  # written after the answer


def test_a_large_body_passes_and_is_not_kept(server: LiveServer, proxy: Proxy) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (100, 100, 90)).astype(np.int16)
    body = volumes.nifti(noise, np.diag([0.5, 0.5, 0.5, 1]))
    assert 1_700_000 < len(body) < 2 * 1024**2
    headers = {"X-Nnunet-Options": FAST}
    assert proxy.predict(body, headers).content == server.predict("five_folds", body, headers=headers).content
    folder = proxy.log.parent / "bodies"
    assert not [file for file in folder.rglob("*") if file.is_file()]
    assert folder.stat().st_mode & 0o077 == 0


def test_stalled_uploads_are_cut_and_none_reaches_torchserve(server: LiveServer, impatient: Proxy) -> None:
    expected = server.predict("five_folds", GOOD, options=FAST).content
    with ExitStack() as stack:
        uploads = [
            stack.enter_context(impatient.upload(bytes(1_000_000), 2_000_000, source=f"127.0.0.{2 + number // 10}"))
            for number in range(STALLED)
        ]
        assert impatient.upstream_connections() == 0
        stalled, served = time.monotonic(), 0
        while served < 3 or time.monotonic() < stalled + TIMEOUT_S / 2:
            with suppress(httpx.TransportError):  # of one that was slow, and cut as well
                answer = impatient.predict(GOOD, {"X-Nnunet-Options": FAST})
                assert (answer.status_code, answer.content) == (200, expected)
                served += 1
        answers = [read_all(upload) for upload in uploads]
        assert time.monotonic() - stalled < OWN_TIMEOUT_S
    assert set(answers) <= {b""} or all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    wait_for(lambda: impatient.log.read_text().count(" POST 408 ") >= STALLED)
    assert server.predict("five_folds", GOOD, options=FAST).content == expected


def test_a_header_that_stalls_is_cut(impatient: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=OWN_TIMEOUT_S) as connection:
        connection.sendall(b"POST /predictions/five_folds HTTP/1.1\r\nHost: local")
        assert not read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_slow_but_steady_upload_is_not_cut(server: LiveServer, impatient: Proxy) -> None:
    expected = server.predict("five_folds", GOOD, options=FAST).content
    while (answer := uploaded_steadily(impatient)) is None:
        pass
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(expected)


def uploaded_steadily(proxy: Proxy) -> bytes | None:
    """What an upload is answered that takes longer than ``TIMEOUT_S`` and never pauses for half as long.

    ``None`` if it did, on a machine that does much else.
    """
    began = last = time.monotonic()
    longest, step = 0.0, len(GOOD) // 40
    with proxy.upload(b"", len(GOOD)) as upload:
        for begin in range(0, len(GOOD), step):
            time.sleep(TIMEOUT_S * 0.04)
            with suppress(ConnectionError):  # it was cut, and the answer is empty
                upload.sendall(GOOD[begin : begin + step])
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert last - began > 1.5 * TIMEOUT_S
        answer = read_all(upload)
    return answer if longest < TIMEOUT_S / 2 else None


def test_a_body_above_the_limit_is_refused_before_it_is_sent(proxy: Proxy) -> None:
    with proxy.upload(b"", BODY_LIMIT + 1) as upload:
        assert upload.recv(12) == b"HTTP/1.1 413"


def test_one_address_cannot_take_every_connection(proxy: Proxy) -> None:
    """Those that it has are made anew for each try: on a machine that does much else they may be cut by then."""

    def is_refused() -> bool:
        """Whether its answer came: with what is on its way when the proxy leaves, it may be lost in a reset."""
        with ExitStack() as stack, suppress(ConnectionError):
            for _ in range(PER_ADDRESS):
                stack.enter_context(proxy.upload(b"half", 1000, source="127.0.0.50"))
            one_more = stack.enter_context(proxy.upload(b"", 1000, source="127.0.0.50"))
            if one_more.recv(12) == b"HTTP/1.1 429":
                assert proxy.predict(GOOD, {"X-Nnunet-Options": FAST}).status_code == 200
                return True
        return False

    wait_for(is_refused)


@pytest.mark.parametrize("path", ["/models", "/", "/api-description", "/predictions/../models"])
def test_nothing_but_predictions_and_ping_passes(path: str, proxy: Proxy) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=300) as connection:
        connection.sendall(head.encode())
        assert read_all(connection).startswith(b"HTTP/1.1 404")


def test_a_form_is_refused_before_torchserve_writes_it_to_its_log(server: LiveServer, proxy: Proxy) -> None:
    plain = volumes.nifti(np.ones((4, 4, 4), np.int16)).replace(bytes(80), b"PATIENT^NAME" + bytes(68), 1)
    assert b"PATIENT^NAME" in plain
    answer = proxy.predict(plain, {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"})
    assert answer.status_code == 415
    assert "PATIENT" not in answer.text
    assert "PATIENT^NAME" not in (Path(server.server.log_dir) / "ts_log.log").read_text()


def test_with_authentication_only_who_has_a_token_may_predict_and_our_commands_need_none(
    server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    ours = secrets.token_hex(32)
    with proxying(server, tmp_path, f'"Bearer {ours}" 1;\n') as proxy:
        for shown in ({}, {"Authorization": "Bearer of-theirs"}, {"Authorization": ours}):
            assert proxy.predict(GOOD, {"X-Nnunet-Options": FAST} | shown).status_code == 401
        with proxy.upload(b"", 1_000_000) as upload:
            assert upload.recv(12) == b"HTTP/1.1 401", "before the body is sent"
        allowed = proxy.predict(GOOD, {"X-Nnunet-Options": FAST, "Authorization": f"Bearer {ours}"})
        assert (allowed.status_code, allowed.content) == (200, server.predict("five_folds", GOOD, options=FAST).content)
        with Client(f"http://127.0.0.1:{proxy.port}", "five_folds", token=ours) as client:
            assert client.describe().model.name == "five_folds"
        wait_for(lambda: ask(None, server.state_dir, live=False).ok)  # a JVM may be slow for a moment
        listed = list_models(of_state_dir(server.state_dir, Sources(None)))
        assert {each.name for each in listed.models} == set(SERVED)
        assert listed.not_seen == []
        target = drain.find_target(server.state_dir, None, "five_folds")
        drain.drain(target, 300, 1)
        assert drain.resume(target) == ["five_folds"]
    assert ours not in proxy.log.read_text()


def test_ping_passes(proxy: Proxy) -> None:
    url = f"http://127.0.0.1:{proxy.port}/ping"
    assert httpx.get(url, timeout=300, trust_env=False).json() == {"status": "Healthy"}
