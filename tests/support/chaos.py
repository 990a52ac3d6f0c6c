"""A live server under faults: its engines and workers seen from outside, and clients that all ask at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import numpy as np
import psutil
import pytest

from nnunet_torchserve.bundle import BUNDLE_FILE
from nnunet_torchserve.cases import network_grid
from nnunet_torchserve.engine.faults import Entry, Hold
from nnunet_torchserve.engine.folder import LOG
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE
from nnunet_torchserve.member import Member
from nnunet_torchserve_tools.server import runs

from . import volumes
from .server import LiveServer, running

PATIENCE_S = 300.0
"""For anything that has to happen, on a machine that does much else."""

SPACING = (1.5, 1.5, 1.5)
"""Of the model ``five_folds``: the network's grid is the image's."""

HOLD = "hold"
"""A file in a server's folder: while it is there, cases are held."""

_ENGINE = "nnunet_torchserve.engine.process"
_MEMORY = "/memfd:nnunet-"
_POLL_S = 0.02


def wait_for(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Poll until ``condition`` holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {within_s:.0f} s"
        time.sleep(_POLL_S)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process is gone, or a zombie that nobody has reaped yet."""
    return not runs(process)


def shared_memory(processes: Iterable[psutil.Process], kind: str = "") -> set[int]:
    """The inodes of our shared memory that these processes hold; ``kind`` as in ``nnunet-<kind>``."""
    found = set()
    for process in processes:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    if str(descriptor.readlink()).startswith(_MEMORY + kind):
                        found.add(descriptor.stat().st_ino)
    return found


@dataclass(frozen=True)
class Engine:
    """An engine process and its directory."""

    process: psutil.Process
    folder: Path
    model: str

    @property
    def cases(self) -> int:
        """Cases whose logits it is summing."""
        return len(shared_memory([self.process], "logits"))

    @property
    def reserved_bytes(self) -> int:
        """Memory that it has granted to cases."""
        return int((self.folder / "holds-host").read_text().split()[0])

    @property
    def log(self) -> str:
        """What it and the engines before it have written."""
        return (self.folder / LOG).read_text()

    @property
    def starts(self) -> int:
        """How many engines have loaded their networks there so far."""
        return self.log.count(" ready: ")

    def tally(self) -> BinaryIO:
        """What it counts, opened; it can still be read when the engine is gone."""
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(OSError):
                if str(descriptor.readlink()).startswith(f"{_MEMORY}tally"):
                    return descriptor.open("rb")
        msg = "this engine has no tally"
        raise ProcessLookupError(msg)

    def kill(self) -> None:
        """Kill it and wait until its successor may start."""
        self.process.kill()
        wait_for(lambda: has_ended(self.process))


def engine_processes(runtime: Path) -> list[psutil.Process]:
    """The engine processes of a runtime directory."""
    return [process for process, _ in _commands(runtime)]


def _commands(runtime: Path) -> list[tuple[psutil.Process, list[str]]]:
    """Each engine's process, and what follows the module's name in its command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or [""]
        if _ENGINE in line[0]:
            line = line[0].split(" ")  # of a warm one: a title, and no arguments
        if _ENGINE in line and str(runtime) in line[line.index(_ENGINE) + 1]:
            found.append((process, line[line.index(_ENGINE) + 1 :]))
    return found


def engines(runtime: Path, model: str | None = None) -> list[Engine]:
    """The engines of a runtime directory, or those of ``name/version``."""
    found = [
        Engine(process, Path(folder), _model(Path(model_dir)))
        for process, (folder, model_dir, *_) in _commands(runtime)
    ]
    return [engine for engine in found if model in (None, engine.model)]


def _model(model_dir: Path) -> str:
    try:
        description = json.loads((model_dir / BUNDLE_FILE).read_text())
    except FileNotFoundError:
        return "unregistered"
    return f"{description['name']}/{description['version']}"


def family(runtime: Path) -> list[psutil.Process]:
    """Every process that was started for a server of this runtime directory: JVM, workers, engines."""
    found = [engine for engine in engine_processes(runtime) if not has_ended(engine)]
    title = f"{RUNTIME_DIR_VARIABLE}={runtime} "  # of a warm one
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get(RUNTIME_DIR_VARIABLE) == str(runtime)
            ours = ours or " ".join(process.cmdline()).startswith(title)
            if ours and process.pid != os.getpid() and process not in found and not has_ended(process):
                found.append(process)
    return found


@dataclass(frozen=True)
class Case:
    """A request for the model ``five_folds``.

    Attributes:
        shape: (x, y, z) voxels.
        seed: of its voxels.
        options: as JSON.
    """

    shape: tuple[int, int, int]
    seed: int = 0
    options: str = '{"use_mirroring": false}'

    @cached_property
    def body(self) -> bytes:
        """The image."""
        image, _ = volumes.blobs(self.shape, self.seed)
        return volumes.nifti_gz(image.astype(np.int16), np.diag([*SPACING, 1.0]))

    def grid(self, member: Member) -> tuple[int, int, int, int]:
        """(C, z, y, x) on the network's grid, by which faults know a case."""
        return (1, *network_grid(member, self.shape[::-1], SPACING[::-1]))

    def slow(self, member: Member, pass_s: float) -> Hold:
        """Each pass of a case of this size takes so much longer, and needs no processor meanwhile."""
        return Hold(shape=self.grid(member), pass_s=pass_s)

    def held(self, member: Member, folder: Path) -> Hold:
        """While :meth:`ChaosServer.held` says so, each pass of a case of this size waits for a second.

        Args:
            member: of the model.
            folder: the server's, as :func:`serving` gets it.
        """
        return Hold(shape=self.grid(member), pass_s=1.0, while_exists=folder / HOLD)


@dataclass(frozen=True)
class ChaosServer:
    """A live server with a runtime directory of its own, and what may be done to it."""

    live: LiveServer
    runtime: Path
    holds: bool = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """For the length of the block the cases of :meth:`Case.held` stay in their engine."""
        assert self.holds, "nothing is held on this server"
        file = self.runtime.with_name(HOLD)
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    def engine(self, model: str) -> Engine:
        """The one engine of ``name/version``."""
        [engine] = engines(self.runtime, model)
        return engine

    def workers(self, model: str) -> dict[int, str]:
        """Process id -> status of each worker of ``name[/version]``."""
        answer = self._manage("GET", model)
        return {int(worker["pid"]): worker["status"] for worker in answer.json()[0]["workers"]}

    def wait_ready(self, model: str, count: int, without: Sequence[int] = ()) -> None:
        """Wait until a model has so many workers, all READY and none of those ``without``."""

        def is_ready() -> bool:
            workers = self.workers(model)
            return len(workers) == count and set(workers.values()) == {"READY"} and not workers.keys() & set(without)

        wait_for(is_ready)

    def scale(self, model: str, count: int) -> None:
        """Set the number of workers, and wait until there are as many."""
        sizes = {"min_worker": str(count), "max_worker": str(count), "synchronous": "true"}
        self._manage("PUT", model, sizes)
        self.wait_ready(model, count)

    def register(self, file: str, workers: int) -> None:
        """Register an archive of the model store."""
        start = {"url": file, "initial_workers": str(workers), "synchronous": "true"}
        url = f"{self.live.server.management_url}/models"
        httpx.post(url, params=start, timeout=PATIENCE_S, trust_env=False).raise_for_status()

    def unregister(self, model: str) -> None:
        """Unregister ``name/version``."""
        self._manage("DELETE", model)

    def _manage(self, verb: str, model: str, parameters: dict[str, str] | None = None) -> httpx.Response:
        url = f"{self.live.server.management_url}/models/{model}"
        answer = httpx.request(verb, url, params=parameters, timeout=PATIENCE_S, trust_env=False)
        return answer.raise_for_status()


Pending = Future[httpx.Response]


class Clients:
    """Clients that wait for an answer each, at the same time, and never ask twice."""

    def __init__(self, server: ChaosServer, pool: ThreadPoolExecutor) -> None:
        self._server, self._pool = server, pool
        self._alone: dict[tuple[Case, str], bytes] = {}
        self._sent: list[Pending] = []

    def send(self, case: Case, model: str) -> Pending:
        """Ask, and do not wait."""
        self._sent.append(self._pool.submit(self.ask, case, model))
        return self._sent[-1]

    def send_all(self, cases: Iterable[Case], model: str) -> list[Pending]:
        """Ask for each, and do not wait."""
        return [self.send(case, model) for case in cases]

    def settle(self) -> None:
        """Wait until nothing is in flight, also if a test gave up."""
        wait(self._sent, PATIENCE_S)
        self._sent.clear()

    def ask(self, case: Case, model: str) -> httpx.Response:
        """Ask, and wait."""
        return self._server.live.predict(model, case.body, options=case.options)

    def alone(self, case: Case, model: str) -> bytes:
        """The answer to a case when it is asked for alone."""
        if (case, model) not in self._alone:
            answer = self.ask(case, model)
            assert answer.status_code == HTTPStatus.OK, answer.text
            self._alone[case, model] = answer.content
        return self._alone[case, model]


@contextmanager
def clients_of(server: ChaosServer) -> Iterator[Clients]:
    """Clients of a server; each must have its answer in the end."""
    with ThreadPoolExecutor(32) as pool:
        yield Clients(server, pool)


@contextmanager
def serving(store: Path, folder: Path, faults: Sequence[Entry] = (), **how: Any) -> Iterator[ChaosServer]:
    """Start a server with a runtime directory of its own, and stop it in the end.

    Args:
        store: the model store.
        folder: for everything that it writes.
        faults: for its engines.
        how: see :func:`~.server.running`.
    """
    holds = any(isinstance(fault, Hold) and fault.while_exists == folder / HOLD for fault in faults)
    with ExitStack() as until_the_end:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(RUNTIME_DIR_VARIABLE, str(folder / "run"))
            if faults:
                environment.setenv(FAULTS_VARIABLE, json.dumps([each.model_dump(mode="json") for each in faults]))
            server = running(store, folder / "state", testing=bool(faults), **how)
            live = until_the_end.enter_context(server)
        yield ChaosServer(live, folder / "run", holds)
