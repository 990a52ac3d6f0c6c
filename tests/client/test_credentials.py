"""Credentials reach their server, and nothing else."""

from __future__ import annotations

import logging
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nnunet_torchserve_client import Case, Client, RemotePredictor, errors
from nnunet_torchserve_client.credentials import TOKEN_VARIABLE
from support import peer
from support.peer import Peer, Received, Wire

SECRET = "s3cret-t0ken"  # noqa: S105 (a test's)
OTHER_SECRET = "an0ther"  # noqa: S105
CASE = Case("head", b"an image")


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


@pytest.fixture(autouse=True)
def _no_token_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def test_token_and_headers_are_sent(server: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(server.url, "blobs", token=SECRET, headers={"X-Api-Key": OTHER_SECRET}) as client:
        client.predict(CASE)
    monkeypatch.setenv(TOKEN_VARIABLE, f"{SECRET}\n")
    with Client(server.url, "blobs") as client:
        client.predict(CASE)
    first, second = (request.headers for request in server.received)
    assert (first["authorization"], first["x-api-key"]) == (f"Bearer {SECRET}", OTHER_SECRET)
    assert second["authorization"] == f"Bearer {SECRET}"


def test_no_log_message_or_name_holds_a_credential(server: Peer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.replies = [peer.reset, peer.plain(401)]
    told: list[object] = []
    secrets: dict[str, Any] = {"token": SECRET, "headers": {"X-Api-Key": OTHER_SECRET}}
    predictor = RemotePredictor(server.url, "blobs", **secrets)
    with Client(server.url, "blobs", pause_s=0.01, **secrets) as client:
        with pytest.raises(errors.Unauthorized) as caught:
            client.predict(CASE, on_event=told.append)
        shown = [repr(predictor), repr(client), repr(client.__dict__), str(caught.value), repr(caught.value)]
        shown += [repr(told), caplog.text, repr(caught.value.__cause__), str(caught.value.as_json())]
    assert server.received[1].headers["x-api-key"] == OTHER_SECRET
    assert not [text for text in shown if SECRET in text or OTHER_SECRET in text]


@pytest.mark.parametrize(
    "given",
    [
        {"token": f"{SECRET}\nX: y"},
        {"token": f"{SECRET} ü"},
        {"headers": {"X-Api-Key": f"{SECRET}\r\n"  "X: y"}},
        {"headers": {"X-Api-Key": f"{SECRET}ü"}},
        {"headers": {"authorization": SECRET}, "token": SECRET},
    ],
)  # fmt: skip
def test_a_credential_that_no_header_can_hold_is_refused_without_showing_it(given: dict[str, object]) -> None:
    with pytest.raises(errors.WrongUse) as caught:
        Client("http://127.0.0.1:1", "blobs", **given)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["http://user:{}@127.0.0.1:1", "user:{}@host:8080", "http:/u:{}@h", "http://h/?key={}"])
def test_credentials_in_a_url_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(errors.WrongUse) as caught:
        Client(url.format(SECRET), "blobs")
    assert SECRET not in str(caught.value)


def test_those_of_a_proxy_that_cannot_be_used_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"sock://user:{SECRET}@host:1")
    with pytest.raises(errors.WrongUse, match="HTTP_PROXY cannot be used") as caught:
        Client("http://10.0.0.1:8080", "blobs")
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None
    assert Client("http://10.0.0.1:8080", "blobs", use_proxies=False).urls


def redirect(status: int, to: str) -> peer.Reply:
    return peer.plain(status, Location=f"{to}/predictions/blobs")


def test_a_redirect_to_another_host_gets_no_credentials(server: Peer) -> None:
    with Peer().listening() as other:
        server.replies = [redirect(307, other.url), redirect(308, f"http://localhost:{server.port}"), peer.echo]
        with Client(server.url, "blobs", token=SECRET, headers={"X-Api-Key": OTHER_SECRET}) as client:
            assert client.predict(CASE).content == CASE.image
            assert client.predict(CASE).content == CASE.image
            server.replies, other.replies = [redirect(307, other.url)], [peer.plain(401)]
            with pytest.raises(errors.Unauthorized, match=f"not sent on by a redirect, here to {other.url}"):
                client.predict(CASE)
    (elsewhere, _), (_, _, by_another_name, _) = other.received, server.received
    for received in (elsewhere, by_another_name):
        assert received.body == CASE.image
        assert not {"authorization", "x-api-key"} & received.headers.keys()


def test_a_redirect_on_the_same_host_keeps_them(server: Peer) -> None:
    server.replies = [redirect(307, server.url), peer.echo]
    with Client(server.url, "blobs", token=SECRET) as client:
        client.predict(CASE)
    assert server.received[1].headers["authorization"] == f"Bearer {SECRET}"


def test_redirects_that_lose_the_image_or_never_end_are_errors(server: Peer) -> None:
    with Client(server.url, "blobs") as client:
        server.replies = [redirect(302, "http://elsewhere")]
        with pytest.raises(errors.BadAnswer, match="drops the image"):
            client.predict(CASE)
        server.replies = [redirect(307, server.url)]
        with pytest.raises(errors.BadAnswer, match="redirects"):
            client.predict(CASE)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_certificate_is_checked_against_the_authority_that_was_given(tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    held, never = threading.Event(), threading.Event()

    def close_when_held(client: Client) -> None:
        held.wait(60)
        client.close()

    def hold(wire: Wire, _: Received) -> None:
        wire.head()
        wire.event(event="heartbeat")
        held.set()
        never.wait(60)

    with Peer(context=context).listening() as server:
        with Client(server.url, "blobs", token=SECRET, verify=certificate) as client:
            assert client.predict(CASE).content == CASE.image
            server.replies = [redirect(307, server.url.replace("https", "http"))]
            with pytest.raises(errors.NotServed, match="nothing is encrypted"):
                client.predict(CASE)
            server.replies = [hold]
            closing = threading.Thread(target=close_when_held, args=(client,))
            closing.start()
            with pytest.raises(errors.Cancelled):
                client.predict(CASE)
            closing.join()
            never.set()
        with Client(server.url, "blobs", token=SECRET) as client, pytest.raises(errors.Untrusted) as caught:
            client.predict(CASE)
        assert caught.value.tries == 1
        assert len(server.received) == 3
        with Client(server.url, "blobs", verify=False) as client:
            server.replies = [peer.echo]
            assert client.predict(CASE).content == CASE.image
    with pytest.raises(errors.WrongUse, match="PEM"):
        Client(server.url, "blobs", verify=key.with_name(key.name))
    with pytest.raises(errors.WrongUse, match="no file"):
        Client(server.url, "blobs", verify=tmp_path / "none.pem")
