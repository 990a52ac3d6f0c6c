"""Whether a server is well, for whoever has to restart it or to send it requests.

*Live* is a server that need not be restarted: the JVM answers, and no model has been without a worker for longer than
TorchServe tries to bring one back. A busy server is live, however long its cases take, and so is one whose GPU is out.
*Ready* is one that can take a request: every worker of every model is READY, an engine of each model greets, nothing
drains it.

Nothing of this goes through a worker, whose requests may take minutes. It is seen by three looks, which
:mod:`.health_server` repeats, each in a thread of its own, and ``nnunet-torchserve health`` has once where there is no
such server: the management API answers; what it says of the workers (which on a GPU machine runs ``nvidia-smi`` once
for each of them, so that it is not asked too often); and the engines' hello. Each look replaces what it has seen before
in one assignment; judging reads those, and what is known at once: signals, orders, processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx
import psutil

from nnunet_torchserve.draining import EVERY_MODEL, ORDERS, order_name
from nnunet_torchserve.engine.folder import living
from nnunet_torchserve.engine.greeting import greets
from nnunet_torchserve.engine.roster import Used, engines_of

from .management import management
from .orders import Descriptions, Target
from .probes import Probe, Verdict
from .server import Server, read_state, runs

ANSWER_S = 0.8
"""For the JVM to answer: a probe is answered within a second, whatever the JVM does."""

DESCRIPTION_S = 15.0
"""For what it says of the workers. It is not asked again before it has answered."""

HELLO_S = 2.0

AWAY_S = 900.0
"""TorchServe tries for 300 s to start a worker again (``maxRetryTimeoutInSec``), which may take 600 s to load
(``startupTimeout``). One that is not READY by then will never be."""

OLD_S = 1.5
"""Of what the JVM said last: then a probe waits for the look that is under way. It is looked at every second, so that
no probe waits for one that answers."""

VERY_OLD_S = 60.0
"""Of the other looks, which take as long as there are workers and engines."""


Version = tuple[str, str]
"""Of a model: its name and version."""


class Phase(StrEnum):
    """What ``serve`` is at."""

    LOADING = "loading"
    SERVING = "serving"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as the management API has it.

    Attributes:
        model, version: that it serves.
        number: TorchServe's, which stays when its process is replaced.
        pid: of its process.
        is_ready: its status was READY.
    """

    model: str
    version: str
    number: str
    pid: int
    is_ready: bool

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it for as long as TorchServe has it."""
        return self.model, self.version, self.number

    @property
    def serves(self) -> bool:
        """Whether it is READY and its process is there still."""
        try:
            return self.is_ready and runs(psutil.Process(self.pid))
        except psutil.NoSuchProcess:
            return False


class Health:
    """The health of the server of a state directory."""

    def __init__(self, state_dir: Path, phase: Phase | None = None) -> None:
        """Begin with nothing seen.

        Args:
            state_dir: of the server, which need not have been started yet.
            phase: what this process is at with it; ``None``: somebody else started it, and its state says so.
        """
        self._state_dir = state_dir
        self.phase = phase
        self.progress = "TorchServe is being started"
        self._found: tuple[Server, psutil.Process, httpx.Client] | None = None
        self._front_end: tuple[float, str] = (-math.inf, "nothing is known of the JVM yet")
        self._workers: tuple[float, Mapping[Version, Sequence[Worker]]] = (-math.inf, {})
        self._engines: tuple[float, Mapping[str, int | None]] = (-math.inf, {})
        self._away: dict[tuple[str, str, str], float] = {}
        self._descriptions: Descriptions | None = None

    def close(self) -> None:
        """Let connections go."""
        if self._found is not None:
            self._found[2].close()
            self._found = None

    # -- looks --------------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """All three, the one that gets old soonest again at the end."""
        self.look_at_front_end()
        self.look_at_workers()
        self.look_at_engines()
        self.look_at_front_end()

    def look_at_front_end(self) -> None:
        """Ask the JVM for something that costs it nothing."""
        self._find()
        found = self._found
        trouble = "the JVM is not running" if found is None else _trouble_of(found[2])
        self._front_end = (time.monotonic(), trouble)

    def look_at_workers(self) -> None:
        """Ask the JVM for its workers; what it said before stays if it does not answer."""
        server = self._server
        if server is None:
            return
        target = Target(server.management_url, Path(server.control_dir))
        descriptions = self._descriptions
        if descriptions is None or descriptions.target != target:
            descriptions = self._descriptions = Descriptions(target)
        states = descriptions.take(DESCRIPTION_S)
        if not isinstance(states, list):
            return
        seen: dict[Version, list[Worker]] = {}
        try:
            for state in states:
                model, version = str(state["modelName"]), str(state["modelVersion"])
                seen[model, version] = [
                    Worker(model, version, str(each["id"]), int(each["pid"]), each["status"] == "READY")
                    for each in state["workers"]
                ]
        except (KeyError, ValueError, TypeError):
            return
        now = time.monotonic()
        self._workers = (now, seen)
        absent = [each for workers in seen.values() for each in workers if not each.is_ready]
        self._away = {each.key: self._away.get(each.key, now) for each in absent}

    def look_at_engines(self) -> None:
        """Listen for the hello of each engine that a worker uses."""
        used = {each.folder for engines in self._used().values() for each in engines}
        heard = {folder: _greeting(Path(folder)) for folder in sorted(used)}
        self._engines = (time.monotonic(), heard)

    @property
    def has_old_news(self) -> bool:
        """Whether what the JVM said last is so old that it is better to wait for the look that is under way."""
        return self.phase is not Phase.LOADING and time.monotonic() - self._front_end[0] > OLD_S

    @property
    def wants_workers(self) -> bool:
        """Whether something has changed, or is about to, so that the workers are to be looked at again soon."""
        workers = [worker for own in self._workers[1].values() for worker in own]
        return not workers or not all(worker.serves for worker in workers)

    # -- verdicts -----------------------------------------------------------------------------------------------------

    def verdict(self, probe: Probe) -> Verdict:
        """Answer a probe from what was seen last."""
        return self._live() if probe is Probe.LIVE else self._ready()

    def _live(self) -> Verdict:
        if self._is_loading():
            return Verdict(True, "loading", self.progress)
        if trouble := self._trouble_of_front_end():
            return Verdict(False, "front_end", trouble)
        seen, by_version = self._workers  # by the clock of the last look: what is not known kills no server
        for (model, version), workers in by_version.items():
            away = [seen - self._away.get(worker.key, seen) for worker in workers]
            if away and min(away) > AWAY_S:
                lost = f"every worker of {model}/{version} has been away for {min(away):.0f} s"
                return Verdict(False, "workers", f"{lost}: TorchServe does not start them any more")
        return Verdict(True, "ok", "the JVM answers, and no model has lost every worker")

    def _ready(self) -> Verdict:
        if self._is_loading():
            return Verdict(False, "loading", self.progress)
        if self.phase is Phase.STOPPING:
            return Verdict(False, "stopping", "the server stops: it takes no new requests")
        if trouble := self._trouble_of_front_end():
            return Verdict(False, "front_end", trouble)
        seen, workers = self._workers
        if time.monotonic() - seen > VERY_OLD_S:
            return Verdict(False, "workers", "nothing is known of the workers")
        return (
            self._drained(workers) or self._without_workers(workers) or self._without_engine(workers) or _well(workers)
        )

    def _is_loading(self) -> bool:
        if self.phase is None:
            server = self._server
            return server is not None and not server.ready
        return self.phase is Phase.LOADING

    def _trouble_of_front_end(self) -> str:
        """Why the JVM is of no use; empty if it is."""
        at, trouble = self._front_end
        if trouble:
            return trouble
        age = time.monotonic() - at
        return f"the JVM has not answered for {age:.1f} s" if age > OLD_S + ANSWER_S else ""

    def _drained(self, workers: Mapping[Version, Sequence[Worker]]) -> Verdict | None:
        server = self._server
        if server is None:
            return None
        orders = Path(server.control_dir) / ORDERS
        if (orders / EVERY_MODEL).exists():
            return Verdict(False, "draining", "every model is being drained")
        for model in {name for name, _ in workers}:
            own = [version for name, version in workers if name == model]
            if (orders / order_name(model)).exists() or all((orders / order_name(model, v)).exists() for v in own):
                return Verdict(False, "draining", f"{model} is being drained")
        return None

    def _without_workers(self, workers: Mapping[Version, Sequence[Worker]]) -> Verdict | None:
        if not workers:
            return Verdict(False, "workers", "there is no model")
        for (model, version), own in workers.items():
            serving = sum(worker.serves for worker in own)
            if serving < len(own):
                return Verdict(False, "workers", f"{serving} of {len(own)} workers of {model}/{version} are READY")
            if not own and not any(others for (name, _), others in workers.items() if name == model):
                return Verdict(False, "workers", f"{model} has no workers")
        return None

    def _without_engine(self, workers: Mapping[Version, Sequence[Worker]]) -> Verdict | None:
        at, heard = self._engines
        if time.monotonic() - at > VERY_OLD_S:
            return Verdict(False, "engine", "nothing is known of the engines")
        for (model, version), engines in self._used().items():
            if (model, version) in workers and not any(
                heard.get(each.folder) is not None and heard[each.folder] == living(Path(each.folder))
                for each in engines
            ):
                devices = " and ".join(sorted({each.device for each in engines}))
                return Verdict(False, "engine", f"no engine of {model}/{version} on {devices} says hello")
        return None

    def _used(self) -> dict[Version, set[Used]]:
        """The engines of each model version that has workers of ours."""
        server = self._server
        if server is None:
            return {}
        control, used = Path(server.control_dir), {}
        for version, workers in self._workers[1].items():
            if engines := engines_of(control, [worker.pid for worker in workers]):
                used[version] = set(engines.values())
        return used

    @property
    def _server(self) -> Server | None:
        """The server whose JVM was there when it was last looked at."""
        found = self._found
        return None if found is None else found[0]

    def _find(self) -> None:
        """Look for the server and its JVM, if the last one is not there any more."""
        if self._found is not None and runs(self._found[1]):
            return
        self.close()
        server = read_state(self._state_dir)
        process = None if server is None else server.process()
        if server is not None and process is not None:
            self._found = server, process, management(server.management_url, Path(server.control_dir), ANSWER_S)


def _greeting(folder: Path) -> int | None:
    """The process id of the engine that says hello there; ``None`` if none does, or if it is another one meanwhile."""
    process = living(folder)
    return process if greets(folder, HELLO_S) and living(folder) == process else None


def _trouble_of(client: httpx.Client) -> str:
    """Why a JVM is of no use; empty if it answers."""
    try:
        answer = client.get("/models", params={"limit": 1})
    except httpx.TimeoutException:
        return f"the JVM does not answer within {ANSWER_S:g} s"
    except httpx.HTTPError as error:
        return f"the JVM does not answer: {type(error).__name__}"
    return f"the JVM's management API answers with {answer.status_code}" if answer.is_error else ""


def _well(workers: Mapping[Version, Sequence[Worker]]) -> Verdict:
    counts = ", ".join(f"{len(own)} workers of {model}/{version}" for (model, version), own in sorted(workers.items()))
    return Verdict(True, "ok", f"{counts} are READY")
