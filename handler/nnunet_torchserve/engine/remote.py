"""A worker's side of the engine process: find it or start it, hand cases over, and survive its death.

Threads: a worker has one connection and one case at a time; ``reserve`` and ``predict`` hold a lock for as long as
they last. A connection that was in use when something went wrong is closed, which also drops the case in the engine.

Faults. If the engine dies, or is silent for ``SILENCE_S``, the worker kills what is left of it, starts another and
hands its case in again, from the beginning. The flight record says whose passes were running: only those cases get a
strike, run alone from then on, and fail with their second strike. A death without a strike costs a case nothing but
time, up to ``MAX_DEATHS``. Its memory stays granted: the next engine charges it without asking. If no engine can be
started any more, :mod:`.outage` keeps the workers of that device from trying all the time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.metadata
import logging
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import numpy as np
import torch

from .. import errors
from ..bundle import ModelBundle
from ..cases import Price, Settings
from ..environment import FAULTS_VARIABLE, TESTING_VARIABLE, runtime_dir
from ..errors import BundleError, CaseFailed, Deadline, NoEngine, OutOfMemory, ServingError
from ..limits import Limits, memory_for_cases
from ..telemetry import STRIKES, Counts
from . import channel
from .folder import LOCK, SOCKET, is_alive
from .outage import Outage
from .prediction import NO_KEYS, KeptVolume, Keys, Prediction, Reservation, SharedAnswer, Watcher
from .scheduler import Policy

logger = logging.getLogger(__name__)

SILENCE_S = 10.0
"""Ten heartbeats; without them the engine counts as hung."""

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

MAX_STRIKES = 2
MAX_DEATHS = 8
_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(2**46),
}
"""glibc keeps the memory of one pass for the next: fetched anew each time it is a quarter of a pass of 117 classes. The
engine gives it back when it is idle (:mod:`.compute`)."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_WAIT_S = 0.5
_LOOK_S = 0.1
_SURROUNDINGS = ("CUDA_VISIBLE_DEVICES", FAULTS_VARIABLE, TESTING_VARIABLE)
_RETRY_AFTER_S = 10

_UNCLAIMED = channel.Reserve(bytes=0, passes=0, guaranteed=True)
_ERRORS: Mapping[str, type[ServingError]] = {
    error.code: error
    for error in (errors.Busy, errors.CaseFailed, errors.Deadline, errors.OutOfMemory, errors.ServingError)
}
_Answer = TypeVar("_Answer")


class _EngineGone(Exception):
    """The engine died or hangs; ``in_batch``: this case's passes were running."""

    def __init__(self, *, in_batch: bool) -> None:
        super().__init__()
        self.in_batch = in_batch


class _DiedLoading(Exception):
    """An engine took the connection and ended before its hello."""


@dataclass(slots=True)
class _Link:
    """A connection that has said hello.

    Attributes:
        endpoint: the worker's end.
        process: a pidfd: it cannot be mistaken for another process.
        record: the engine's flight record.
        case_id: of the granted case.
        in_use: an answer is awaited.
        volume: kept by the engine, which came with the grant.
        answer: an equal case's, which came in place of the grant.
    """

    endpoint: socket.socket
    process: int
    record: channel.FlightRecord
    case_id: int | None = None
    in_use: bool = False
    volume: KeptVolume | None = None
    answer: SharedAnswer | None = None

    def close(self) -> None:
        self.endpoint.close()
        os.close(self.process)

    def kill(self) -> None:
        _kill(self.process)


