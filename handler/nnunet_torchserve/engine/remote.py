"""A worker's side of the engine process: find it or start it, hand cases over, and survive its death.

Threads: a worker has one connection and one case at a time; ``predict`` holds a lock for as long as its case is in
flight. A connection that was in use when something went wrong is closed, which also drops the case in the engine.

Faults. If the engine dies, or is silent for ``SILENCE_S``, the worker kills what is left of it, starts another and
hands its case in again, from the beginning. The flight record says whose passes were running: only those cases get a
strike, run alone from then on, and fail with their second strike. A death without a strike costs a case nothing but
time, up to ``MAX_DEATHS``.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import errors
from ..bundle import ModelBundle
from ..cases import Settings
from ..errors import BundleError, CaseFailed, Deadline, ServingError
from . import channel
from .prediction import Prediction
from .process import ALIVE, LOCK, SOCKET
from .scheduler import Policy

RUNTIME_DIR_VARIABLE = "NNUNET_TORCHSERVE_RUNTIME_DIR"
SILENCE_S = 10.0
"""Ten heartbeats."""

CONNECT_LIMIT_S = 300.0
"""To load the networks of five folds from a slow disk and to check the golden patch."""

MAX_STRIKES = 2
MAX_DEATHS = 8
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0

_ERRORS: Mapping[str, type[ServingError]] = {
    error.code: error for error in (errors.CaseFailed, errors.Deadline, errors.OutOfMemory, errors.ServingError)
}


class _EngineGone(Exception):
    """The engine died or hangs; ``in_batch``: this case's passes were running."""

    def __init__(self, *, in_batch: bool) -> None:
        super().__init__()
        self.in_batch = in_batch


@dataclass(frozen=True, slots=True)
class _Link:
    """A connection that has said hello."""

    endpoint: socket.socket
    process: int
    """A pidfd: it cannot be mistaken for another process."""
    record: channel.FlightRecord

    def close(self) -> None:
        self.endpoint.close()
        os.close(self.process)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, signal.SIGKILL)


