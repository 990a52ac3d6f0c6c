"""Wait until every worker of every model can answer, and notice when one never will."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from .errors import ToolError
from .management import management
from .model_store import Archive
from .server import Server
from .worker_log import Death, early_deaths, load_failure

READY_TIMEOUT_S = 600.0
MAX_SILENT_DEATHS = 3
"""Of one worker that says nothing when it dies. One death can be the system's out-of-memory killer while many workers
load at once, and TorchServe starts that worker again; now and then it kills the new one by mistake."""

_LAST_WORDS_S = 1.0
"""A dead worker's last words may reach the log after TorchServe's note of its death."""

_POLL_S = 0.2
_ANSWER_S = 5.0
_LOG_TAIL_LINES = 15

Tell = Callable[[str], None]


def wait_ready(
    server: Server,
    workers: Mapping[Archive, int],
    started: Mapping[Archive, int],
    warn: Tell,
    tell: Tell,
    timeout_s: float = READY_TIMEOUT_S,
) -> None:
    """Poll the management API: ``/ping`` says Healthy before a worker can answer.

    Args:
        server: the one that was started.
        workers: as many as there shall be.
        started: as many as TorchServe starts by itself.
        warn: is told of workers that died and are started again.
        tell: is told how many workers are ready, when that changes.
        timeout_s: for all of them.

    Raises:
        ToolError: TorchServe ended, refused an archive, or a worker cannot load its model.
    """
    deadline = time.monotonic() + timeout_s
    waiting = dict(workers)
    resized: set[Archive] = set()
    ready = dict.fromkeys(workers, 0)
    watch = _Watch(server, warn)
    said = -1
    with management(server.management_url, Path(server.control_dir), _ANSWER_S) as client:
        while waiting:
            for archive, count in list(waiting.items()):
                state = _model_state(client, archive)
                if state is None:
                    continue
                if not state:
                    msg = f"TorchServe refused {archive.file}: {_load_warning(Path(server.log_dir), archive.file)}"
                    raise ToolError(msg)
                if count != started[archive] and archive not in resized and _resize(client, archive, count):
                    resized.add(archive)
                statuses = [worker["status"] for worker in state["workers"]]
                ready[archive] = min(count, statuses.count("READY"))
                if len(statuses) == count and set(statuses) == {"READY"}:
                    del waiting[archive]
            if sum(ready.values()) != said:
                said = sum(ready.values())
                tell(f"{said} of {sum(workers.values())} workers are ready")
            if not waiting:
                return
            watch.look()
            if time.monotonic() > deadline:
                names = ", ".join(archive.name for archive in waiting)
                limit = f"{timeout_s:g} s (--ready-timeout)"
                msg = f"not every worker of {names} was ready after {limit}; see {server.log_dir}"
                raise ToolError(msg)
            time.sleep(_POLL_S)


def tail(file: Path) -> str:
    """The end of a log."""
    with suppress(OSError):
        return "\n".join(file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    return "(no log)"


class _Watch:
    """Looks for what will not become ready. A worker that says why it ends is believed at once."""

    def __init__(self, server: Server, warn: Tell) -> None:
        self._server = server
        self._log_dir = Path(server.log_dir)
        self._warn = warn
        self._first_seen: dict[tuple[str, int], float] = {}
        self._warned: set[tuple[str, int]] = set()

    def look(self) -> None:
        """Raise :class:`ToolError` if a start has failed; warn of a silent death."""
        lines = _lines(self._log_dir / "ts_log.log")
        if reason := load_failure(lines):
            msg = f"a model cannot be served: {reason}"
            raise ToolError(msg)
        for death in early_deaths(lines):
            self._judge(death)
        if self._server.process() is None:
            msg = f"TorchServe ended while it started:\n{tail(self._log_dir / 'torchserve.out')}"
            raise ToolError(msg)

    def _judge(self, death: Death) -> None:
        if death.reason:
            msg = (
                f"{death.worker} died before it had loaded its model: {death.reason} "
                f"(see {self._log_dir / 'model_log.log'})"
            )
            raise ToolError(msg)
        this = (death.worker, death.count)
        now = time.monotonic()
        if now < self._first_seen.setdefault(this, now) + _LAST_WORDS_S or this in self._warned:
            return
        self._warned.add(this)
        said = f"what was said last: {death.hint}" if death.hint else "it was killed, or ended without a word"
        if death.count >= MAX_SILENT_DEATHS:
            msg = (
                f"{death.worker} died {death.count} times before it had loaded its model; {said}; "
                f"is there memory for as many workers? See {self._log_dir}"
            )
            raise ToolError(msg)
        self._warn(f"{death.worker} died before it had loaded its model; {said}; TorchServe tries again")


def _resize(client: httpx.Client, archive: Archive, count: int) -> bool:
    """Order that many workers; whether TorchServe has taken the order."""
    path = f"/models/{archive.name}/{archive.version}"
    try:
        scaled = client.put(path, params={"min_worker": count, "max_worker": count})
    except httpx.TransportError:
        return False
    if scaled.is_error:
        msg = f"TorchServe would not start {count} workers of {archive.name}: {scaled.text}"
        raise ToolError(msg)
    return True


def _model_state(client: httpx.Client, archive: Archive) -> dict[str, Any] | None:
    """A model as the management API describes it.

    ``None`` while the API does not answer; empty if there is no such model. TorchServe unpacks the archives of its
    command line before it opens its ports, so what is missing then was refused.
    """
    try:
        answer = client.get(f"/models/{archive.name}/{archive.version}")
    except httpx.TransportError:
        return None
    if answer.status_code == httpx.codes.NOT_FOUND:
        return {}
    if answer.status_code != httpx.codes.OK:
        return None
    state: dict[str, Any] = answer.json()[0]
    return state


def _load_warning(log_dir: Path, file: str) -> str:
    """TorchServe's own reason for refusing an archive."""
    lines = _lines(log_dir / "ts_log.log")
    for number, line in enumerate(lines):
        if file in line and "Failed to load model" in line:
            return " ".join(lines[number : number + 2]).partition("Failed to load model: ")[2]
    return f"see {log_dir}"


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text(encoding="utf-8", errors="replace").split("\n")
    return []