class RemoteEngine:
    """The engine process of a model and a device, shared with the other workers."""

    def __init__(
        self,
        bundle: ModelBundle,
        device: torch.device,
        max_patch_batch: int | Literal["auto"] = 1,
        policy: Policy = Policy.SHORTEST_REMAINING,
        limits: Limits | None = None,
        golden_interval_s: float | None = None,
        cache_bytes: int = 0,
        unload_after_s: float | None = None,
        counts: Counts | None = None,
        on_tally: Callable[[int, int], None] | None = None,
    ) -> None:
        """Connect to the engine, starting it if there is none; returns when its networks are loaded.

        Args:
            bundle: the model.
            device: where the networks run.
            max_patch_batch: passes in a batch; see :class:`~.channel.EngineSettings`.
            policy: how cases are ordered.
            limits: what all cases may take together.
            golden_interval_s: see :class:`~.channel.EngineSettings`.
            cache_bytes: see there too.
            unload_after_s: see :class:`~.channel.EngineSettings`.
            counts: where strikes are counted.
            on_tally: told the descriptor of the tally of each engine that is found, which it closes, and a pidfd of
                that engine, which is valid during the call.

        Raises:
            BundleError: the engine cannot serve this model; the message says why.
            NoEngine: none could be started in time.
        """
        limits = limits or Limits()
        self._counts, self._on_tally = counts or Counts(), on_tally
        settings = channel.EngineSettings(
            device=str(device),
            max_patch_batch=max_patch_batch,
            policy=policy,
            memory_bytes=limits.memory_bytes,
            machine_bytes=memory_for_cases(),
            passes=limits.passes,
            waiting_cases=limits.waiting_cases,
            golden_interval_s=golden_interval_s,
            cache_bytes=cache_bytes,
            unload_after_s=unload_after_s,
        )
        self._arguments = [str(bundle.folder), settings.model_dump_json()]
        versions = [f"{package}={importlib.metadata.version(package)}" for package in ("torch", "nnunetv2")]
        surroundings = [f"{name}={os.environ.get(name)}" for name in _SURROUNDINGS]
        identity = "\n".join([bundle.digest, self._arguments[1], *versions, *surroundings])
        self._name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._lock = threading.RLock()
        self._link: _Link | None = None
        self._claim = _UNCLAIMED
        self._device, self._outage = str(device), Outage(runtime_dir() / self._name)
        self._has_served = False
        with self._lock:
            self._connected(None)

    @contextmanager
    def reserve(
        self,
        price: Price,
        deadline: float | None,
        *,
        guaranteed: bool = False,
        watcher: Watcher | None = None,
        keys: Keys = NO_KEYS,
    ) -> Iterator[Reservation]:
        """See :meth:`~.prediction.Engine.reserve`."""
        with self._lock:
            began = time.monotonic()
            self._claim = channel.Reserve(
                bytes=price.bytes,
                passes=price.passes,
                guaranteed=guaranteed,
                watched=watcher is not None,
                volume=keys.volume,
                answer=keys.answer,
            )
            try:
                link = self._survive(lambda: self._granted(deadline, watcher))
                volume, answer, link.volume, link.answer = link.volume, link.answer, None, None
                self._claim = self._claim.model_copy(update={"guaranteed": True})  # from here on it holds its memory
                yield Reservation(time.monotonic() - began, volume, answer, self._share)
            finally:
                self._claim = _UNCLAIMED
                self._release()

    def predict(
        self,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None = None,
        watcher: Watcher | None = None,
        note: str | None = None,
    ) -> Prediction:
        """See :meth:`~.prediction.Engine.predict`. Without a reservation the case is charged nothing."""
        with self._lock:
            strikes = 0

            def ask() -> Prediction:
                nonlocal strikes
                link = self._granted(deadline, watcher)
                try:
                    return self._ask(link, data, settings, deadline, watcher, note, suspect=strikes > 0)
                except _EngineGone as gone:
                    strikes += gone.in_batch
                    self._counts.add(STRIKES, int(gone.in_batch))
                    if strikes >= MAX_STRIKES:
                        self.disconnect()
                        msg = f"the engine died {strikes} times while it worked on this case; it is not tried again"
                        raise CaseFailed(msg) from gone
                    raise

            began = time.monotonic()
            try:
                prediction = self._survive(ask)
                # what an engine's death cost was waiting
                return replace(prediction, queue_s=max(0.0, time.monotonic() - began - prediction.network_s))
            finally:
                if self._claim is _UNCLAIMED:
                    self._release()

    def disconnect(self) -> None:
        """Leave the engine; a case in flight is dropped there."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _survive(self, attempt: Callable[[], _Answer]) -> _Answer:
        """Try again with another engine when one dies."""
        for death in range(1, MAX_DEATHS + 1):
            try:
                return attempt()
            except _EngineGone as gone:
                logger.warning("the engine is gone, death %d of this case (its passes ran: %s)", death, gone.in_batch)
                self.disconnect()
            except ServingError:
                if self._link is not None and self._link.in_use:
                    self.disconnect()  # the engine still works on what is given up here
                raise
            except (BundleError, OSError) as error:
                self.disconnect()
                if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                    msg = "this server's memory does not hold the case; try again later, or send a smaller volume"
                    raise OutOfMemory(msg) from error
                logger.exception("the engine cannot be started again")
                msg = "the engine of this model cannot be started; the server's log has the reason"
                raise NoEngine(msg, _RETRY_AFTER_S) from error
            except BaseException:
                self.disconnect()
                raise
        msg = f"the engine died {MAX_DEATHS} times while this case waited; try again later"
        raise NoEngine(msg, _RETRY_AFTER_S)

    def _granted(self, deadline: float | None, watcher: Watcher | None) -> _Link:
        """A link whose engine has granted the claim."""
        link = self._connected(deadline)
        if link.case_id is not None:
            return link
        self._send(link, self._claim)
        while True:
            message, descriptors = self._next_message(link, deadline)
            if isinstance(message, channel.Granted):
                link.case_id, link.in_use = message.case_id, False
                if message.kept is not None:
                    kept = channel.attach(descriptors[0], message.kept.shape, torch.float32)
                    link.volume = KeptVolume(kept, message.kept.note)
                return link
            if isinstance(message, channel.Answered):
                link.in_use = False
                body = channel.attach(descriptors[0], (message.size,), torch.uint8)
                link.answer = SharedAnswer(body.numpy().tobytes(), message.note)
                return link
            if isinstance(message, channel.Queued) and watcher is not None:
                watcher.queued(message.ahead)
            if isinstance(message, channel.Failed):
                link.in_use = False
                self._raise(message)

    def _release(self) -> None:
        link = self._link
        if link is None or link.case_id is None:
            return
        link.case_id = None
        try:
            channel.send(link.endpoint, channel.Release())
        except OSError:
            self.disconnect()

    def _share(self, body: bytes, note: str) -> None:
        """Give an answer to equal cases that wait for it, and the memory back; what fails here costs those time."""
        link = self._link
        if self._claim.answer is None or link is None or link.case_id is None:
            return
        try:
            self._send(link, channel.Offer())
            while not isinstance(message := self._next_message(link, None)[0], channel.Wanted):
                pass
            link.in_use = False
            if not message.cases:
                return
            shared, descriptor = channel.share((len(body),), torch.uint8, "nnunet-answer")
            try:
                shared.numpy()[:] = np.frombuffer(body, np.uint8)
                del shared
                channel.freeze(descriptor)
                channel.send(link.endpoint, channel.Release(size=len(body), note=note), (descriptor,))
            finally:
                os.close(descriptor)
            link.case_id = None
        except (_EngineGone, OSError) as error:
            logger.warning("an answer could not be shared: %s", error)
            self.disconnect()

    def _ask(
        self,
        link: _Link,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None,
        watcher: Watcher | None,
        note: str | None,
        *,
        suspect: bool,
    ) -> Prediction:
        shape = tuple(int(n) for n in data.shape)
        shared, descriptor = channel.share(shape, torch.float32, "nnunet-volume")
        try:
            shared.copy_(data)
            del shared
            frozen = note is not None and channel.freeze(descriptor)
            submit = channel.Submit(
                shape=shape,  # type: ignore[arg-type]
                folds=settings.folds,
                mirroring_axes=settings.mirroring_axes,
                tile_step_size=settings.tile_step_size,
                use_gaussian=settings.use_gaussian,
                accumulate=settings.accumulate,
                deadline=deadline,
                suspect=suspect,
                watched=watcher is not None,
                note=note if frozen else None,
            )
            self._send(link, submit, (descriptor,))
        finally:
            os.close(descriptor)
        if watcher is not None:
            watcher.passes(0)
        while True:
            message, descriptors = self._next_message(link, deadline)
            if isinstance(message, channel.Done):
                link.in_use = False
                logits = channel.attach(descriptors[0], message.shape, getattr(torch, message.dtype))
                unpad = (slice(None), *(slice(start, stop) for start, stop in message.unpad))
                return Prediction(logits[unpad], message.queue_s, message.network_s)
            if isinstance(message, channel.Progress) and watcher is not None:
                watcher.passes(message.passes)
            if isinstance(message, channel.Failed):
                link.in_use = False
                self._raise(message)

    def _send(self, link: _Link, message: channel.Message, descriptors: Sequence[int] = ()) -> None:
        link.in_use = True
        try:
            channel.send(link.endpoint, message, descriptors)
        except OSError as error:
            raise _EngineGone(in_batch=False) from error

    def _next_message(self, link: _Link, deadline: float | None) -> tuple[channel.Message, list[int]]:
        """What the engine says next, which is a heartbeat every second at least.

        Silence is counted in short waits: a machine that stood still as a whole has missed one of them, not all.

        Raises:
            Deadline: the time ran out. The engine gives a case up by itself, a little earlier.
        """
        link.endpoint.settimeout(_WAIT_S)
        silence_s = 0.0
        while silence_s < SILENCE_S:
            if deadline is not None and time.monotonic() > deadline + 2 * channel.HEARTBEAT_S:
                msg = "the time for this request ran out while it waited for the engine"
                raise Deadline(msg)
            try:
                received = channel.receive(link.endpoint)
            except TimeoutError:
                silence_s += _WAIT_S
                continue
            except (OSError, channel.ChannelError) as error:  # this connection's trouble, maybe not the engine's
                logger.warning("lost the connection to the engine: %s", error)
                received = None
            if received is None:
                break
            return received
        else:
            logger.warning("the engine has been silent for %.0f s: it is killed", silence_s)
            link.kill()
        raise _EngineGone(in_batch=link.case_id is not None and link.case_id in link.record.read())

    def _raise(self, failed: channel.Failed) -> NoReturn:
        raise _ERRORS.get(failed.code, ServingError)(failed.detail, failed.retry_after_s)

    def _connected(self, deadline: float | None) -> _Link:
        """The link; a new one to a living engine or to one that is started, unless there is an outage.

        A worker that loads tries whatever others have noted: TorchServe tries it again less and less often.
        """
        while self._link is None:
            self._own_folder()  # before anything in it is believed
            with self._outage.claim() if self._has_served else nullcontext(True) as may_try:
                if may_try:
                    self._link = self._found_or_started(deadline)
            if self._link is None:
                self._hold_back(deadline)
        return self._link

    def _own_folder(self) -> Path:
        """The engine's own directory, made if it is not there."""
        while True:
            with suppress(FileNotFoundError):  # somebody cleans the directory up at this moment
                _private(runtime_dir())
                return _private(runtime_dir() / self._name)

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

    def _found_or_started(self, deadline: float | None) -> _Link | None:
        """A link, ``None`` if another worker notes an outage meanwhile."""
        try:
            link = self._find_or_start(deadline)
        except (BundleError, NoEngine) as error:
            if not self._has_served:
                raise
            note = self._outage.fail()
            pause = note.until - time.monotonic()
            logger.exception("no engine on %s, failure %d: the next try in %.0f s", self._device, note.failures, pause)
            raise self._no_engine() from error
        self._has_served = self._has_served or link is not None
        return link

    def _find_or_start(self, deadline: float | None) -> _Link | None:
        began = time.monotonic()
        pause = _FIRST_PAUSE_S
        deaths = 0
        while not (self._has_served and self._outage.stands()):
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
                self._start_engine(folder)
            except FileNotFoundError:  # somebody cleans the directory up at this moment
                pass
            except _DiedLoading:
                deaths += 1
            if time.monotonic() > self._limit(began) or deaths >= MAX_LOADING_DEATHS:
                msg = "no engine could be started in time; try again later"
                raise NoEngine(msg, _RETRY_AFTER_S)
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, pause * 2)
        return None

    def _limit(self, began: float) -> float:
        """When a worker that has waited since ``began`` gives up, in monotonic seconds; the last engine may load."""
        started = self._outage.started()
        limit = began + HELLO_LIMIT_S
        if self._outage.has_loaded(started):
            return limit
        return max(limit, min(began, started or began) + CONNECT_LIMIT_S)

    def _try_to_connect(self, folder: Path, began: float, deadline: float | None) -> _Link | None:
        """A link to a loaded engine, ``None`` if nobody listens or says hello.

        Args:
            folder: the engine's own directory.
            began: see :meth:`_limit`; after that an engine that has not said hello hangs, and is killed.
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
            endpoint.settimeout(max(0.1, patience - time.monotonic()))
            endpoint.connect(f"/proc/self/fd/{directory}/{SOCKET}")
            process = os.pidfd_open(channel.peer_pid(endpoint))
            return _Link(endpoint, process, self._greeting(endpoint, process))
        except (OSError, channel.ChannelError) as error:
            endpoint.close()
            if process >= 0:
                if isinstance(error, TimeoutError) and time.monotonic() >= self._limit(began):
                    _kill(process)
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

    def _greeting(self, endpoint: socket.socket, process: int) -> channel.FlightRecord:
        """Wait for the engine's hello, and take what comes with it."""
        received = channel.receive(endpoint)
        if received is None:
            raise ConnectionResetError
        message, descriptors = received
        if isinstance(message, channel.Refused):
            raise BundleError(message.reason)
        if not isinstance(message, channel.Hello) or message.protocol != channel.PROTOCOL:
            msg = f"the engine said {message.kind} instead of hello"
            raise BundleError(msg)
        record, tally = descriptors
        if self._on_tally is None:
            os.close(tally)
        else:
            self._on_tally(tally, process)
        return channel.FlightRecord.map(record)

    def _start_engine(self, folder: Path) -> None:
        """Start an engine unless somebody else does or one lives."""
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_alive(folder):
                return
            environment = _MALLOC | dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
            command = [sys.executable, "-m", f"{__package__}.process", str(folder), *self._arguments]
            self._outage.note_start()
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


def _kill(process: int) -> None:
    """Kill the process of a pidfd, if it is still there."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)


def _private(folder: Path) -> Path:
    """Make a directory that is ours alone.

    Raises:
        BundleError: it exists and belongs to somebody else, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not stat.S_ISDIR(status.st_mode):
        msg = f"the runtime directory {folder} must belong to user {os.getuid()} and be writable by nobody else"
        raise BundleError(msg)
    return folder
