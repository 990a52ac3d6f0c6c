"""A request's progress as a stream of events: what ``stream: true`` asks for.

One event is one line of JSON. The stream begins with the first event that there is to tell: that the case waits for
memory, or, where it need not wait, that its voxels are read. A problem before that is an ordinary response with its
status; after it the last event is an error with the same problem. The bytes of the result follow their event.

Threads. The thread that answers the request sends the events; from the first one on a second thread sends a heartbeat
where nothing was sent for ``HEARTBEAT_S``. One lock is held around every send and around what says when the last one
was; no other thread ever waits for it. The second thread has ended before the response is returned. It falls silent
some time after the request's deadline: the front end counts silence, and must notice a worker that hangs.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from http import HTTPStatus
from typing import Protocol

from .engine.prediction import Watcher
from .errors import BadOption
from .responses import Response
from .telemetry import Stage

HEARTBEAT_S = 5.0
"""Clients are promised one within 10 s."""

_GRACE_S = 10.0
"""After the deadline: the problem document that says so is on its way."""

logger = logging.getLogger(__name__)


Send = Callable[[Response], None]
"""Sends a part of one response to the client; all parts have one head. ``OSError``: nobody takes it any more."""


class Progress(Protocol):
    """What the pipeline tells of a request."""

    @property
    def watcher(self) -> Watcher | None:
        """Whom the engine tells."""

    def stage(self, stage: Stage, total: int = 1, member: str | None = None) -> AbstractContextManager[None]:
        """The ``with`` block is a stage of so many steps, of one member where there are several."""


class _Unwatched:
    """Nobody asked."""

    watcher: Watcher | None = None

    def stage(
        self,
        stage: Stage,  # noqa: ARG002 (see Progress)
        total: int = 1,  # noqa: ARG002
        member: str | None = None,  # noqa: ARG002
    ) -> AbstractContextManager[None]:
        return nullcontext()


UNWATCHED: Progress = _Unwatched()


class EventStream:
    """The events of one request."""

    def __init__(self, send: Send | None, head: Response) -> None:
        """Send nothing yet.

        Args:
            send: where the events go; ``None`` where there is no way for them.
            head: of the response that the events make up.
        """
        self._send_part, self._head = send, head
        self._deadline = time.monotonic()
        self._total = 0
        self._member: str | None = None
        self._last_event: dict[str, object] = {}
        self._sent_at = 0.0
        self._ended = self._broken = False
        self._changed = threading.Condition()
        self._heart: threading.Thread | None = None

    def watched(self, deadline: float) -> Progress:
        """Events were asked for.

        Args:
            deadline: ``time.monotonic()`` at which the request is given up.

        Raises:
            BadOption: there is no way for them.
        """
        if self._send_part is None:
            msg = "option stream: this way of asking has no place for events; leave it out, or ask over HTTP"
            raise BadOption(msg)
        self._deadline = deadline
        return self

    @property
    def watcher(self) -> Watcher | None:
        """The stream itself."""
        return self

    def queued(self, ahead: int) -> None:
        """See :class:`~.engine.prediction.Watcher`."""
        self._tell({"event": "queued", "position": ahead})

    def passes(self, done: int) -> None:
        """See :class:`~.engine.prediction.Watcher`."""
        self._tell(_progress(Stage.NETWORK, done, self._total, self._member))

    @contextmanager
    def stage(self, stage: Stage, total: int = 1, member: str | None = None) -> Iterator[None]:
        """Tell that a stage begins, and that it is done unless the block raises."""
        self._total, self._member = total, member
        self._tell(_progress(stage, 0, total, member))
        yield
        self._tell(_progress(stage, total, total, member))

    def end(self, response: Response) -> Response:
        """Send what comes before the last bytes, if there were events; no event follows.

        Returns:
            What is left to be sent, by whoever sends responses: ``response`` itself if there was no event, else the
            last part of the stream.
        """
        if self._heart is None:
            return response
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._heart.join()
        if response.status is not HTTPStatus.OK:
            return replace(self._head, body=_line(_error(response)))
        with self._changed:  # a part of its own: no second copy of a large result
            self._send(_result(response))
        return replace(self._head, body=response.body)

    def _tell(self, event: dict[str, object]) -> None:
        """Send an event, unless it is the last one again."""
        if event == self._last_event:
            return
        self._last_event = event
        with self._changed:
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
                self._heart.start()
            self._send(event)

    def _beat(self) -> None:
        with self._changed:
            while not (self._ended or self._broken) and time.monotonic() < self._deadline + _GRACE_S:
                pause = self._sent_at + HEARTBEAT_S - time.monotonic()
                if pause > 0:
                    self._changed.wait(pause)
                else:
                    self._send({"event": "heartbeat"})

    def _send(self, event: dict[str, object]) -> None:
        """With the lock held. What nobody takes costs the request nothing: the front end decides what becomes of it."""
        if self._broken or self._send_part is None:
            return
        try:
            self._send_part(replace(self._head, body=_line(event)))
        except Exception:
            self._broken = True
            logger.exception("no event can be sent any more")
        self._sent_at = time.monotonic()


def _progress(stage: Stage, done: int, total: int, member: str | None) -> dict[str, object]:
    event: dict[str, object] = {"event": "progress", "stage": stage, "done": done, "total": total}
    return event if member is None else event | {"member": member}


def _result(response: Response) -> dict[str, object]:
    return {
        "event": "result",
        "status": int(response.status),
        "content_type": response.content_type,
        "length": len(response.body),
        "headers": response.headers,
    }


def _error(response: Response) -> dict[str, object]:
    return {"event": "error", **json.loads(response.body), "headers": response.headers}


def _line(event: dict[str, object]) -> bytes:
    return json.dumps(event, ensure_ascii=True).encode("ascii") + b"\n"
