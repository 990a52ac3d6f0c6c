"""A worker's side of the engine process: hand cases over, and survive its death.

Threads: a worker has one connection and one case at a time; ``reserve`` and ``predict`` hold a lock for as long as
they last, ``keep`` and ``give_up`` take it only if it is free, and for a moment. A connection that was in use when
something went wrong is closed, which also drops the case in the engine.

Faults. If the engine dies, or is silent for ``SILENCE_S``, the worker kills what is left of it, starts another and
hands its case in again, from the beginning. The flight record says whose passes were running: only those cases get a
strike, run alone from then on, and fail with their second strike. A death without a strike costs a case nothing but
time, up to ``MAX_DEATHS``. Its memory stays granted: the next engine charges it without asking. :mod:`.starter` finds
engines and starts them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import numpy as np
import torch

from .. import errors
from ..backend import Backend
from ..bundle import ModelBundle
from ..cases import Price, Settings
from ..errors import BundleError, CaseFailed, Deadline, NoEngine, OutOfMemory, ServingError
from ..limits import Limits, memory_for_cases
from ..options import Priority
from ..telemetry import STRIKES, Counts
from . import channel, messages, shared_memory
from .engine_settings import EngineSettings
from .prediction import Keep, KeptVolume, Prediction, Reservation, SharedAnswer, Watcher
from .scheduler import Policy
from .starter import RETRY_AFTER_S, Link, Starter

logger = logging.getLogger(__name__)

SILENCE_S = 10.0
"""Ten heartbeats; without them the engine counts as hung."""

MAX_STRIKES = 2
MAX_DEATHS = 8
_WAIT_S = 0.5
_SHARING_S, _FIRST_WAIT_S = 1.0, 0.01
_KEEP_S = 1.0
"""For which a look after the engine may hold up a request."""

_SHORT_LIFE_S, _LONGEST_PAUSE_S = 60.0, 300.0
"""An engine that dies sooner after its hello, for the second time running, is not started again at once."""

_UNCLAIMED = messages.Reserve(bytes=0, passes=0, guaranteed=True)
_ERRORS: Mapping[str, type[ServingError]] = {
    error.__name__: error
    for error in (errors.Busy, errors.CaseFailed, errors.NonFiniteLogits, errors.Deadline, errors.OutOfMemory)
}
_Answer = TypeVar("_Answer")


class _EngineGone(Exception):
    """The engine died or hangs; ``in_batch``: this case's passes were running."""

    def __init__(self, *, in_batch: bool) -> None:
        super().__init__()
        self.in_batch = in_batch


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
        backend: Backend = Backend.EAGER,
        only_if_faster: bool = False,
    ) -> None:
        """Connect to the engine, starting it if there is none; returns when its networks are loaded.

        Args:
            bundle: the model.
            device: where the networks run.
            max_patch_batch: passes in a batch; see :class:`~.engine_settings.EngineSettings`.
            policy: how cases are ordered.
            limits: what all cases may take together.
            golden_interval_s: see :class:`~.engine_settings.EngineSettings`.
            cache_bytes: see there too.
            unload_after_s: see :class:`~.engine_settings.EngineSettings`.
            counts: where strikes are counted.
            on_tally: told the descriptor of the tally of each engine that is found, which it closes, and a pidfd of
                that engine, which is valid during the call.
            backend: see :class:`~.engine_settings.EngineSettings`.
            only_if_faster: see there too.

        Raises:
            BundleError: the engine cannot serve this model; the message says why.
            NoEngine: none could be started in time.
        """
        limits = limits or Limits()
        self._counts = counts or Counts()
        settings = EngineSettings(
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
            backend=backend,
            only_if_faster=only_if_faster,
        )
        self._starter = Starter(bundle, settings, on_tally)
        self._lock = threading.RLock()
        self._link: Link | None = None
        self._claim = _UNCLAIMED
        self._strikes = 0
        self._linked = self._not_kept_before = -math.inf
        self._short_lives = 0
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
        answer_key: str | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Iterator[Reservation]:
        """See :meth:`~.prediction.Engine.reserve`."""
        with self._lock:
            began = time.monotonic()
            self._strikes = 0
            self._claim = messages.Reserve(
                bytes=price.bytes,
                passes=price.passes,
                guaranteed=guaranteed,
                watched=watcher is not None,
                answer=answer_key,
                priority=priority,
            )
            try:
                reservation = self._survive(lambda: self._reserved(deadline, watcher))
                self._claim = self._claim.model_copy(update={"guaranteed": True})  # from here on it holds its memory
                reservation.waited_s = time.monotonic() - began
                reservation.amend = lambda known: self._amend(known, deadline)
                yield reservation
            finally:
                self._claim = _UNCLAIMED
                self._release()

    def predict(
        self,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None = None,
        watcher: Watcher | None = None,
        keep: Keep | None = None,
        passes_after: int = 0,
    ) -> Prediction:
        """See :meth:`~.prediction.Engine.predict`. Without a reservation the case is charged nothing."""
        with self._lock:
            if self._claim is _UNCLAIMED:
                self._strikes = 0

            def ask() -> Prediction:
                self._reserved(deadline, watcher)  # if there is another engine now
                link = self._connected(deadline)
                try:
                    return self._ask(link, data, settings, deadline, watcher, keep, passes_after)
                except _EngineGone as gone:
                    self._strikes += gone.in_batch
                    self._counts.add(STRIKES, int(gone.in_batch))
                    if self._strikes >= MAX_STRIKES:
                        self.disconnect()
                        msg = (
                            f"the engine died {self._strikes} times while it worked on this case; it is not tried again"
                        )
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

    @property
    def backend(self) -> Backend | None:
        """What runs the networks of the engine that it is linked to."""
        link = self._link
        return None if link is None else link.backend

    @property
    def folder(self) -> Path:
        """The engine's own directory."""
        return self._starter.folder

    def keep(self) -> bool:
        """Find or start an engine if the last one has ended; while a case is in hand, that case does it.

        One that dies soon after its hello, again and again, is started again after a pause that doubles; a request does
        not wait for that.

        Returns:
            Whether there was one and nothing was to be done.
        """
        if not self._lock.acquire(blocking=False):
            return True
        try:
            if self._link is not None and not self._link.is_over():
                return True
            now = time.monotonic()
            if self._link is not None:
                self._short_lives = self._short_lives + 1 if now - self._linked < _SHORT_LIFE_S else 0
                if self._short_lives > 1:
                    self._not_kept_before = now + min(_LONGEST_PAUSE_S, 2.0 ** min(self._short_lives - 1, 9))
            self.disconnect()
            if now < self._not_kept_before:
                return False
            with suppress(Deadline, NoEngine):  # the next look goes on with it
                self._connected(time.monotonic() + _KEEP_S)
            return False
        finally:
            self._lock.release()

    def give_up(self) -> None:
        """Kill the engine, which does not greet any more; while a case is in hand, that case notices it."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._link is not None:
                self._link.kill()
        finally:
            self._lock.release()

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
                raise NoEngine(msg, RETRY_AFTER_S) from error
            except BaseException:
                self.disconnect()
                raise
        msg = f"the engine died {MAX_DEATHS} times while this case waited; try again later"
        raise NoEngine(msg, RETRY_AFTER_S)

    def _reserved(self, deadline: float | None, watcher: Watcher | None) -> Reservation:
        """What the engine gives for the claim: nothing if it was granted before."""
        link, granted = self._connected(deadline), Reservation(0.0, recall=self._recall, share=self._share)
        if link.case_id is not None:
            return granted
        self._send(link, self._claim)
        while True:
            message, descriptors = self._next_message(link, deadline)
            if isinstance(message, messages.Granted):
                link.case_id, link.in_use = message.case_id, False
                return granted
            if isinstance(message, messages.Answered):
                link.in_use = False
                body = shared_memory.attach(descriptors[0], (message.size,), torch.uint8)
                return Reservation(0.0, answer=SharedAnswer(body.numpy().tobytes(), message.note))
            if isinstance(message, messages.Queued) and watcher is not None:
                watcher.queued(message.ahead)
            if isinstance(message, messages.Failed):
                link.in_use = False
                self._raise(message)

    def _amend(self, price: Price, deadline: float | None) -> None:
        """See :class:`~.prediction.Reservation`; another engine charges what the case was charged for before."""

        def ask() -> None:
            self._reserved(deadline, None)
            link = self._connected(deadline)
            self._send(link, messages.Amend(bytes=price.bytes, passes=price.passes))
            while True:
                message, _ = self._next_message(link, deadline)
                if isinstance(message, messages.Granted):
                    link.in_use = False
                    return
                if isinstance(message, messages.Failed):
                    link.in_use = False
                    self._raise(message)

        self._survive(ask)
        self._claim = self._claim.model_copy(update={"bytes": price.bytes, "passes": price.passes})

    def _release(self) -> None:
        link = self._link
        if link is None or link.case_id is None:
            return
        link.case_id = None
        try:
            channel.send(link.endpoint, messages.Release())
        except OSError:
            self.disconnect()

    def _recall(self, key: str) -> KeptVolume | None:
        """The volume under a key; what fails here costs no more than preprocessing it."""
        link = self._link
        if link is None or link.case_id is None:
            return None
        try:
            self._send(link, messages.Recall(key=key))
            while True:
                message, descriptors = self._next_message(link, None)
                if isinstance(message, messages.Recalled):
                    link.in_use = False
                    if message.shape is None:
                        return None
                    return KeptVolume(shared_memory.attach(descriptors[0], message.shape, torch.float32), message.note)
        except (_EngineGone, channel.ChannelError, OSError) as error:
            logger.warning("a kept volume could not be recalled: %s", error)
            self.disconnect()
            return None

    def _share(self, body: bytes, note: str) -> None:
        """Give an answer to equal cases that wait for it, and the memory back; what fails here costs those time."""
        link = self._link
        if self._claim.answer is None or link is None or link.case_id is None:
            return
        try:
            cases = self._wanted(link)
            if not cases:
                return
            shared, descriptor = shared_memory.share((len(body),), torch.uint8, "nnunet-answer")
            try:
                shared.numpy()[:] = np.frombuffer(body, np.uint8)
                del shared
                shared_memory.freeze(descriptor)
                channel.send(link.endpoint, messages.Release(size=len(body), note=note), (descriptor,))
            finally:
                os.close(descriptor)
            link.case_id = None
        except (OSError, channel.ChannelError) as error:
            logger.warning("an answer could not be shared: %s", error)
            self.disconnect()

    def _wanted(self, link: Link) -> int:
        """How many cases wait for this one's answer.

        Raises:
            OSError: the engine does not say so at once; this case's own client waits.
        """
        until = time.monotonic() + _SHARING_S
        channel.send(link.endpoint, messages.Offer())
        while True:
            link.endpoint.settimeout(max(_FIRST_WAIT_S, until - time.monotonic()))
            received = channel.receive(link.endpoint)
            if received is None or time.monotonic() > until:
                raise ConnectionResetError
            if isinstance(received[0], messages.Wanted):
                return received[0].cases

    def _ask(
        self,
        link: Link,
        data: torch.Tensor,
        settings: Settings,
        deadline: float | None,
        watcher: Watcher | None,
        keep: Keep | None,
        passes_after: int,
    ) -> Prediction:
        shape = tuple(int(n) for n in data.shape)
        shared, descriptor = shared_memory.share(shape, torch.float32, "nnunet-volume")
        try:
            shared.copy_(data)
            del shared
            frozen = keep is not None and shared_memory.freeze(descriptor)
            submit = messages.Submit(
                shape=shape,  # type: ignore[arg-type]
                member=settings.member,
                folds=settings.folds,
                mirroring_axes=settings.mirroring_axes,
                tile_step_size=settings.tile_step_size,
                use_gaussian=settings.use_gaussian,
                accumulate=settings.accumulate,
                priority=settings.priority,
                deadline=deadline,
                suspect=self._strikes > 0,
                passes_after=passes_after,
                watched=watcher is not None,
                keep=messages.Keep(key=keep.key, note=keep.note) if keep is not None and frozen else None,
            )
            self._send(link, submit, (descriptor,))
        finally:
            os.close(descriptor)
        if watcher is not None:
            watcher.passes(0)
        while True:
            message, descriptors = self._next_message(link, deadline)
            if isinstance(message, messages.Done):
                link.in_use = False
                logits = shared_memory.attach(descriptors[0], message.shape, getattr(torch, message.dtype))
                unpad = (slice(None), *(slice(start, stop) for start, stop in message.unpad))
                return Prediction(logits[unpad], message.queue_s, message.network_s, link.backend)
            if isinstance(message, messages.Progress) and watcher is not None:
                watcher.passes(message.passes)
            if isinstance(message, messages.Failed):
                link.in_use = False
                self._raise(message)

    def _send(self, link: Link, message: messages.Message, descriptors: Sequence[int] = ()) -> None:
        link.in_use = True
        try:
            channel.send(link.endpoint, message, descriptors)
        except OSError as error:
            raise _EngineGone(in_batch=False) from error

    def _next_message(self, link: Link, deadline: float | None) -> tuple[messages.Message, list[int]]:
        """What the engine says next, which is a heartbeat every second at least.

        Silence is counted in short waits: a machine that stood still as a whole has missed one of them, not all.

        Raises:
            Deadline: the time ran out. The engine gives a case up by itself, a little earlier.
        """
        link.endpoint.settimeout(_WAIT_S)
        silence_s = 0.0
        while silence_s < SILENCE_S:
            if deadline is not None and time.monotonic() > deadline + 2 * messages.HEARTBEAT_S:
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

    def _raise(self, failed: messages.Failed) -> NoReturn:
        raise _ERRORS.get(failed.error, ServingError)(failed.detail, failed.retry_after_s)

    def _connected(self, deadline: float | None) -> Link:
        if self._link is None:
            self._link = self._starter.link(deadline)
            self._linked = time.monotonic()
        return self._link
