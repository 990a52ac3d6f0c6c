"""One request to one server, from its first byte to the last of its answer.

Every request asks for events (``stream: true``), for only they tell a server that works from one that hangs. The answer
is taken as docs/http.md says, and whatever goes wrong comes out as an error of :mod:`.errors`.

Each request has a connection of its own: it costs nothing beside a case, is never one that the server has just closed,
and can be cut (:mod:`.stopping`).

Before an answer begins, its request waits in TorchServe's queue, maybe for long, and nothing tells one that waits from
one that is lost there: where a model is unregistered, the connections of those that waited stay open. But the queue is
first come, first served. So after half of its time the server is asked what the model is; once that is answered, the
answer to the request should have begun, and if it has not, the request is lost. One that still waits is not given up,
for it would be computed all the same, and once more for the next try.

Threads: a request has one more, which asks that question.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httpx

from .answers import Answer
from .bodies import EMPTY, Body
from .connection import no_connection
from .credentials import Credentials
from .errors import (
    BadAnswer,
    Cancelled,
    ClientError,
    CutOff,
    Silent,
    TooLate,
    Unauthorized,
    UnknownModel,
    Unreachable,
    WrongUse,
)
from .events import Event, Kind, server_event
from .failures import lower_case, parsed, problem, problem_of
from .redirects import origin, redirected, shown
from .stopping import Line, Stop

OPTIONS_HEADER = "X-Nnunet-Options"
MOST_OPTIONS_BYTES = 4096
"""The server's bound."""

EVENTS_TYPE = "application/vnd.nnunet-torchserve.events"

_SERVERS_ID = "x-nnunet-request-id"
"""A header of every answer that a worker gives."""

CONNECT_S = 10.0
SEND_S = 60.0
QUEUE_LOOK_SHARE = 0.5
"""Of the time that is left, after which it is asked whether a request still is in the queue. Not sooner, for a proxy
may keep the beginning of an answer until its end."""

MOST_REDIRECTS = 5

_LONGEST_LINE = 1024**2
_MOST_ANSWER_BYTES = 2**31
"""TorchServe's own bound."""

_TELL_BYTES = 1024**2
"""Bytes between two events of sending or receiving."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.

    Attributes:
        case: the name of its case.
        path: below the base URL.
        body: what is sent.
        options: of docs/http.md, without ``stream``.
        streams: whether events are asked for.
    """

    case: str
    path: str
    body: Body
    options: Mapping[str, object]
    streams: bool = True


