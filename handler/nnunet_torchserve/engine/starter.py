"""Where a worker finds its engine process, or starts it.

The engine's directory has its socket, the lock of its life, and the lock of whoever starts it; racing workers start one
engine and wait for its hello together. If none can be started any more, :mod:`.outage` keeps the workers of that
device from trying all the time. Used by one thread at a time; no locks but those files.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from ..backend import Backend
from ..bundle import ModelBundle
from ..environment import FAULTS_VARIABLE, TESTING_VARIABLE, runtime_dir
from ..errors import BundleError, Deadline, NoEngine
from . import channel, messages
from .engine_settings import EngineSettings
from .flight_record import FlightRecord
from .folder import LOCK, SOCKET, is_alive, kill_engine, private
from .outage import Outage

logger = logging.getLogger(__name__)

CONNECT_LIMIT_S = 300.0
"""From an engine's start to its hello: to load the networks of five folds from a slow disk and to check the golden
patch."""

HELLO_LIMIT_S = 30.0
"""For the hello of an engine that has loaded: it comes at once, unless the engine hangs, or was killed and does not
die."""

MAX_LOADING_DEATHS = 3
"""Engines that died before their hello while one worker waited for it."""

HOLD_BACK_S = 2.0
"""Before a request is refused during an outage: a worker that refused at once would empty TorchServe's queue, of
requests that workers of other devices could take."""

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
}
"""glibc keeps the memory of one pass for the next: fetched anew each time it is a quarter of a pass of 117 classes. The
engine gives it back when it is idle (:mod:`.compute`)."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_SHORTEST_PATIENCE_S = 0.5
_LOOK_S = 0.1
_SURROUNDINGS = ("CUDA_VISIBLE_DEVICES", FAULTS_VARIABLE, TESTING_VARIABLE)
RETRY_AFTER_S = 10


class _DiedLoading(Exception):
    """An engine took the connection and ended before its hello."""


