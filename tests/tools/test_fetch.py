"""``nnunet-torchserve fetch`` against a real https server: whole and checked, or not at all."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.errors import ToolError, UsageError
from nnunet_torchserve_tools.fetch import TOKEN_VARIABLE, TRIES, URL_VARIABLE, Wanted, fetch

ARCHIVE = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(ARCHIVE).hexdigest()
SECRET = "sw0rdfish"  # noqa: S105


@dataclass
class Store:
    """An https server with one archive, and ways not to give it."""

    port: int
    certificate: Path
    failures: list[int] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def url(self, path: str = "/models/brain.mar", host: str = "localhost") -> str:
        return f"https://{host}:{self.port}{path}"


def _handler(store: Store) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            store.asked.append((self.path, self.headers["Authorization"]))
            leads_to = {
                "/to-http.mar": "http://localhost:1/brain.mar",
                "/to-other.mar": store.url(host="127.0.0.1"),
                "/round.mar": "/round.mar",
            }
            bodies = {"/cut.mar": (ARCHIVE[:-1], len(ARCHIVE)), "/unannounced.mar": (ARCHIVE, None)}
            if store.failures:
                self.send_error(store.failures.pop(0))
            elif self.path in leads_to:
                self._redirect(leads_to[self.path])
            elif self.path in bodies or self.path.startswith("/models/"):
                self._send(*bodies.get(self.path, (ARCHIVE, len(ARCHIVE))))
            else:
                self.send_error(403 if self.path.startswith("/secret.mar") else 404)

        def _send(self, body: bytes, length: int | None) -> None:
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def _redirect(self, to: str) -> None:
            self.send_response(302)
            self.send_header("Location", to)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class Listener(ThreadingHTTPServer):
    """With nothing to say of clients that leave in the middle."""

    def handle_error(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("https")
    certificate, key = folder / "server.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    store = Store(0, certificate)
    server = Listener(("127.0.0.1", 0), _handler(store))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield store
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def store(https: Store) -> Store:
    https.failures, https.asked = [], []
    return https


def wanted(store: Store, into: Path, path: str = "/models/brain.mar", **other: Any) -> Wanted:
    given: dict[str, Any] = {"sha256": DIGEST, "max_bytes": len(ARCHIVE), "authorities": store.certificate} | other
    return Wanted(store.url(path), into=into, **given)


def get(what: Wanted) -> Path:
    return fetch(what, tell=lambda _: None, pause_s=0.001)


def test_an_archive_comes_whole_under_its_name_and_nothing_else_is_left(store: Store, tmp_path: Path) -> None:
    into = tmp_path / "new" / "store"
    assert get(wanted(store, into)) == into / "brain.mar"
    assert (into / "brain.mar").read_bytes() == ARCHIVE
    assert [file.name for file in into.iterdir()] == ["brain.mar"]
    assert (into / "brain.mar").stat().st_mode & 0o777 == 0o644
    assert get(wanted(store, into, "/unannounced.mar", name="other.mar", sha256=DIGEST.upper())).name == "other.mar"


def test_what_is_there_already_is_not_loaded_again_and_what_is_not_it_is_replaced(store: Store, tmp_path: Path) -> None:
    get(wanted(store, tmp_path))
    get(wanted(store, tmp_path))
    assert len(store.asked) == 1
    (tmp_path / "brain.mar").write_bytes(b"half an archive")
    get(wanted(store, tmp_path))
    assert (tmp_path / "brain.mar").read_bytes() == ARCHIVE
    assert [file.name for file in tmp_path.iterdir()] == ["brain.mar"]


@pytest.mark.parametrize(
    ("path", "other", "said"),
    [
        (
            "/models/brain.mar",
            {"sha256": "0" * 64},
            f"is another file: its {len(ARCHIVE)} bytes have the sha256 {DIGEST}",
        ),
        ("/models/brain.mar", {"max_bytes": len(ARCHIVE) - 1}, "is larger than"),
        ("/unannounced.mar", {"max_bytes": len(ARCHIVE) - 1}, "is larger than"),
        ("/cut.mar", {}, "the connection ended after"),
        ("/nowhere.mar", {}, "is answered with 404"),
        ("/secret.mar?signature=" + SECRET, {}, "is answered with 403"),
        ("/to-http.mar", {}, "which is not https"),
        ("/round.mar", {}, "more than 5 times"),
        ("/models/brain.mar", {"authorities": None}, "certificate is not to be trusted"),
    ],
)
def test_what_cannot_be_had_leaves_everything_as_it_was(
    store: Store, tmp_path: Path, path: str, other: dict[str, Any], said: str
) -> None:
    (tmp_path / "brain.mar").write_bytes(b"the one before")
    with pytest.raises(ToolError) as caught:
        get(wanted(store, tmp_path, path, **({"name": "brain.mar"} | other)))
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["brain.mar"]
    assert (tmp_path / "brain.mar").read_bytes() == b"the one before"


def test_a_server_that_is_busy_is_asked_again_but_not_for_ever(store: Store, tmp_path: Path) -> None:
    store.failures = [503, 429, 500]
    told: list[str] = []
    fetch(wanted(store, tmp_path), tell=told.append, pause_s=0.001)
    assert [line.rpartition(" with ")[2] for line in told] == [f"{s}; trying again" for s in (503, 429, 500)]
    store.failures = [503] * 100
    with pytest.raises(ToolError, match="answered with 503"):
        get(wanted(store, tmp_path, name="other.mar"))
    assert 100 - len(store.failures) == TRIES


def test_a_token_goes_to_the_first_host_and_to_no_other(store: Store, tmp_path: Path) -> None:
    get(wanted(store, tmp_path, "/to-other.mar", token=SECRET))
    assert store.asked == [("/to-other.mar", f"Bearer {SECRET}"), ("/models/brain.mar", None)]


def test_two_that_fetch_the_same_load_it_once(store: Store, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: get(wanted(store, tmp_path)), range(4)))
    assert set(files) == {tmp_path / "brain.mar"}
    assert len(store.asked) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["brain.mar"]


@pytest.mark.parametrize(
    ("url", "other", "said"),
    [
        ("http://localhost/brain.mar", {}, "over https only"),
        ("file:///etc/passwd", {}, "over https only"),
        (f"https://user:{SECRET}@localhost/brain.mar", {}, "leave user and password out"),
        ("https://localhost/brain.mar", {"sha256": "abc"}, "64 hexadecimal digits"),
        ("https://localhost/", {}, "--name"),
        ("https://localhost/..%2Fbrain.mar", {"name": "../brain.mar"}, "--name"),
        ("https://localhost/.hidden", {}, "--name"),
        ("https://localhost/brain.mar", {"authorities": Path("/nowhere.pem")}, "no such file"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(
    tmp_path: Path, url: str, other: dict[str, Any], said: str
) -> None:
    given: dict[str, Any] = {"sha256": DIGEST, "max_bytes": 1} | other
    with pytest.raises(UsageError, match=said) as caught:
        get(Wanted(url, into=tmp_path, **given))
    assert SECRET not in str(caught.value)


def test_the_command_takes_secrets_from_the_environment(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["fetch", "--into", str(tmp_path), "--verify", str(store.certificate)]
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    refused = CliRunner().invoke(app, [*arguments, "--sha256", DIGEST])
    assert (refused.exit_code, URL_VARIABLE in refused.output) == (2, True)
    monkeypatch.setenv(URL_VARIABLE, store.url("/models/brain.mar?signature=1"))
    assert CliRunner().invoke(app, arguments).exit_code == 2
    done = CliRunner().invoke(app, [*arguments, "--sha256", DIGEST])
    assert (done.exit_code, done.output) == (0, f"{tmp_path / 'brain.mar'}\n")
    assert store.asked == [("/models/brain.mar?signature=1", f"Bearer {SECRET}")]
