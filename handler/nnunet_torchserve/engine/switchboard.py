"""The engine's main thread: workers' connections, who may take memory, and the heartbeat.

A case. The worker reserves what the case will take (:mod:`.admission`), decodes and preprocesses it, submits it, gets
its logits, exports them, and releases. Whatever ends the connection releases too. Before it preprocesses, it may recall
a volume that an earlier case left (:mod:`.cache`). Before it submits, it may amend what it has reserved, if that was a
guess. A case of several members is preprocessed and submitted for one after the other. In place of the grant may come
the answer of an equal case (:mod:`.flights`).

Threads. This one reads every socket and owns the connections' state and :mod:`.host_memory`. The compute thread
(:mod:`.compute`) owns the core, all torch work and the device's ledger. Commands go there in a queue, in order; a
case's first one when it reserves, so that unloaded networks are loaded while it is decoded. Nothing comes back: the
compute thread answers the worker itself, through :class:`Connection`. The only locks are those around a connection's
sends and its closing; nothing is called under them but the socket. How many passes of a case are done is a number that
this thread reads and the compute thread writes: progress costs the passes nothing.

Faults. Whatever a worker sends, only its own connection is closed; but a volume that it has kept, or an answer that it
hands on, reaches other workers as it is: they are processes of the same user, and nobody can change it later. If the
compute thread is busy with one thing for too long, the process kills itself and the workers start another one.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ..backend import Backend
from ..errors import Busy, OutOfMemory
from ..options import Priority
from . import channel, shared_memory
from .admission import NEVER_FITS, Budget, Claim
from .cache import Kept
from .compute import Admit, Compute, Drop, Expect
from .connection import HOLDING, Connection, State
from .engine_settings import EngineSettings
from .flights import Flights
from .folder import SOCKET, bound_log, listen, note_workers, still_ours, workers_of
from .host_memory import HostMemory
from .messages import (
    HEARTBEAT_S,
    PROGRESS_S,
    PROTOCOL,
    Amend,
    Answered,
    Failed,
    Granted,
    Heartbeat,
    Hello,
    Message,
    Offer,
    Progress,
    Queued,
    Recall,
    Recalled,
    Release,
    Reserve,
    Submit,
    Wanted,
)
from .tally import Level, Tally, Total

logger = logging.getLogger(__name__)

IDLE_S = 5.0
"""After that long without a worker the engine leaves."""

BUSY_LIMIT_S: Mapping[str, float] = {"cpu": 300.0, "cuda": 60.0}
"""A forward pass, or anything else that the compute thread does at a stretch, that lasts longer is a hang. A pass takes
a GPU well below a second, the first ones, which choose their algorithms, some; a CPU may take minutes for a large patch
on busy cores."""

_ROLL_CALL_S = 600.0
"""After a death: until all workers have come back, which each does with its next case."""

_LOOK_AGAIN_S = 0.1
"""While cases wait: another engine may have released memory."""

_LONGEST_RETRY_S = 600
_FLOAT32_BYTES = 4


def busy_limit_s(device: str) -> float:
    """The limit of a device, such as ``cpu``, ``cpu:1`` or ``cuda:0``; a CPU's for one of an unknown type.

    >>> busy_limit_s("cuda:0"), busy_limit_s("cpu:1")
    (60.0, 300.0)
    """
    return BUSY_LIMIT_S.get(device.partition(":")[0], BUSY_LIMIT_S["cpu"])


class Switchboard:
    """Connections of workers, until the last one has left."""

    def __init__(
        self,
        folder: Path,
        listener: socket.socket,
        compute: Compute,
        settings: EngineSettings,
        record_fd: int,
        life: int,
        tally: Tally,
        limit_s: float,
        backend: Backend = Backend.EAGER,
    ) -> None:
        """Take over a listening socket.

        Args:
            folder: the engine's own directory.
            listener: bound and listening.
            compute: not yet started.
            settings: the budget.
            record_fd: the flight record's descriptor, sent with every hello.
            life: what :func:`~.folder.take_life_lock` gave.
            tally: where it notes what it does; sent with every hello.
            limit_s: of :func:`busy_limit_s`.
            backend: what runs the networks.
        """
        self._backend = backend
        self._folder, self._listener, self._record_fd, self._life = folder, listener, record_fd, life
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._connections: dict[int, Connection] = {}
        self._owners: dict[int, Connection] = {}
        self._next_case = 1
        budget = Budget(settings.memory_bytes, settings.passes, settings.waiting_cases, settings.machine_bytes)
        self._memory, self._flights = HostMemory(folder, budget, settings.cache_bytes), Flights()
        self._workers_before, self._roll_call_until = workers_of(folder), time.monotonic() + _ROLL_CALL_S
        self._compute = compute
        self._busy_limit_s = limit_s
        self._tally = tally
        tally.total(Total.STARTS, 1)

    def run(self) -> None:
        """Serve until idle for ``IDLE_S``, or until the engine's directory is cleaned up."""
        self._compute.start()
        idle_since = next_beat = time.monotonic()
        while time.monotonic() - idle_since <= IDLE_S:
            self._serve_until(next_beat)
            if self._connections:
                idle_since = time.monotonic()
            if time.monotonic() < next_beat:
                continue
            watched = any(each.watched and each.state is State.SUBMITTED for each in self._connections.values())
            next_beat = time.monotonic() + (PROGRESS_S if watched else HEARTBEAT_S)
            if not still_ours(self._folder, self._life):
                logger.error("the directory was cleaned up, and another engine may start: leaving")
                return
            self._beat(self._connections.values())
            if self._memory.make_room_elsewhere():
                self._hold()
            self._listen_again_if_unlinked()
            bound_log()

    def _serve_until(self, next_beat: float) -> None:
        """Wait for messages, at most until the next heartbeat; cases that wait for memory are looked at more often."""
        pause = _LOOK_AGAIN_S if self._memory.is_waited_for else max(0.0, next_beat - time.monotonic())
        for key, _ in self._selector.select(pause):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd in self._connections:
                self._serve(self._connections[key.fd])
        if self._memory.is_waited_for:
            self._grant()

    def _accept(self) -> None:
        try:
            endpoint, _ = self._listener.accept()
        except OSError:
            return
        connection = Connection(endpoint)
        try:
            channel.peer_pid(endpoint)
        except channel.ChannelError as error:
            logger.warning("refused a connection: %s", error)
            connection.close()
            return
        endpoint.setblocking(False)
        connection.expect()
        if connection.answer(
            Hello(protocol=PROTOCOL, backend=self._backend), (self._record_fd, self._tally.descriptor)
        ):
            self._connections[endpoint.fileno()] = connection
            self._selector.register(endpoint, selectors.EVENT_READ)
            self._note_workers()
        else:
            connection.close()

    def _serve(self, connection: Connection) -> None:
        try:
            received = channel.receive(connection.endpoint)
            if received is None:
                self._forget(connection)
            elif len(received[1]) == 1:
                self._take_in(connection, received[0], received[1][0])
            else:
                channel.close_all(received[1])
                self._obey(connection, received[0])
        except BlockingIOError:
            return
        except (channel.ChannelError, OSError) as error:
            logger.warning("closed a connection: %s", error)
            self._forget(connection)
        except Exception:
            logger.exception("closed a connection")
            self._forget(connection)

    def _take_in(self, connection: Connection, message: Message, descriptor: int) -> None:
        """Obey a message that came with a descriptor."""
        if isinstance(message, Submit) and _has_a_turn(connection):
            connection.state, connection.watched = State.SUBMITTED, message.watched
            connection.expect()
            self._keep(message, descriptor)
            if connection.arrived is None:  # its first member
                connection.arrived = time.monotonic()
            self._compute.put(Admit(connection.case_id, message, descriptor, connection.arrived, connection))
            connection.passes_ahead = message.passes_after
            self._note()
        elif isinstance(message, Release) and connection.state in HOLDING:
            self._land(connection, message, descriptor)
        else:
            os.close(descriptor)
            raise _unexpected(message)

    def _obey(self, connection: Connection, message: Message) -> None:
        """Obey a message that came alone."""
        if isinstance(message, Reserve) and connection.state is State.IDLE:
            self._reserve(connection, message)
        elif isinstance(message, Amend) and _has_a_turn(connection):
            connection.expect()
            self._amend(connection, message)
        elif isinstance(message, Recall) and _has_a_turn(connection):
            connection.expect()
            self._recall(connection, message.key)
        elif isinstance(message, Offer) and _has_a_turn(connection):
            connection.expect()
            connection.answer(Wanted(cases=self._flights.followers(connection.case_id)))
        elif isinstance(message, Release) and connection.state is not State.IDLE:
            self._release(connection)
        else:
            raise _unexpected(message)

    def _reserve(self, connection: Connection, message: Reserve) -> None:
        connection.expect()
        claim = Claim(self._next_case, message.bytes, message.passes, message.guaranteed, message.priority)
        self._next_case += 1
        if claim.exceeds(self._memory.admission.budget) and not claim.guaranteed:
            connection.answer(Failed.of(OutOfMemory(NEVER_FITS)))
            return
        if not claim.guaranteed and claim.priority is Priority.BATCH and self._batch_cases() >= self._for_batch():
            msg = f"{self._batch_cases()} batch cases hold all workers but the one that is kept for interactive cases"
            connection.answer(Failed.of(Busy(f"{msg}; send fewer at once, or come again", self._retry_after_s(1))))
            return
        connection.claim, connection.watched = claim, message.watched
        connection.passes_ahead, connection.arrived = 0, None
        self._owners[claim.number] = connection
        # a case that holds its memory already is computed, whoever else is
        may_wait = not claim.guaranteed
        if message.answer is not None and self._flights.join(message.answer, claim.number, may_wait=may_wait):
            connection.state = State.FOLLOWING
            self._note()
            if connection.watched:
                self._beat([connection])
        else:
            self._ask(connection)

    def _amend(self, connection: Connection, message: Amend) -> None:
        """Charge a case for what it takes after all."""
        claim = replace(connection.claim, bytes=message.bytes, passes=message.passes)
        if claim.exceeds(self._memory.admission.budget) and not claim.guaranteed:
            connection.answer(Failed.of(OutOfMemory(NEVER_FITS)))
            return
        ahead = connection.passes_ahead + claim.passes - connection.claim.passes
        connection.claim, connection.passes_ahead = claim, max(0, ahead)
        self._memory.admission.amend(claim)
        self._grant()

    def _batch_cases(self) -> int:
        return sum(owner.claim.priority is Priority.BATCH for owner in self._owners.values())

    def _for_batch(self) -> int:
        """How many workers batch cases may hold: all but one, or interactive cases would wait in TorchServe's queue.

        After an engine's death those count that it had: they are there, and come back one after the other.
        """
        before = self._workers_before if time.monotonic() < self._roll_call_until else 0
        return max(1, max(before, len(self._connections)) - 1)

    def _note_workers(self) -> None:
        with suppress(OSError):  # a cleaned-up directory or a full disk: after a death batch cases wait for a roll call
            note_workers(self._folder, len(self._connections))

    def _ask(self, connection: Connection) -> None:
        """Let a case wait for memory, or refuse it."""
        if not self._memory.ask(connection.claim):
            busy = Failed.of(Busy(self._memory.admission.busy_message(), self._retry_after_s()))
            connection.answer(busy)
            self._leave(connection)
            return
        self._wait_for_memory(connection)

    def _wait_for_memory(self, connection: Connection) -> None:
        """A case was taken in."""
        connection.state, connection.passes_ahead = State.WAITING, connection.claim.passes
        self._compute.put(Expect(connection.case_id))
        self._grant()
        if connection.watched and connection.state is State.WAITING:
            self._beat([connection])

    def _grant(self) -> None:
        """Let the cases go on that fit now, and refuse one where all wait for each other."""
        granted, stuck = self._memory.grant()
        for case_id in granted:
            self._tell_granted(self._owners[case_id])
        if stuck is not None:
            refused = Busy(self._memory.admission.stuck_message(), self._retry_after_s())
            self._owners[stuck].answer(Failed.of(refused))
        self._note()

    def _tell_granted(self, connection: Connection) -> None:
        if connection.state is State.WAITING:
            connection.state = State.GRANTED
        connection.answer(Granted(case_id=connection.case_id))

    def _recall(self, connection: Connection, key: str) -> None:
        kept = self._memory.cache.find(key)
        if kept is None:
            connection.answer(Recalled())
        else:
            connection.answer(Recalled(shape=kept.shape, note=kept.note), [kept.descriptor])

    def _keep(self, message: Submit, descriptor: int) -> None:
        """Keep a submitted volume if it is to be kept and nobody can change it."""
        keep, size = message.keep, math.prod(message.shape) * _FLOAT32_BYTES
        if keep is None or not shared_memory.is_frozen(descriptor, size):
            return
        with suppress(OSError):  # no descriptor is left: the case needs none of this
            self._memory.cache.keep(keep.key, Kept(os.dup(descriptor), message.shape, keep.note, size))
            self._hold()

    def _land(self, connection: Connection, message: Release, descriptor: int) -> None:
        """A case has an answer, which others wait for."""
        try:
            if message.size is None or not shared_memory.is_frozen(descriptor, message.size):
                msg = "an answer is no sealed memory of its size"
                raise channel.ChannelError(msg)
            for case_id in self._flights.land(connection.case_id):
                follower = self._owners.pop(case_id)
                follower.state = State.IDLE
                follower.answer(Answered(size=message.size, note=message.note), [descriptor])
        finally:
            os.close(descriptor)
        self._release(connection)

    def _hold(self) -> None:
        self._memory.hold()
        self._note()

    def _note(self) -> None:
        tally, admission = self._tally, self._memory.admission
        tally.level(Level.CASES_IN_FLIGHT, admission.charged)
        tally.level(Level.CASES_WAITING, admission.waiting)
        tally.level(Level.CHARGED_BYTES, admission.charged_bytes)
        tally.level(Level.CACHED_BYTES, self._memory.cache.size)
        tally.level(Level.CASES_FOLLOWING, self._flights.waiting)
        tally.level(Level.PASSES_AHEAD, sum(owner.passes_ahead for owner in self._owners.values()))

    def _release(self, connection: Connection) -> None:
        if connection.state is not State.FOLLOWING:
            self._compute.put(Drop(connection.case_id))
            self._memory.admission.release(connection.case_id)
        self._leave(connection)

    def _leave(self, connection: Connection) -> None:
        """A case has ended; if equal ones wait for it still, the first of them is computed."""
        self._owners.pop(connection.case_id, None)
        connection.state = State.IDLE
        next_case = self._flights.leave(connection.case_id)
        if next_case is not None:  # it waits already: it is not refused now
            self._memory.admission.enter(self._owners[next_case].claim)
            self._wait_for_memory(self._owners[next_case])
        self._hold()

    def _forget(self, connection: Connection) -> None:
        """A worker has left or broke the protocol: its case is dropped at the next pass."""
        descriptor = connection.endpoint.fileno()
        if self._connections.pop(descriptor, None) is not None:
            self._selector.unregister(connection.endpoint)
            self._note_workers()
        connection.close()
        if connection.state is not State.IDLE:
            self._release(connection)

    def _beat(self, connections: Iterable[Connection]) -> None:
        if self._compute.busy_for_s > self._busy_limit_s:
            logger.critical("the compute thread hangs: the engine ends")
            os.kill(os.getpid(), signal.SIGKILL)  # nothing less ends a thread in a driver
        for connection in connections:
            connection.beat(self._sign_of_life(connection))

    def _sign_of_life(self, connection: Connection) -> Message:
        """A heartbeat, or what a worker that watches wants to know instead."""
        if connection.watched and connection.state is State.FOLLOWING:
            return Queued(ahead=0)
        if connection.watched and connection.state is State.WAITING:
            return Queued(ahead=self._memory.admission.ahead_of(connection.case_id))
        if connection.watched and connection.state is State.SUBMITTED:
            done = self._compute.passes_done(connection.case_id)
            if done is not None:
                return Progress(passes=done)
        return Heartbeat()

    def _retry_after_s(self, cases: int | None = None) -> int:
        """Seconds that the passes in hand take at the measured rate; those of so many cases, if they are not all."""
        share = 1.0 if cases is None else cases / max(cases, self._memory.admission.charged)
        seconds = share * self._memory.admission.charged_passes / self._compute.passes_per_s
        return max(1, min(_LONGEST_RETRY_S, math.ceil(seconds)))

    def _listen_again_if_unlinked(self) -> None:
        """Something cleaned the directory up: be found again."""
        path = self._folder / SOCKET
        if path.exists():
            return
        with suppress(OSError):
            listener = listen(path)
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = listener
            self._selector.register(listener, selectors.EVENT_READ)


def _has_a_turn(connection: Connection) -> bool:
    """Whether a worker's case may be submitted: it was granted, and a member submitted before is done."""
    return connection.state in HOLDING and connection.is_answered


def _unexpected(message: Message) -> channel.ChannelError:
    return channel.ChannelError(f"a {message.kind} was not expected now, or not with what came with it")