@dataclass(slots=True)
class Link:
    """A connection that has said hello.

    Attributes:
        endpoint: the worker's end.
        process: a pidfd: it cannot be mistaken for another process.
        record: the engine's flight record.
        backend: what runs the engine's networks.
        case_id: of the granted case.
        in_use: an answer is awaited.
    """

    endpoint: socket.socket
    process: int
    record: FlightRecord
    backend: Backend
    case_id: int | None = None
    in_use: bool = False

    def is_over(self) -> bool:
        """Whether the engine has ended."""
        poll = select.poll()
        poll.register(self.process, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Leave the engine."""
        self.endpoint.close()
        os.close(self.process)

    def kill(self) -> None:
        """Kill the engine, if it is still there."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)


class Starter:
    """Finds or starts one engine."""

    def __init__(
        self, bundle: ModelBundle, settings: EngineSettings, on_tally: Callable[[int, int], None] | None
    ) -> None:
        """Name the engine.

        Args:
            bundle: the model.
            settings: what the engine is started with.
            on_tally: see :class:`~.remote.RemoteEngine`.
        """
        self._on_tally = on_tally
        self._arguments = [str(bundle.folder), settings.model_dump_json()]
        backend = bundle.description.backend
        packages = ["torch", "nnunetv2", *(backend.requires if backend is not None else ())]
        versions = [f"{package}={_version(package)}" for package in packages]
        surroundings = [f"{name}={os.environ.get(name)}" for name in _SURROUNDINGS]
        identity = "\n".join([bundle.digest, self._arguments[1], *versions, *surroundings])
        self._name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._device, self._outage = settings.device, Outage(runtime_dir() / self._name)
        self._has_served = False
        self._waits_since = self._waited_until = -math.inf

    @property
    def folder(self) -> Path:
        """The engine's own directory, which may not be there."""
        return runtime_dir() / self._name

    def link(self, deadline: float | None) -> Link:
        """A link to a living engine or to one that is started, unless there is an outage.

        A worker that loads tries whatever others have noted: TorchServe tries it again less and less often.

        Raises:
            BundleError: the engine cannot serve this model.
            NoEngine: none could be started in time, or there is an outage.
            Deadline: the time ran out.
        """
        while True:
            self._own_folder()  # before anything in it is believed
            with self._outage.claim() if self._has_served else nullcontext(True) as may_try:
                if may_try and (link := self._found_or_started(deadline)) is not None:
                    return link
            self._hold_back(deadline)

    def _own_folder(self) -> Path:
        """The engine's own directory, made if it is not there."""
        with suppress(FileNotFoundError):  # somebody cleans the directory up at this moment
            return private(private(runtime_dir()) / self._name)
        return private(private(runtime_dir()) / self._name)

    def _hold_back(self, deadline: float | None) -> None:
        """Return as soon as the outage ends, but wait for that for a moment only.

        Raises:
            NoEngine: it goes on.
        """
        until = min(time.monotonic() + HOLD_BACK_S, math.inf if deadline is None else deadline)
        while self._outage.read() is not None:
            if (left := until - time.monotonic()) <= 0:
                raise self._no_engine()
            time.sleep(min(_LOOK_S, left))

    def _no_engine(self) -> NoEngine:
        msg = f"the engine of this model on {self._device} cannot be started for now; the server's log has the reason"
        return NoEngine(msg, math.ceil(self._outage.retry_after_s()))

    def _found_or_started(self, deadline: float | None) -> Link | None:
        """A link, ``None`` if another worker notes an outage meanwhile."""
        try:
            link = self._find_or_start(deadline)
        except (BundleError, NoEngine) as error:
            self._waited_until = -math.inf
            if not self._has_served:
                raise
            note = self._outage.fail()
            pause = note.until - time.monotonic()
            logger.exception("no engine on %s, failure %d: the next try in %.0f s", self._device, note.failures, pause)
            raise self._no_engine() from error
        self._waited_until = -math.inf  # only a request whose deadline passes leaves its wait to the next one
        self._has_served = self._has_served or link is not None
        return link

    def _find_or_start(self, deadline: float | None) -> Link | None:
        began = self._waiting_since()
        pause = _FIRST_PAUSE_S
        deaths = starts = 0
        while not (self._has_served and self._outage.stands()):
            self._waited_until = time.monotonic()
            if deadline is not None and time.monotonic() > deadline:
                msg = "the time for this request ran out while an engine was started"
                raise Deadline(msg)
            try:
                folder = self._own_folder()
                started = self._outage.started()
                link = self._try_to_connect(folder, began, deadline)
                if link is not None:
                    self._outage.end(started)
                    return link
                if time.monotonic() > self._limit(began):  # it had its time
                    kill_engine(folder)
                starts += self._start_engine(folder)
            except FileNotFoundError:  # somebody cleans the directory up at this moment
                pass
            except _DiedLoading:
                deaths += 1
            # one that dies before it can be asked is noticed by the start of the next
            if time.monotonic() > self._limit(began) or max(deaths, starts - 1) >= MAX_LOADING_DEATHS:
                msg = "no engine could be started in time; try again later"
                raise NoEngine(msg, RETRY_AFTER_S)
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, pause * 2)
        return None

    def _waiting_since(self) -> float:
        """When this worker began to wait for an engine; requests with short deadlines share one wait."""
        now = time.monotonic()
        if now - self._waited_until > HELLO_LIMIT_S:
            self._waits_since = now
        return self._waits_since

    def _limit(self, began: float) -> float:
        """When a worker that has waited since ``began`` gives up, in monotonic seconds; the last engine may load.

        The clock of loading is the engine's own: it begins with its start, whoever waits for it and since when.
        """
        started = self._outage.started()
        limit = began + HELLO_LIMIT_S
        if self._outage.has_loaded(started):
            return limit
        return max(limit, (started or began) + CONNECT_LIMIT_S)

    def _try_to_connect(self, folder: Path, began: float, deadline: float | None) -> Link | None:
        """A link to a loaded engine, ``None`` if nobody listens or says hello.

        Args:
            folder: the engine's own directory.
            began: see :meth:`_limit`.
            deadline: monotonic seconds after which no hello is waited for.

        Raises:
            _DiedLoading: the engine ended before its hello.
            BundleError: it cannot serve.
        """
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        endpoint = channel.new_socket()
        process = -1
        try:
            patience = min(self._limit(began), math.inf if deadline is None else deadline)
            endpoint.settimeout(max(_SHORTEST_PATIENCE_S, patience - time.monotonic()))
            endpoint.connect(f"/proc/self/fd/{directory}/{SOCKET}")
            process = os.pidfd_open(channel.peer_pid(endpoint))
            return Link(endpoint, process, *self._greeting(endpoint, process))
        except (OSError, channel.ChannelError) as error:
            endpoint.close()
            if process >= 0:
                os.close(process)
            if isinstance(error, channel.ChannelError):
                raise BundleError(str(error)) from error
            if isinstance(error, ConnectionResetError):
                raise _DiedLoading from error
            return None
        except BundleError:
            endpoint.close()
            os.close(process)
            raise
        finally:
            os.close(directory)

    def _greeting(self, endpoint: socket.socket, process: int) -> tuple[FlightRecord, Backend]:
        """Wait for the engine's hello, and take what comes with it."""
        received = channel.receive(endpoint)
        if received is None:
            raise ConnectionResetError
        message, descriptors = received
        if isinstance(message, messages.Refused):
            raise BundleError(message.reason)
        if not isinstance(message, messages.Hello) or message.protocol != messages.PROTOCOL:
            msg = f"the engine said {message.kind} instead of hello"
            raise BundleError(msg)
        record, tally = descriptors
        if self._on_tally is None:
            os.close(tally)
        else:
            self._on_tally(tally, process)
        return FlightRecord.map(record), message.backend

    def _start_engine(self, folder: Path) -> bool:
        """Start an engine unless somebody else does or one lives; whether that was done."""
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_alive(folder):
                return False
            environment = MALLOC | dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
            command = [sys.executable, "-m", f"{__package__}.process", str(folder), *self._arguments]
            self._outage.note_start()
            run(command, environment)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True


def _version(package: str) -> str:
    """As it is installed; a package that is missing may come, and then another engine is needed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a command with nothing of ours but the environment given; an engine's returns once it has forked away."""
    subprocess.run(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
