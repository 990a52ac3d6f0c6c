"""A worker that has nothing to do keeps an engine there.

Without it the next request would start the engine that died while nobody asked, or notice that it hangs. But a server
whose engine is gone is not ready, gets no requests because of that, and would stay so. One thread; what it does under
the engine's lock takes a moment only, since a request may come at any time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .greeting import greets
from .remote import SILENCE_S, RemoteEngine

logger = logging.getLogger(__name__)

LOOK_S = 1.0
LISTEN_S = 10.0
"""Between two hellos that are asked for, of an engine that lives."""

_MAX_SILENCES = 2
_AFTER_FAULT_S = 60.0


class Keeper:
    """Looks after the engine of one worker."""

    def __init__(self, engine: RemoteEngine, wait: Callable[[float], object] = time.sleep) -> None:
        """Look after ``engine``; ``wait`` is called between two looks, with seconds."""
        self._engine, self._wait = engine, wait
        self._listened = time.monotonic()
        self._silences = 0

    def start(self) -> None:
        """Begin, in a thread of its own."""
        threading.Thread(target=self._run, name="engine-keeper", daemon=True).start()

    def _run(self) -> None:
        while True:
            self._wait(LOOK_S)
            try:
                self.look()
            except Exception:
                logger.exception("the engine is not looked after for a while")
                self._wait(_AFTER_FAULT_S)

    def look(self) -> None:
        """See that there is an engine and, now and then, that it greets."""
        if not self._engine.keep():
            self._silences = 0
            return
        if time.monotonic() - self._listened < LISTEN_S:
            return
        self._silences = 0 if greets(self._engine.folder, SILENCE_S) else self._silences + 1
        self._listened = time.monotonic()
        if self._silences >= _MAX_SILENCES:
            logger.warning("the engine does not greet any more: it is killed")
            self._silences = 0
            self._engine.give_up()
