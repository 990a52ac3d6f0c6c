"""The engine's compute thread: it owns the core, all torch work and the device's ledger.

Commands arrive in a queue and are obeyed between two passes, in order. Outcomes go straight to the worker's
connection. A case that fails in any step fails alone; if the device itself fails, the process ends at once, and the
workers start another one.

If the archive says so, the networks of a model that nobody asks are unloaded, and loaded again when a case is
announced: it is decoded meanwhile. While they are loaded the thread is busy like in any pass, so a load that hangs is a
hang. If there is no room for them, the cases that need them are refused, and the next one tries again.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import BundleError, Busy, OutOfMemory, ServingError
from ..open_weights import OpenWeights
from ..options import FoldName
from . import channel, shared_memory
from .accumulator import CaseAccumulator, Layout, held_bytes, new_accumulator
from .core import CaseInFlight, EngineCore, Outcome, as_serving_error
from .device_memory import DeviceMemory
from .ledger import Ledger
from .messages import Done, Failed, Message, Submit
from .network import peak_bytes
from .tally import Level, Tally, Total

logger = logging.getLogger(__name__)

_HOST = torch.device("cpu")
_IDLE_S = 1.0
_LONGEST_WAIT_S = 3600.0
_LARGE_BYTES = 256 * 1024**2
"""What such a case leaves in the allocator is worth to be given back at once: others were granted it."""

_NO_ROOM_RETRY_S = 10


class Worker(Protocol):
    """Who waits for a case."""

    def answer(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send the message and the descriptors; ``False`` if nobody waits any more."""


@dataclass(frozen=True, slots=True)
class Expect:
    """A case has come and will need the networks, until it is dropped."""

    case_id: int


