"""``serve --foreground``: this process stands for the server, as a container's process 1 or below a supervisor.

It answers for the server's health, takes leave of processes that ended, and turns SIGTERM and SIGINT into a stop that
loses nothing; a second signal ends the server at once. A handler does no more than to count, and to raise while the
server is still being started: then nobody has been promised anything.

Threads: the main one, which alone gets signals and waits for children; those of :mod:`.health_server`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from . import children, launcher
from .addresses import LOOPBACK
from .ending import stop, was_stopped
from .errors import ToolError
from .health import Health, Phase
from .health_server import DEFAULT_PORT, HealthServer
from .readiness import Tell
from .server import Server, runs
from .stopping import Outcome, stop_gracefully

_LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Watchfulness:
    """How a server in the foreground is looked after.

    Attributes:
        health_host, health_port: where its health is asked for.
        grace_s: seconds for what is in hand at a stop; ``None``: the longest response timeout of its models.
    """

    health_host: str = LOOPBACK
    health_port: int = DEFAULT_PORT
    grace_s: float | None = None


class _Stopped(Exception):
    """A signal arrived while the server was being started."""


class _Signals:
    """SIGTERM and SIGINT, counted."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.count = 0
        self.raises = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def _take(self, _signal: int, _frame: FrameType | None) -> Any:
        self.count += 1
        self._health.phase = Phase.STOPPING  # readiness falls at once
        if self.raises and self.count == 1:  # cleaning up takes a moment: once is enough
            raise _Stopped


def serve_in_foreground(
    request: launcher.ServeRequest, care: Watchfulness, started: Callable[[Server], object], warn: Tell, say: Tell
) -> Outcome:
    """Start a server and stay until it has been stopped.

    Args:
        request: what to serve, and how.
        care: how it is looked after.
        started: told when every worker is READY.
        warn: told what a person should know although it goes on.
        say: told what a stop waits for.

    Returns:
        How it was stopped.

    Raises:
        ToolError: it could not be started, or ended by itself.
    """
    children.become_subreaper()
    health = Health(request.state_dir, Phase.LOADING)
    signals = _Signals(health)
    try:
        answering = HealthServer(health, care.health_host, care.health_port)
        answering.start()

        def tell(progress: str) -> None:
            health.progress = progress

        server = launcher.start(request, warn, tell, answering.url)
        signals.raises = False
    except _Stopped:
        stop(request.state_dir)  # it may have arrived a moment after the start
        return Outcome(was_running=False)
    health.look()  # so that it is ready when that is said
    health.phase = Phase.SERVING
    if signals.count:  # a moment ago
        health.phase = Phase.STOPPING
    else:
        started(server)
    if _wait(server, request.state_dir, signals):
        return Outcome(was_running=True)
    outcome = stop_gracefully(request.state_dir, care.grace_s, lambda: signals.count > 1, children.reap, say)
    children.reap()
    return outcome


def _wait(server: Server, state_dir: Path, signals: _Signals) -> bool:
    """Wait for a signal; returns whether somebody else has stopped the server before one came.

    Raises:
        ToolError: it ended by itself.
    """
    process = server.process()
    while not signals.count:
        children.reap()
        if process is None or not runs(process):
            if was_stopped(state_dir):
                return True
            msg = f"TorchServe ended by itself; see {server.log_dir}"
            raise ToolError(msg)
        time.sleep(_LOOK_S)
    return False