class RemoteEngine:
    """The engine process of a model and a device, shared with the other workers."""

    def __init__(
        self,
        bundle: ModelBundle,
        device: torch.device,
        max_patch_batch: int = 1,
        policy: Policy = Policy.SHORTEST_REMAINING,
    ) -> None:
        """Connect to the engine, starting it if there is none; returns when its networks are loaded.

        Raises:
            BundleError: the engine cannot serve this model; the message says why.
        """
        self._command = [str(bundle.folder), str(device), str(max_patch_batch), str(policy)]
        identity = [
            bundle.digest,
            *self._command[1:],
            *(f"{p}={importlib.metadata.version(p)}" for p in ("torch", "nnunetv2")),
        ]
        self._folder = _private(runtime_dir()) / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
        _private(self._folder)
        self._lock = threading.Lock()
        self._link: _Link | None = None
        with self._lock:
            self._connected(time.monotonic() + CONNECT_LIMIT_S)

    def predict(self, data: torch.Tensor, settings: Settings, deadline: float | None = None) -> Prediction:
        """See :meth:`~.prediction.Engine.predict`."""
        strikes = deaths = 0
        with self._lock:
            while True:
                limit = time.monotonic() + CONNECT_LIMIT_S
                link = self._connected(limit if deadline is None else min(limit, deadline))
                try:
                    return self._ask(link, data, settings, deadline, suspect=strikes > 0)
                except _EngineGone as gone:
                    self.disconnect()
                    deaths += 1
                    strikes += gone.in_batch
                except BaseException:
                    self.disconnect()
                    raise
                if strikes >= MAX_STRIKES:
                    msg = f"the engine died {strikes} times while it worked on this case; it will not be tried again"
                    raise CaseFailed(msg)
                if deaths >= MAX_DEATHS:
                    msg = f"the engine died {deaths} times while this case waited; try again later"
                    raise CaseFailed(msg)

    def disconnect(self) -> None:
        """Leave the engine; a case in flight is dropped there."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _ask(
        self, link: _Link, data: torch.Tensor, settings: Settings, deadline: float | None, *, suspect: bool
    ) -> Prediction:
        shape = tuple(int(n) for n in data.shape)
        shared, descriptor = channel.share(shape, torch.float32, "nnunet-volume")
        try:
            shared.copy_(data)
            del shared
            submit = channel.Submit(
                shape=shape,  # type: ignore[arg-type]
                folds=settings.folds,
                mirroring_axes=settings.mirroring_axes,
                tile_step_size=settings.tile_step_size,
                use_gaussian=settings.use_gaussian,
                deadline=deadline,
                suspect=suspect,
            )
            channel.send(link.endpoint, submit, (descriptor,))
        except OSError as error:
            raise _EngineGone(in_batch=False) from error
        finally:
            os.close(descriptor)
        case_id: int | None = None
        while True:
            message, descriptors = self._next_message(link, case_id)
            if isinstance(message, channel.Accepted):
                case_id = message.case_id
            elif isinstance(message, channel.Done):
                logits = channel.attach(descriptors[0], message.shape, torch.half)
                unpad = (slice(None), *(slice(start, stop) for start, stop in message.unpad))
                return Prediction(logits[unpad], message.queue_s, message.network_s)
            elif isinstance(message, channel.Failed):
                self._raise(message)

    def _next_message(self, link: _Link, case_id: int | None) -> tuple[channel.Message, list[int]]:
        try:
            received = channel.receive(link.endpoint)
        except (TimeoutError, OSError, channel.ChannelError):
            received = None
        if received is None:
            running = case_id is not None and case_id in link.record.read()
            link.kill()
            raise _EngineGone(in_batch=running)
        return received

    def _raise(self, failed: channel.Failed) -> None:
        raise _ERRORS.get(failed.code, ServingError)(failed.detail)

    def _connected(self, limit: float) -> _Link:
        pause = _FIRST_PAUSE_S
        while self._link is None:
            self._link = self._try_to_connect()
            if self._link is None:
                if time.monotonic() > limit:
                    msg = "no engine could be started in time; try again later"
                    raise Deadline(msg)
                self._start_engine()
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE_S, pause * 2)
        return self._link

    def _try_to_connect(self) -> _Link | None:
        """A link to a loaded engine, ``None`` if nobody listens or the engine left before its hello."""
        endpoint = channel.new_socket()
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        process = -1
        try:
            endpoint.settimeout(CONNECT_LIMIT_S)
            endpoint.connect(f"/proc/self/fd/{folder}/{SOCKET}")
            process = os.pidfd_open(channel.peer_pid(endpoint))
            received = channel.receive(endpoint)
            if received is None:
                raise ConnectionResetError
            message, descriptors = received
            if isinstance(message, channel.Refused):
                raise BundleError(message.reason)
            if not isinstance(message, channel.Hello) or message.protocol != channel.PROTOCOL:
                msg = f"the engine said {message.kind} instead of hello"
                raise BundleError(msg)
            endpoint.settimeout(SILENCE_S)
            return _Link(endpoint, process, channel.FlightRecord.map(descriptors[0]))
        except (OSError, channel.ChannelError) as error:
            endpoint.close()
            if process >= 0:
                os.close(process)
            if isinstance(error, channel.ChannelError):
                raise BundleError(str(error)) from error
            return None
        except BundleError:
            endpoint.close()
            os.close(process)
            raise
        finally:
            os.close(folder)

    def _start_engine(self) -> None:
        """Start an engine unless somebody else does or one lives."""
        lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_alive(self._folder):
                return
            environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
            command = [sys.executable, "-m", f"{__package__}.process", str(self._folder), *self._command]
            subprocess.run(
                command,
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        except BlockingIOError:
            return
        finally:
            os.close(lock)


def runtime_dir() -> Path:
    """Where engines have their sockets and logs."""
    configured = os.environ.get(RUNTIME_DIR_VARIABLE)
    return Path(configured) if configured else Path(tempfile.gettempdir()) / f"nnunet-torchserve-{os.getuid()}"


def _private(folder: Path) -> Path:
    """Make a directory that is ours alone.

    Raises:
        BundleError: it exists and belongs to somebody else, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        msg = f"the runtime directory {folder} must belong to user {os.getuid()} and be writable by nobody else"
        raise BundleError(msg)
    return folder


def _is_alive(folder: Path) -> bool:
    """Whether an engine holds the lock of its life."""
    alive = os.open(folder / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(alive, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(alive)
    return False
