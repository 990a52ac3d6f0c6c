"""``/live`` and ``/ready`` over HTTP, answered by ``serve --foreground`` itself.

Threads: one runs the HTTP server, an event loop that waits for nobody for long; three look (:mod:`.health`). Who asks
is never a reason to look: an answer is what was seen last, so that any number of probes cost the JVM nothing. Only
where the last look at the JVM is old does a probe wait for the one under way, for less than a second.

Whoever reaches the port can do no more than ask: one request a connection, which has two seconds for it, and at most
:data:`MOST_CONNECTIONS`, of which the oldest gives way to a new one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from .addresses import on_this_machine
from .errors import ToolError
from .health import ANSWER_S, Health
from .probes import Probe

logger = logging.getLogger(__name__)

DEFAULT_PORT = 8083
MOST_CONNECTIONS = 64

_REQUEST_S = 2.0
_MOST_HEAD_BYTES = 4096
_POLL_S = 0.02
_CLOSE_S = 0.2
_FRONT_END_S, _ENGINES_S = 1.0, 2.0
_WORKERS_S, _CHANGING_WORKERS_S = 5.0, 1.0
"""Between two looks, each of them after the last one has ended."""

_SHARE, _LONGEST_PAUSE_S = 20.0, 30.0
"""A look at the workers that takes long, as it does where there are many GPUs, is not begun again for so many times as
long, but for that at most."""

_PATHS = {f"/{probe}": probe for probe in Probe}


class HealthServer:
    """Answers probes for a :class:`~.health.Health`, in threads of its own, until it is closed or the process ends."""

    def __init__(self, health: Health, host: str, port: int) -> None:
        """Take the port.

        Args:
            health: whose.
            host: an IPv4 address of this machine.
            port: a number, or 0 for any.

        Raises:
            ToolError: the port cannot be had.
        """
        self._health = health
        self._connections: dict[asyncio.StreamWriter, None] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        try:
            self._listener = socket.create_server((host, port), backlog=MOST_CONNECTIONS)
        except OSError as error:
            msg = f"port {port} at {host} cannot be had ({error.strerror}): choose another with --health-port"
            raise ToolError(msg) from error
        self.url = f"http://{on_this_machine(host)}:{self._listener.getsockname()[1]}"

    def start(self) -> None:
        """Begin to look and to answer."""
        health = self._health
        for name, look, pause_s in (
            ("front-end", health.look_at_front_end, lambda _: _FRONT_END_S),
            ("workers", health.look_at_workers, self._until_workers_s),
            ("engines", health.look_at_engines, lambda _: _ENGINES_S),
        ):
            self._begin(f"health-{name}", partial(self._repeat, look, pause_s))
        self._begin("health", lambda: asyncio.run(self._run()))

    def close(self) -> None:
        """Let the port go; a look that is under way ends first."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _begin(self, name: str, work: Callable[[], object]) -> None:
        self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        self._threads[-1].start()

    def _repeat(self, look: Callable[[], None], pause_s: Callable[[float], float]) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            began = time.monotonic()
            try:
                look()
            except Exception:
                logger.exception("a look at the server's health failed")
            pause = pause_s(time.monotonic() - began)

    def _until_workers_s(self, took_s: float) -> float:
        usual = _CHANGING_WORKERS_S if self._health.wants_workers else _WORKERS_S
        return max(usual, min(_SHARE * took_s, _LONGEST_PAUSE_S))

    async def _run(self) -> None:
        server = await asyncio.start_server(self._serve, sock=self._listener, limit=_MOST_HEAD_BYTES)
        async with server:
            while not self._over.is_set():
                await asyncio.sleep(_CLOSE_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while len(self._connections) >= MOST_CONNECTIONS:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.transport.abort()
        self._connections[writer] = None
        try:
            async with asyncio.timeout(_REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        except Exception:
            logger.exception("a probe was not answered")
            writer.transport.abort()
        finally:
            self._connections.pop(writer, None)
            writer.close()

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        probe = _PATHS.get(rest.partition(" ")[0].partition("?")[0])
        if probe is None:
            return _response(HTTPStatus.NOT_FOUND, {"detail": f"there is {' and '.join(sorted(_PATHS))}"}, method)
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, {"detail": "GET it"}, method)
        until = time.monotonic() + ANSWER_S
        while self._health.has_old_news and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        verdict = self._health.verdict(probe)
        status = HTTPStatus.OK if verdict.ok else HTTPStatus.SERVICE_UNAVAILABLE
        return _response(status, verdict.document(), method)


def _response(status: HTTPStatus, document: dict[str, object], method: str) -> bytes:
    body = json.dumps(document).encode()
    kind = "application/json" if status is HTTPStatus.OK else "application/problem+json"
    head = (
        f"HTTP/1.1 {int(status)} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else body)
