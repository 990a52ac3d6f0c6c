"""What a client knows of its model: asked for once, by whoever wants it first, and kept until it is forgotten.

Threads: any number; one of them asks, and the others wait for that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .answers import Answer
from .description import Description, read_description
from .events import Event, Kind, Listener
from .stopping import Stop

_PATIENT_S = 5.0
"""After which a person is told that the description waits in the server's queue."""

_LOOK_S = 0.1
"""Between two looks at whether a caller that waits for another one's description still wants it."""

logger = logging.getLogger(__name__)


class KnownDescription:
    """The description of one model, once a server has given it."""

    def __init__(self, model: str) -> None:
        """``model``: its name on the server."""
        self._model = model
        self._description: Description | None = None
        self._asking = threading.Lock()

    def get(self, ask: Callable[[Listener], Answer], tell: Listener, stop: Stop) -> Description:
        """The description, asked for if it is not known.

        Args:
            ask: asks a server, and tells what happens meanwhile.
            tell: is told it too.
            stop: ends the wait for another caller's question.

        Raises:
            Cancelled: see ``stop``.
            BadAnswer: the answer is no description.
            ClientError: what ``ask`` raises.
        """
        with self._alone(stop):
            description = self._description
            if description is None:
                with self._saying_if_it_waits(tell) as told:
                    answer = ask(told)
                self._description = description = read_description(answer)
            return description

    def forget(self, description: Description) -> None:
        """Let whoever wants a description next ask anew, unless somebody has done so already."""
        if self._description is description:
            self._description = None

    @contextmanager
    def _alone(self, stop: Stop) -> Iterator[None]:
        """One caller asks; others wait for that, each for as long as it wants to."""
        stop.check()
        while not self._asking.acquire(timeout=_LOOK_S):
            stop.check()
        try:
            yield
        finally:
            self._asking.release()

    @contextmanager
    def _saying_if_it_waits(self, tell: Listener) -> Iterator[Listener]:
        """Logs a warning if the last event is, for a while, that the question waits in the server's queue."""
        alarm: threading.Timer | None = None

        def say() -> None:
            logger.warning("the question what model %s is waits in the server's queue, behind cases", self._model)

        def told(event: Event) -> None:
            nonlocal alarm
            if alarm is not None:
                alarm.cancel()
            alarm = threading.Timer(_PATIENT_S, say) if event.kind is Kind.WAITING else None
            if alarm is not None:
                alarm.daemon = True
                alarm.start()
            tell(event)

        try:
            yield told
        finally:
            if alarm is not None:
                alarm.cancel()