@dataclass(slots=True)
class Exchange:
    """One request on its way.

    Attributes:
        http: the connections of its server.
        url: the server's base URL.
        credentials: for that server.
        tell: is told events.
        stop: gives it up.
        deadline: ``time.monotonic()`` at which it is given up.
        silence_s: without a byte, after which a server that has begun to answer is taken for dead.
        taken_up: is called once a worker has the request.
    """

    http: httpx.Client
    url: str
    credentials: Credentials
    tell: Callable[[Event], object]
    stop: Stop
    deadline: float
    silence_s: float
    taken_up: Callable[[], object]
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _case: str = ""
    _sent: bool = False
    _begun: bool = False
    _lost: bool = False

    def answer(self, asked: Asked) -> Answer:
        """Ask, and take the answer.

        Raises:
            ClientError: whatever goes wrong, with case, server and request id.
        """
        self._case = asked.case
        line = Line()
        try:
            with self.stop.telling(line.cut):
                return self._follow(asked, line)
        except ClientError as error:
            raise self._named(error) from error.__cause__
        except httpx.TimeoutException as error:
            raise self._named(self._timed_out(error)) from error
        except httpx.DecodingError as error:
            msg = "the answer was packed on its way, and is damaged"
            raise self._named(BadAnswer(msg)) from error
        except httpx.TransportError as error:
            self.stop.check()
            if self._lost and not self._begun:
                msg = "the request was lost in the server's queue: it answered a later one"
                raise self._named(Silent(msg)) from error
            raise self._named(no_connection(error, begun=self._begun)) from error
        except RuntimeError:  # httpx's, where the client was closed just before
            self.stop.check()
            raise

    def _follow(self, asked: Asked, line: Line) -> Answer:
        """Ask where redirects lead to."""
        target = httpx.URL(self.url + asked.path)
        home = origin(target)
        for _ in range(MOST_REDIRECTS + 1):
            secret = self.credentials.headers if origin(target) == home else {}
            timeout = {"connect": self._left(CONNECT_S), "write": SEND_S, "read": self._left(), "pool": None}
            extensions = {"timeout": timeout, "trace": _tracing(line)}
            request = self.http.build_request(
                "POST",
                target,
                headers=self._headers(asked, secret),
                content=self._sending(asked),
                extensions=extensions,
            )
            with self._watched(asked, line):
                response = self.http.send(request, stream=True)
            try:
                timeout["read"] = self.silence_s
                if not response.is_redirect:
                    return self._take(response, streams=asked.streams)
                target = redirected(target, response)
            except Unauthorized as error:
                if secret != self.credentials.headers:
                    error.reason += f"; credentials are not sent on by a redirect, here to {shown(target)}"
                raise
            finally:
                response.close()
        msg = f"more than {MOST_REDIRECTS} redirects"
        raise BadAnswer(msg)

    def _headers(self, asked: Asked, secret: Mapping[str, str]) -> dict[str, str]:
        ours = {
            OPTIONS_HEADER: _as_text({**asked.options, "stream": True} if asked.streams else asked.options),
            "X-Request-Id": self._id,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Content-Length": str(asked.body.length),
        }
        if asked.body.length:
            ours["Content-Type"] = asked.body.content_type
        return {**secret, **ours}

    def _sending(self, asked: Asked) -> Iterator[bytes]:
        self._sent = True
        done, told = 0, -_TELL_BYTES
        total = asked.body.length
        for chunk in asked.body.chunks():
            yield chunk  # type: ignore[misc]  # httpx passes on whatever has a length and a buffer
            done += len(chunk)
            self._check()
            if done - told >= _TELL_BYTES or done == total:
                told = done
                self.tell(Event(self._case, Kind.SENDING, self.url, done=done, total=total))
        self.tell(Event(self._case, Kind.WAITING, self.url))

    def _take(self, response: httpx.Response, *, streams: bool) -> Answer:
        if response.is_error:
            raise problem(response)
        if response.status_code != HTTPStatus.OK:
            msg = f"HTTP {response.status_code}, which this client does not know"
            raise BadAnswer(msg, status=response.status_code)
        content_type = response.headers.get("content-type", "")
        has_events = content_type.startswith(EVENTS_TYPE)
        if streams and not has_events and _SERVERS_ID not in response.headers:
            msg = f"HTTP 200 with {ascii(content_type)[:80]} is not this server's: something between answers for it"
            raise BadAnswer(msg, status=response.status_code)
        self._id = response.headers.get(_SERVERS_ID, self._id)
        self._begun = True
        self.taken_up()
        parts = response.iter_bytes()
        if not has_events:
            content = self._receive(parts, b"", None)
            return self._answer(content, content_type, response.headers)
        return self._read_events(parts, response.headers)

    def _read_events(self, parts: Iterator[bytes], head: Mapping[str, str]) -> Answer:
        unread = b""
        while True:
            while b"\n" not in unread:
                if len(unread) > _LONGEST_LINE:
                    msg = "an event without an end"
                    raise BadAnswer(msg)
                part = next(parts, b"")
                if not part:
                    msg = "the answer ended before its last event"
                    raise CutOff(msg)
                unread += part
            line, _, unread = unread.partition(b"\n")
            document = parsed(line)
            if document is None:
                msg = "a line of the answer is no event"
                raise BadAnswer(msg)
            if document.get("event") == "error":
                status = document.get("status")
                raise problem_of(
                    document, lower_case(document.get("headers")), status if isinstance(status, int) else 500
                )
            if document.get("event") == "result":
                length = document.get("length")
                if not isinstance(length, int) or not 0 <= length <= _MOST_ANSWER_BYTES:
                    msg = "a result without its length, or with one that no answer has"
                    raise BadAnswer(msg)
                content = self._receive(parts, unread, length)
                headers = {**head, **lower_case(document.get("headers"))}
                return self._answer(content, str(document.get("content_type", "")), headers)
            event = server_event(self._case, self.url, document)
            if event is not None:
                self.tell(event)
            self._check()

    def _receive(self, parts: Iterator[bytes], first: bytes, length: int | None) -> bytes:
        """The rest of an answer: ``length`` bytes, or all that comes up to TorchServe's bound."""
        most = _MOST_ANSWER_BYTES if length is None else length
        content = io.BytesIO(bytes(length or 0))  # in one piece from the start: growing leaves holes in the memory
        told = 0
        for part in itertools.chain([first], parts):
            if content.tell() + len(part) > most:
                msg = f"the answer has more than the {most} bytes that it said, or that any answer has"
                raise BadAnswer(msg)
            content.write(part)
            self._check()
            if content.tell() - told >= _TELL_BYTES:
                told = content.tell()
                self.tell(Event(self._case, Kind.RECEIVING, self.url, done=told, total=length or 0))
        if length is not None and content.tell() != length:
            msg = f"the answer ended after {content.tell()} of {length} bytes"
            raise CutOff(msg)
        return content.getvalue()

    def _answer(self, content: bytes, content_type: str, headers: Mapping[str, str]) -> Answer:
        plain = {name.lower(): value for name, value in headers.items()}
        return Answer(self._case, content, content_type.partition(";")[0].strip(), plain, self._id, self.url)

    def _check(self) -> None:
        self.stop.check()
        if time.monotonic() >= self.deadline:
            raise self._too_late()

    def _left(self, most: float = math.inf) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self._too_late()
        return min(left, most)

    @contextmanager
    def _watched(self, asked: Asked, line: Line) -> Iterator[None]:
        """End a wait for the beginning of an answer that is lost."""
        if not asked.streams:
            yield  # the question itself, or one like it
            return
        over = Stop()

        def watch() -> None:
            with suppress(ClientError), self.stop.telling(over.set):
                over.wait(self._left() * QUEUE_LOOK_SHARE)
                while not self._overtaken(asked, over):
                    over.wait(self._left() * QUEUE_LOOK_SHARE)
                over.wait(self.silence_s)  # its worker may still read it
                over.check()
                self._lost = True
                line.cut()

        threading.Thread(target=watch, name="watch", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _overtaken(self, asked: Asked, over: Stop) -> bool:
        """Whether a question that is put now is answered; waits for that as long again.

        Raises:
            Cancelled: the wait is over.
        """
        over.check()
        seconds = self._left() * QUEUE_LOOK_SHARE
        deadline = time.monotonic() + seconds
        exchange = Exchange(self.http, self.url, self.credentials, _ignore, over, deadline, self.silence_s, _ignore)
        question = {"describe": True, "timeout_s": seconds}
        try:
            exchange.answer(Asked(asked.case, asked.path, EMPTY, question, streams=False))
        except Cancelled:
            raise
        except ClientError as error:
            return isinstance(error, UnknownModel)
        return True

    def _too_late(self) -> TooLate:
        return TooLate("the client's deadline passed before the server had answered")

    def _timed_out(self, error: httpx.TimeoutException) -> ClientError:
        if isinstance(error, httpx.ConnectTimeout):
            return Unreachable(f"no connection within {CONNECT_S:.0f} s")
        if time.monotonic() >= self.deadline:
            return self._too_late()
        if isinstance(error, httpx.WriteTimeout):
            return Unreachable(f"the server took nothing of the image for {SEND_S:.0f} s")
        return Silent("the server said nothing for too long")

    def _named(self, error: ClientError) -> ClientError:
        error.case = error.case or self._case
        error.server = error.server or self.url
        if self._sent:  # else no server knows of it
            error.request_id = error.request_id or self._id
        return error


def _ignore(*_: object) -> None:
    pass


def _as_text(options: Mapping[str, object]) -> str:
    """Options as their header has them; NumPy's numbers and arrays are numbers and lists.

    Raises:
        WrongUse: they are no JSON, or too long.
    """
    try:
        text = json.dumps(options, separators=(",", ":"), allow_nan=False, default=lambda value: value.tolist())
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"options are numbers, texts and lists of them, none infinite: {ascii(dict(options))[:200]}"
        raise WrongUse(msg) from error
    if len(text) > MOST_OPTIONS_BYTES:
        msg = f"the options take {len(text)} bytes; a server takes at most {MOST_OPTIONS_BYTES}"
        raise WrongUse(msg)
    return text


def _tracing(line: Line) -> Callable[[str, Mapping[str, Any]], None]:
    """Tells the line of its connection, as httpcore makes it."""

    def trace(name: str, info: Mapping[str, Any]) -> None:
        if name.endswith((".connect_tcp.complete", ".start_tls.complete")):
            line.connected(info["return_value"].get_extra_info("socket"))

    return trace
