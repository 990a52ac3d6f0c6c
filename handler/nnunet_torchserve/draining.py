"""Draining a model: its workers refuse new requests and say when they have none left.

TorchServe loses requests when a worker is scaled away, a model unregistered or the server stopped, and has no way to
wait for them. ``nnunet-torchserve drain`` and the workers therefore speak through a private directory of the server:

- ``draining/<model>``, ``draining/<model>@<version>`` or ``draining/@all`` orders it; its content is JSON;
- ``workers/<pid>`` is written by each worker of a draining model, several times a second: whether it is idle, whether
  it works on a request that came before the order, and how many it has refused.

A worker is idle while TorchServe's loop waits for the first byte of a request, and not before: an answer that is still
being handed to the front end, or a request that is being taken from it, would be lost with the worker.

An order says after how many seconds a refused client shall come again; or, with ``together_s``, that all refused
clients shall come again together, when the clock next passes a multiple of that: for the rest of each such period
nobody comes who was refused, which is when a server may end.

Threads: one daemon thread a worker watches for the order; ``refuse`` is called by the worker's main thread, which alone
writes the two numbers that they share.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .errors import Draining

EVERY_MODEL = "@all"
ORDERS, REPORTS = "draining", "workers"
DEFAULT_RETRY_AFTER_S = 10

_LOOK_S = 0.1


def order_name(model: str | None, version: str | None = None) -> str:
    """The file that orders draining: of one version, of every version of a model, or of every model."""
    if model is None:
        return EVERY_MODEL
    return model if version is None else f"{model}@{version}"


class Gate:
    """One worker's view of the orders; without a directory nothing is ever drained."""

    def __init__(self, folder: Path | None, model: str, version: str) -> None:
        """Watch the orders for one model.

        Args:
            folder: the server's private directory.
            model: TorchServe's name of it, which need not be the archive's.
            version: TorchServe's version of it.
        """
        self._folder = folder
        names = (EVERY_MODEL, order_name(model), order_name(model, version))
        self._orders = [] if folder is None else [folder / ORDERS / name for name in names]
        self._took = False
        self._refused = 0

    def refuse(self) -> None:
        """Raise :class:`Draining` while an order stands."""
        for order in self._orders:
            try:
                text = order.read_text()
            except OSError:
                continue
            self._took = False
            self._refused += 1
            msg = "this model is being drained: it takes no new requests until the server has changed; come again"
            raise Draining(msg, retry_after_s(text, time.time()))
        self._took = True

    def report(self, is_idle: Callable[[], bool], wait: Callable[[float], object] | None = None) -> None:
        """Start to report, for as long as an order stands, whether this worker is idle.

        Args:
            is_idle: asked from another thread.
            wait: called between two looks, with seconds.
        """
        if self._folder is None:
            return
        file = self._folder / REPORTS / str(os.getpid())
        pause = wait or threading.Event().wait

        def watch() -> None:
            number = 0
            while True:
                if any(order.exists() for order in self._orders):
                    number += 1
                    idle = is_idle()
                    report = {
                        "report": number,
                        "idle": idle,
                        "works": self._took and not idle,
                        "refused": self._refused,
                    }
                    _write(file, json.dumps(report))
                elif number:
                    number = 0
                    file.unlink(missing_ok=True)
                pause(_LOOK_S)

        threading.Thread(target=watch, name="drain-watch", daemon=True).start()


def retry_after_s(order: str, now: float) -> int:
    """After how many seconds a client that is refused now shall come again.

    Args:
        order: its text.
        now: seconds of the wall clock.

    >>> [retry_after_s('{"together_s": 4}', now) for now in (8.0, 8.1, 10.5, 11.9)]
    [4, 4, 2, 1]
    """
    try:
        content = json.loads(order)
        if (period := content.get("together_s")) is not None:
            return max(1, math.ceil(float(period) - now % float(period)))
        return max(1, int(content["retry_after_s"]))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return DEFAULT_RETRY_AFTER_S


def _write(file: Path, text: str) -> None:
    """In one step; a directory that is gone belongs to a server that ends."""
    unfinished = file.with_name(f".{file.name}")
    try:
        unfinished.write_text(text)
        unfinished.replace(file)
    except OSError:
        return
