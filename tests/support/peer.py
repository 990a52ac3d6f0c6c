"""A small HTTP server in the test's own process that answers as it is told: for sequences that no real server gives.

It speaks HTTP over a socket, and knows nothing of the client that it tests.
"""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from .ports import free_port

Json = dict[str, Any]

WORKER_DIED = json.dumps({"code": 500, "type": "InternalServerException", "message": "Worker died."}).encode()
QUEUE_FULL = json.dumps({"code": 503, "type": "ServiceUnavailableException", "message": "Model has no worker"}).encode()

DESCRIPTION: Json = {
    "name": "blobs",
    "version": "1.0",
    "digest": "sha256:1",
    "dataset": "Dataset901_Blobs",
    "trainer": "nnUNetTrainer",
    "plans": "nnUNetPlans",
    "configuration": "3d_fullres",
    "folds": [0, 1],
    "checkpoint": "checkpoint_final.pth",
    "mirroring_axes": {"0": [0, 1, 2]},
    "limits": {"body_bytes": 1000},
    "reader": "SimpleITKIO",
    "input_orientation": None,
    "dataset_json": {"file_ending": ".nii.gz"},
    "plans_json": {},
    "served": None,
}


@dataclass(frozen=True)
class Received:
    """A request.

    Attributes:
        headers: names in lower case.
        body: all of it.
        at: ``time.monotonic()`` when it was there.
        beside: requests that were there and not answered, itself not counted.
    """

    headers: dict[str, str]
    body: bytes
    at: float
    beside: int

    @property
    def options(self) -> Json:
        """Of its header."""
        options: Json = json.loads(self.headers["x-nnunet-options"])
        return options


class Wire(BaseHTTPRequestHandler):
    """What an answer is written with."""

    protocol_version = "HTTP/1.1"
    server: _Listener
    waits = False

    def answered(self) -> None:
        """Count it no longer: said before the bytes after which its client may send another one."""
        self.server.peer.answered(self)

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.close_connection = True
        self.server.peer.take(self, headers, body)

    def whole(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, length: int | None = None
    ) -> None:
        """A plain answer; ``length`` is what it says to have, and does not."""
        self.answered()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def head(self) -> None:
        """The head of a stream of events."""
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.nnunet-torchserve.events")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, content: bytes) -> None:
        """A part of it; an empty one is the end."""
        if not content:
            self.answered()
        self.wfile.write(b"%x\r\n" % len(content) + content + b"\r\n")
        self.wfile.flush()

    def event(self, **document: object) -> None:
        """One event."""
        if document["event"] == "error":
            self.answered()
        self.chunk(json.dumps(document).encode() + b"\n")

    def result(self, content: bytes, promised: int | None = None, **headers: str) -> None:
        """The last event and its bytes."""
        self.answered()
        length = len(content) if promised is None else promised
        self.event(event="result", status=200, content_type="application/gzip", length=length, headers=headers)
        if content:
            self.chunk(content)

    def reset(self) -> None:
        """End the connection without a word."""
        self.answered()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)


Reply = Callable[[Wire, Received], object]
"""Answers one request."""


def echo(wire: Wire, received: Received) -> None:
    """A stream whose result is what was sent."""
    wire.head()
    wire.event(event="progress", stage="network", done=0, total=2)
    wire.event(event="heartbeat")
    wire.result(received.body)
    wire.chunk(b"")


def plain(status: int, body: bytes = b"", **headers: str) -> Reply:
    """A plain answer; underscores of header names become hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda wire, _: wire.whole(status, body, named)


def problem(status: int, code: str, **headers: str) -> Reply:
    """A problem document."""
    document = {"status": status, "code": code, "detail": f"it is {code}", "request_id": "server-7"}
    return plain(status, json.dumps(document).encode(), Content_Type="application/problem+json", **headers)


def reset(wire: Wire, _: Received) -> None:
    """No answer: the connection is reset."""
    wire.reset()


def truncated(wire: Wire, received: Received) -> None:
    """A result that ends early, and the connection with it."""
    wire.head()
    wire.result(received.body[:1], promised=len(received.body))


def without_its_end(wire: Wire, _: Received) -> None:
    """A stream that ends in order, but without its last event."""
    wire.head()
    wire.event(event="heartbeat")
    wire.chunk(b"")


def error_event(status: int, code: str) -> Reply:
    """A stream that ends with a problem."""

    def reply(wire: Wire, _: Received) -> None:
        wire.head()
        wire.event(event="error", status=status, code=code, detail=f"it is {code}", request_id="server-7", headers={})
        wire.chunk(b"")

    return reply


class _Listener(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64
    peer: Peer

    def handle_error(self, *_: object) -> None:
        """A client that left."""


@dataclass
class Peer:
    """The server, and what it was asked.

    Attributes:
        replies: one for each prediction that comes; the last one is for all that follow.
        context: for TLS.
        description: is answered where it is asked for; ``None`` leaves that to the replies.
        received: predictions, in the order in which they came.
    """

    replies: Sequence[Reply] = (echo,)
    context: ssl.SSLContext | None = None
    description: Json | None = field(default_factory=lambda: dict(DESCRIPTION))
    received: list[Received] = field(default_factory=list)
    described: int = 0
    paths: list[str] = field(default_factory=list)
    port: int = 0
    _beside: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"{'http' if self.context is None else 'https'}://127.0.0.1:{self.port}"

    def take(self, wire: Wire, headers: dict[str, str], body: bytes) -> None:
        """Answer a request."""
        self.paths.append(wire.path)
        if self.description is not None and json.loads(headers["x-nnunet-options"]).get("describe"):
            self.described += 1
            wire.whole(200, json.dumps(self.description).encode(), {"Content-Type": "application/json"})
            return
        with self._lock:
            received = Received(headers, body, time.monotonic(), self._beside)
            reply = self.replies[min(len(self.received), len(self.replies) - 1)]
            self.received.append(received)
            self._beside += 1
            wire.waits = True
        try:
            reply(wire, received)
        finally:
            self.answered(wire)

    def answered(self, wire: Wire) -> None:
        """See :meth:`Wire.answered`."""
        with self._lock:
            self._beside -= wire.waits
            wire.waits = False

    @contextmanager
    def listening(self) -> Iterator[Peer]:
        """Answer for the length of the block, on the same port as before if there was one.

        It is none that the kernel gives out: while nobody listens there, it could be another connection's.
        """
        listener = _Listener(("127.0.0.1", self.port or free_port()), Wire)
        if self.context is not None:
            listener.socket = self.context.wrap_socket(listener.socket, server_side=True)
        listener.peer, self.port = self, listener.server_address[1]
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            listener.shutdown()
            listener.server_close()
            thread.join()
