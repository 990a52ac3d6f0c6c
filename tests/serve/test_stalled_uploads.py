"""Uploads that stall midway, sent to TorchServe itself: it has no read timeout, so they stay until the client goes.

docs/operations.md says what that costs and why a proxy belongs in front (test_proxy.py).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psutil
import pytest

from support.bad_requests import FAST, GOOD
from support.server import LiveServer

pytestmark = pytest.mark.serve

STALLED = 100
CONTENT_LENGTH = 2_900_000
"""Below the session server's max_request_size, 3 MiB."""

SENT = CONTENT_LENGTH // 5
JVM_GROWTH = 2 * STALLED * SENT
"""Bytes: TorchServe keeps what has arrived, in buffers that are at most half empty; nothing for what was announced."""

WORKER_GROWTH = 24 * 1024**2


@pytest.fixture
def stalled(server: LiveServer) -> Iterator[list[socket.socket]]:
    """Connections with half an upload each, all of it received by TorchServe."""
    port = int(server.server.inference_url.rpartition(":")[2])
    head = f"POST /predictions/five_folds HTTP/1.1\r\nHost: localhost\r\nContent-Length: {CONTENT_LENGTH}\r\n\r\n"
    with ExitStack() as stack:
        uploads = []
        for _ in range(STALLED):
            upload = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=300))
            upload.sendall(head.encode() + bytes(SENT))
            uploads.append(upload)
        wait_until(lambda: open_connections(server) >= STALLED)
        yield uploads


@pytest.fixture
def memory_before(server: LiveServer) -> tuple[int, int]:
    """Bytes of the JVM and of the worker, after a few good requests."""
    for _ in range(3):
        assert server.predict("five_folds", GOOD, options=FAST).status_code == 200
    return memory(server)


def memory(server: LiveServer) -> tuple[int, int]:
    jvm = server.server.process()
    assert jvm is not None
    [worker] = server.workers("five_folds")
    uss: int = worker.memory_full_info().uss
    return jvm.memory_info().rss, uss


def open_connections(server: LiveServer) -> int:
    """Connections that TorchServe has accepted on its inference port."""
    jvm = server.server.process()
    assert jvm is not None
    port = int(server.server.inference_url.rpartition(":")[2])
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in jvm.net_connections("tcp"))


def wait_until(done: Callable[[], bool], within_s: float = 300) -> None:
    deadline = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_stalled_uploads_neither_stop_nor_change_good_requests(
    server: LiveServer, memory_before: tuple[int, int], stalled: list[socket.socket]
) -> None:
    workers = server.workers("five_folds")
    first = server.predict("five_folds", GOOD, options=FAST)
    assert first.status_code == 200
    for _ in range(5):
        answer = server.predict("five_folds", GOOD, options=FAST)
        assert (answer.status_code, answer.content) == (200, first.content)
    jvm, worker = (after - before for after, before in zip(memory(server), memory_before, strict=True))
    assert jvm < JVM_GROWTH
    assert worker < WORKER_GROWTH
    assert server.workers("five_folds") == workers

    for upload in stalled:  # TorchServe waits for every one of them still
        upload.setblocking(False)
        with pytest.raises(BlockingIOError):
            upload.recv(1)


def test_an_upload_that_goes_on_after_a_pause_is_answered(server: LiveServer, stalled: list[socket.socket]) -> None:
    upload = stalled[-1]
    upload.sendall(bytes(CONTENT_LENGTH - SENT))
    assert upload.recv(12) == b"HTTP/1.1 413"  # by the handler: above our own limit, below TorchServe's


def test_a_client_that_goes_frees_its_connection(server: LiveServer, stalled: list[socket.socket]) -> None:
    for upload in stalled:
        upload.close()
    wait_until(lambda: open_connections(server) < STALLED // 10)
    assert server.predict("five_folds", GOOD, options=FAST).status_code == 200
