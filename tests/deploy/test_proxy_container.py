"""The proxy as the chart runs it, with a real nginx: TLS, bearer tokens that go no further, and how it stops."""

from __future__ import annotations

import getpass
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from support.chaos import wait_for
from support.charts import Rendered, serve
from support.peer import Peer, Received, Wire, plain
from support.ports import free_port

TOKEN, OTHER = "5f0c" * 16, "77aa" * 16
LEFT = "prefix/bodies/0000000001"
"""A body that an nginx before this one did not live to delete."""


@dataclass(frozen=True)
class Proxy:
    port: int
    certificate: Path
    folder: Path
    peer: Peer
    process: subprocess.Popen[bytes]
    stop: str

    def ask(self, token: str | None, path: str = "/predictions/brain") -> httpx.Response:
        headers = {"X-Nnunet-Options": "{}"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}".strip()
        context = ssl.create_default_context(cafile=self.certificate)
        with httpx.Client(verify=context, timeout=300, trust_env=False) as client:
            return client.post(f"https://localhost:{self.port}{path}", content=b"a head", headers=headers)


def hook_of(rendered: Rendered) -> str:
    hook: str = rendered.container("proxy")["lifecycle"]["preStop"]["exec"]["command"][-1]
    return hook


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The container's own command, with paths and ports of this machine."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("proxy")
    for name in ("tls", "prefix", "run", "prefix/bodies"):
        (folder / name).mkdir()
    (folder / LEFT).write_bytes(b"a head")
    certificate = folder / "tls" / "tls.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(folder / "tls" / "tls.key"), "-out", str(certificate), "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "tokens").write_text(f'"Bearer {TOKEN}" hospital-a;\n"Bearer {OTHER}" hospital-b;\n')
    port = free_port()
    rendered = serve(
        {
            "proxy": {"enabled": True, "tls": {"secretName": "tls"}, "tokens": {"secretName": "t"}, "port": port},
            "server": {"bodyLimitMiB": 64, "longestRequestSeconds": 3000},
        }
    )
    text = rendered.kind("ConfigMap", "-proxy")["data"]["nginx.conf"]
    assert "worker_processes 2;" in text
    assert "client_max_body_size 68157440;" in text  # 65 MiB
    assert "proxy_read_timeout 9060s;" in text  # two requests may be ahead of it in the queue
    with Peer().listening() as peer:
        config = changed(
            text,
            {
                "server 127.0.0.1:8080": f"server 127.0.0.1:{peer.port}",
                f"listen {port} ssl": f"listen 127.0.0.1:{port} ssl",
            },
        )
        (folder / "nginx.conf").write_text(config)
        here = {
            "nginx -e": f"{nginx} -e",
            "/var/lib/nnunet-proxy": str(folder / "prefix"),
            "/etc/nnunet-proxy": str(folder),
        }
        run = changed(
            rendered.container("proxy")["command"][-1],
            here | {"/run/nnunet-proxy": str(folder / "run"), "off;": f"off; user {getpass.getuser()};"},
        )
        stop = changed(hook_of(rendered), here | {"sleep 5;": ""})
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(["/bin/sh", "-c", run], stdout=log, stderr=subprocess.PIPE) as process,
        ):

            def listens() -> bool:
                assert process.poll() is None, process.stderr and process.stderr.read()
                return listening(port)

            wait_for(listens)
            yield Proxy(port, certificate, folder, peer, process, stop)
            subprocess.run(["/bin/sh", "-c", stop], check=False)


def changed(text: str, words: dict[str, str]) -> str:
    for there, here in words.items():
        assert there in text
        text = text.replace(there, here)
    return text


def test_what_a_killed_nginx_has_left_is_gone(proxy: Proxy) -> None:
    assert (proxy.folder / LEFT).parent.is_dir()
    assert not (proxy.folder / LEFT).exists()


def test_who_has_a_token_is_served_over_tls_and_the_token_goes_no_further(proxy: Proxy) -> None:
    proxy.peer.replies = [plain(200)]
    before = len(proxy.peer.received)
    for token in (TOKEN, OTHER):
        assert proxy.ask(token).status_code == 200
    received = proxy.peer.received[before:]
    assert [each.body for each in received] == [b"a head", b"a head"]
    assert not [each for each in received if "authorization" in each.headers]


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "0", f"{TOKEN} {OTHER}"])
def test_who_has_none_is_refused_and_nothing_reaches_the_server(proxy: Proxy, token: str | None) -> None:
    before = len(proxy.peer.received)
    answer = proxy.ask(token)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="nnunet-torchserve"')
    assert len(proxy.peer.received) == before


def test_the_log_has_the_clients_name_and_no_token(proxy: Proxy) -> None:
    proxy.peer.replies = [plain(200)]
    proxy.ask(OTHER)
    log = proxy.folder / "log"
    wait_for(lambda: "hospital-b POST 200" in log.read_text())
    assert TOKEN[:8] not in log.read_text()
    assert OTHER[:8] not in log.read_text()


def test_plain_http_is_refused(proxy: Proxy) -> None:
    url = f"http://127.0.0.1:{proxy.port}/predictions/brain"
    answer = httpx.post(url, content=b"a head", timeout=300, trust_env=False)
    assert answer.status_code == 400


def test_a_pod_that_stops_sends_every_answer_to_its_end(proxy: Proxy) -> None:
    """The last test: nginx is gone after it."""
    asked, go_on = threading.Event(), threading.Event()

    def slow(wire: Wire, _: Received) -> None:
        asked.set()
        go_on.wait()
        wire.whole(200, b"labels")

    proxy.peer.replies = [slow]
    ended = proxy.folder / "run" / "ended"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(proxy.ask, TOKEN)
        asked.wait()
        with subprocess.Popen(["/bin/sh", "-c", proxy.stop]) as stopping:
            wait_for(lambda: not listening(proxy.port))
            assert stopping.poll() is None
            assert not ended.exists()
            go_on.set()
            assert answer.result().content == b"labels"
            assert stopping.wait() == 0
    assert proxy.process.wait() == 0
    assert ended.exists()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