@dataclass(frozen=True, slots=True)
class Admit:
    """Predict a case; ``descriptor`` is its volume's and becomes the compute thread's to close."""

    case_id: int
    message: Submit
    descriptor: int
    arrived: float
    worker: Worker


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget a case, finished or not."""

    case_id: int


Command = Expect | Admit | Drop


class Compute:
    """Predicts admitted cases in a thread of its own."""

    def __init__(
        self,
        core: EngineCore,
        device_ledger: Ledger,
        device_bytes: int,
        tally: Tally,
        check: Callable[[Callable[[], None]], None] = lambda _get_on: None,
        check_interval_s: float | None = None,
        weights: OpenWeights | None = None,
        unload_after_s: float | None = None,
    ) -> None:
        """Take the core over.

        Args:
            core: networks loaded.
            device_ledger: of the networks' device.
            device_bytes: of the device, which the networks and one forward pass take.
            tally: where it notes what it does.
            check: of the golden patches; raises where the networks would give wrong segmentations. Calls what it gets
                before each network.
            check_interval_s: between two checks; ``None`` checks no more.
            weights: of the networks; needed if these are to be unloaded.
            unload_after_s: without a case that has come and not left; ``None`` never unloads.
        """
        self._core = core
        self._tally = tally
        self._device_bytes = device_bytes
        self._memory = DeviceMemory(core.networks.device, device_ledger, device_bytes)
        tally.level(Level.DEVICE_BYTES, self._memory.total)
        tally.level(Level.NETWORKS_LOADED, 1)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._expected: set[int] = set()
        self._workers: dict[int, Worker] = {}
        self._results: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._busy_since: float | None = None
        self._stepped_s = 0.0
        self._check, self._check_interval_s = check, check_interval_s or math.inf
        self._next_check = time.monotonic() + self._check_interval_s
        self._weights = weights
        self._unload_after_s = unload_after_s if weights is not None and unload_after_s is not None else math.inf
        self._unload_at = time.monotonic() + self._unload_after_s
        self._unloads = self._reloads = 0
        self._reloading_s = 0.0
        self._malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)

    def start(self) -> None:
        """Begin to obey."""
        self._thread.start()

    def put(self, command: Command) -> None:
        """Hand a command over; any thread may."""
        self._commands.put(command)

    @property
    def busy_for_s(self) -> float:
        """Seconds that it has been at one thing: a pass, a command, an answer; 0 while it waits for commands."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def passes_done(self, case_id: int) -> int | None:
        """Forward passes of a case that are done, ``None`` before the first and after the last; any thread may ask."""
        return self._core.passes_done(case_id)

    @property
    def passes_per_s(self) -> float:
        """The measured rate; 1 before there was a pass."""
        passes, seconds = self._core.passes, self._stepped_s
        return passes / seconds if passes and seconds else 1.0

    def _run(self) -> None:
        try:
            while True:
                self._once()
        except BaseException:
            logger.exception("the compute thread ends, and the engine with it")
            os._exit(1)

    def _once(self) -> None:
        first = self._next_command() if len(self._core) == 0 else None
        self._get_on()
        if first is not None:
            self._obey(first)
        self._check_if_due()
        with suppress(queue.Empty):
            while True:
                self._obey(self._commands.get_nowait())
                self._get_on()
        self._unload_if_due()
        began = time.monotonic()
        outcomes = self._core.step(began)
        self._stepped_s += time.monotonic() - began
        self._note()
        for outcome in outcomes:
            self._get_on()
            self._report(outcome)
        self._busy_since = None

    def _get_on(self) -> None:
        """Something new begins, and may take its time."""
        self._busy_since = time.monotonic()

    def _note(self) -> None:
        core, tally = self._core, self._tally
        tally.total(Total.PASSES, core.passes)
        tally.total(Total.BATCHES, core.batches)
        tally.total(Total.SLOTS, core.slots)
        tally.total(Total.SHARED_BATCHES, core.shared_batches)
        tally.total(Total.BUSY_MICROSECONDS, round(self._stepped_s * 1e6))
        tally.level(Level.PASSES_REMAINING, core.remaining)
        tally.total(Total.UNLOADS, self._unloads)
        tally.total(Total.RELOADS, self._reloads)
        tally.total(Total.RELOADING_MICROSECONDS, round(self._reloading_s * 1e6))
        tally.level(Level.NETWORKS_LOADED, int(core.networks.loaded))

    def _next_command(self) -> Command | None:
        """Wait for work, at most until something else is due.

        After a while without any the memory of the last pass goes back to the system.
        """
        with suppress(queue.Empty):
            return self._commands.get(timeout=min(_IDLE_S, self._until_due_s()))
        self._get_on()  # a driver that hangs may do it here
        self._give_memory_back()
        if not self._expected:
            self._memory.give_cache_back()
        self._busy_since = None
        with suppress(queue.Empty):
            return self._commands.get(timeout=min(_LONGEST_WAIT_S, self._until_due_s()))
        return None

    def _until_due_s(self) -> float:
        """Seconds until the golden patch is to be checked, or the networks to be unloaded."""
        return max(0.0, min(self._next_check, self._unload_at) - time.monotonic())

    def _check_if_due(self) -> None:
        """Compute the golden patch again. A mismatch ends this engine; the next one is checked when it starts."""
        if time.monotonic() < self._next_check:
            return
        with _ending_if_wrong():
            self._check(self._get_on)
        logger.info("the golden patch is as it was")
        self._next_check = time.monotonic() + self._check_interval_s

    def _unload_if_due(self) -> None:
        if time.monotonic() < self._unload_at or len(self._core):
            return
        self._unload()
        self._unloads += 1
        logger.info("networks unloaded after %g s without a case", self._unload_after_s)

    def _unload(self) -> None:
        """Nothing is due any more until they are loaded again."""
        self._core.networks.unload()
        self._give_memory_back()
        self._memory.hold_networks(0)
        self._next_check = self._unload_at = math.inf

    def _load(self) -> bool:
        """Load unloaded networks and check them; ``False`` if there is no room for them now.

        Raises:
            Exception: the device or the disk has failed: this engine has nothing to serve with.
        """
        networks, weights, began = self._core.networks, self._weights, time.monotonic()
        if networks.loaded or weights is None:
            return True

        self._memory.hold_networks(self._device_bytes)  # first: what others place meanwhile must leave this room
        try:
            with _ending_if_wrong():
                networks.load(_Watched(weights, self._get_on))
                self._check(self._get_on)
            self._device_bytes = peak_bytes(networks, self._core.batch)
        except Exception as error:
            if not isinstance(as_serving_error(error), OutOfMemory):
                raise
        else:
            self._memory.hold_networks(self._device_bytes)
            self._next_check = time.monotonic() + self._check_interval_s
            self._reloads += 1
            self._reloading_s += time.monotonic() - began
            logger.info("networks loaded again in %.2f s", time.monotonic() - began)
            return True
        # out here what the failed attempt held is free
        self._unload()
        logger.warning("no memory to load the networks again; the next case will try")
        return False

    def _give_memory_back(self) -> None:
        if self._malloc_trim is not None:
            self._malloc_trim(0)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Expect):
            self._expected.add(command.case_id)
            self._load()
        elif isinstance(command, Drop):
            self._core.drop(command.case_id)
            self._end(command.case_id)
            self._expected.discard(command.case_id)
        else:
            self._admit(command)
        if self._core.networks.loaded:
            self._unload_at = math.inf if self._expected else time.monotonic() + self._unload_after_s

    def _admit(self, command: Admit) -> None:
        self._workers[command.case_id] = command.worker
        if not self._load():
            os.close(command.descriptor)
            msg = "the model was idle, and there is no memory to load its networks again now; try again later"
            self._fail(command.case_id, Busy(msg, _NO_ROOM_RETRY_S))
            return
        try:
            with self._core.blaming(command.case_id):
                self._core.admit(self._case(command))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            self._fail(command.case_id, as_serving_error(error))

    def _case(self, command: Admit) -> CaseInFlight:
        message, settings = command.message, command.message.settings()
        data = shared_memory.attach(command.descriptor, message.shape, torch.float32)
        if settings.member not in self._core.networks.members:
            msg = f"not this model's: {settings}"
            raise channel.ChannelError(msg)
        networks = self._core.networks.of(settings.member)
        known = set(settings.folds) <= set(networks.folds) and settings.folds
        axes = set(range(len(networks.patch_size)))
        if data.shape[0] != networks.input_channels or not known or not set(settings.mirroring_axes) <= axes:
            msg = f"not this model's: {data.shape[0]} channels, {settings}"
            raise channel.ChannelError(msg)

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            tensor, self._results[command.case_id] = shared_memory.share(shape, dtype, "nnunet-logits")
            return tensor

        def accumulate(layout: Layout) -> CaseAccumulator:
            with torch.inference_mode():
                return new_accumulator(data, settings, layout, allocate if networks.device == _HOST else None)

        layout = Layout(networks.classes, networks.patch_size, networks.device, self._core.batch)
        size = self._sizes[command.case_id] = held_bytes(message.shape, settings, layout)
        accumulator = self._memory.place(command.case_id, size, layout, accumulate)
        return CaseInFlight(
            command.case_id,
            settings.member,
            accumulator,
            command.arrived,
            message.deadline,
            message.suspect,
            priority=settings.priority,
            passes_after=message.passes_after,
        )

    def _report(self, outcome: Outcome) -> None:
        case_id = outcome.case.case_id
        if outcome.error is not None:
            self._fail(case_id, outcome.error)
            return
        try:
            with self._core.blaming(case_id):
                self._deliver(outcome.case)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            self._fail(case_id, as_serving_error(error))

    def _deliver(self, case: CaseInFlight) -> None:
        logits = case.accumulator.result()
        if case.case_id not in self._results:  # it was not summed in shared memory
            shared, self._results[case.case_id] = shared_memory.share(logits.shape, logits.dtype, "nnunet-logits")
            with self._memory.transfers():
                shared.copy_(logits)
        queue_s, network_s = case.times(time.monotonic())
        first, second, third, fourth = (int(n) for n in logits.shape)
        done = Done(
            shape=(first, second, third, fourth),
            dtype="float32" if logits.dtype is torch.float32 else "float16",
            unpad=tuple((int(s.start), int(s.stop)) for s in case.accumulator.unpad[1:]),
            queue_s=queue_s,
            network_s=network_s,
        )
        self._end(case.case_id, done, [self._results[case.case_id]])

    def _fail(self, case_id: int, error: ServingError) -> None:
        self._end(case_id, Failed.of(error))

    def _end(self, case_id: int, message: Message | None = None, descriptors: Sequence[int] = ()) -> None:
        """Tell the worker, if it is still there, and keep nothing of the case."""
        worker = self._workers.pop(case_id, None)
        if worker is not None and message is not None:
            worker.answer(message, descriptors)
        if (descriptor := self._results.pop(case_id, None)) is not None:
            os.close(descriptor)
        self._memory.free(case_id)
        if self._sizes.pop(case_id, 0) > _LARGE_BYTES:
            self._give_memory_back()


@dataclass(frozen=True, slots=True)
class _Watched:
    """Weights, and who is told of each file that is read: it may be as slow as the disk is."""

    weights: OpenWeights
    get_on: Callable[[], None]

    def read(self, member: str, fold: FoldName) -> Mapping[str, torch.Tensor]:
        """See :class:`~.backends.interface.Weights`."""
        self.get_on()
        return self.weights.read(member, fold)

    def content(self, file: str) -> bytes:
        """See there too."""
        self.get_on()
        return self.weights.content(file)


@contextmanager
def _ending_if_wrong() -> Iterator[None]:
    """End the process if the networks turn out to give wrong segmentations, or their weights to be others."""
    try:
        yield
    except BundleError as error:
        logger.critical("the engine ends: %s", error)
        os._exit(1)
