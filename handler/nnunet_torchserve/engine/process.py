"""The engine in a process of its own: one for each model and device, shared by all workers.

Life. A worker starts it (:mod:`.remote`); it forks away from that worker, into a session of its own, with a log of
its own. It holds a lock on ``alive`` for as long as it lives, which the kernel frees however it dies. It listens
before the slow imports, so that racing workers queue up instead of starting more engines, and says hello when the
networks are loaded. It imports everything up front: unregistering a model deletes the directory that it came from. It
leaves some seconds after its last worker.

A case. The worker reserves what the case will take (:mod:`.admission`), decodes and preprocesses it, submits it, gets
its logits, exports them, and releases. Whatever ends the connection releases too.

Threads. The main thread owns every socket's reading, the connections' state, admission, the host's ledger and the
heartbeat. The compute thread owns the :class:`~.core.EngineCore`, all torch work and the device's ledger. The main
thread hands commands over in a queue, in order; the compute thread sends each outcome itself and tells the main
thread nothing. The only locks are those around a connection's sends and its closing; nothing is called under them but
the socket. ``_owners`` is written by the main thread and read by both.

Faults. Whatever a worker sends, only its own connection is closed. Whatever a case does, it alone fails
(:mod:`.core`). If a pass lasts too long, heartbeats stop and the workers start another engine; if the device fails,
the process ends at once with the same result.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import selectors
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..errors import ServingError
    from .accumulator import CaseAccumulator
    from .channel import EngineSettings, Message, Reserve, Submit
    from .core import EngineCore, Outcome

logger = logging.getLogger(__name__)

SOCKET, LOCK, LOG = "engine.sock", "lock", "engine.log"
HEARTBEAT_S = 1.0
IDLE_S = 5.0
PASS_LIMIT_S = 300.0
"""A forward pass that lasts longer is a hang."""

_BACKLOG = 128
_MAX_LOG_BYTES = 4 * 1024**2
_LOOK_AGAIN_S = 0.1
"""While cases wait: another engine may have released memory."""

_LONGEST_RETRY_S = 600
_DEVICE_SHARE = 0.9
"""Of a GPU's memory, for all engines on it; the rest is for the CUDA contexts."""


class _State(Enum):
    """Where a connection's case is, as the main thread sees it."""

    IDLE = auto()
    WAITING = auto()
    GRANTED = auto()
    SUBMITTED = auto()


class _Connection:
    """One worker."""

    def __init__(self, endpoint: socket.socket) -> None:
        import threading

        self.endpoint = endpoint
        self.state = _State.IDLE
        self.case_id = 0
        self._listening = False
        self._lock = threading.Lock()
        self._open = True

    def expect(self) -> None:
        """The worker waits for an answer now: it gets heartbeats until then."""
        with self._lock:
            self._listening = True

    def beat(self, message: Message) -> None:
        """Send a heartbeat if the worker waits; one that does not read would fill its socket with them."""
        self._send(message, (), last=False)

    def answer(self, message: Message, descriptors: tuple[int, ...] = ()) -> bool:
        """Send what the worker waits for, without waiting; a worker that does not read is given up."""
        return self._send(message, descriptors, last=True)

    def close(self) -> None:
        """Close once, never under a send."""
        with self._lock:
            self._open = False
            self.endpoint.close()

    def _send(self, message: Message, descriptors: tuple[int, ...], *, last: bool) -> bool:
        from . import channel

        with self._lock:
            if not self._open or not self._listening:
                return False
            self._listening = not last
            try:
                channel.send(self.endpoint, message, descriptors)
            except OSError:
                return False
            return True


@dataclass(frozen=True, slots=True)
class _Admit:
    case_id: int
    message: Submit
    descriptor: int
    arrived: float


@dataclass(frozen=True, slots=True)
class _Drop:
    case_id: int


class EngineProcess:
    """The main thread's state, and below it the compute thread's."""

    def __init__(
        self, folder: Path, listener: socket.socket, core: EngineCore, settings: EngineSettings, record_fd: int
    ) -> None:
        """Take over a listening socket.

        Args:
            folder: the engine's own directory.
            listener: bound and listening.
            core: networks loaded; from now on the compute thread's.
            settings: budget and device.
            record_fd: the flight record's descriptor, sent with every hello.
        """
        import queue
        import threading

        from .admission import Admission, Budget
        from .ledger import Ledger

        self._folder, self._listener, self._record_fd = folder, listener, record_fd
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._connections: dict[int, _Connection] = {}
        self._owners: dict[int, _Connection] = {}
        self._next_case = 1
        self._admission = Admission(Budget(settings.memory_bytes, settings.passes, settings.waiting_cases))
        self._host = Ledger(folder, "host")
        self._commands: queue.SimpleQueue[_Admit | _Drop] = queue.SimpleQueue()
        self._pass_began: float | None = None
        self._busy_s = 0.0

        self._core = core
        self._results: dict[int, int] = {}
        self._device = _DeviceMemory(core, Ledger(folder, settings.device))
        self._compute = threading.Thread(target=self._compute_forever, name="compute", daemon=True)

    def run(self) -> None:
        """Serve until idle for ``IDLE_S``."""
        self._compute.start()
        idle_since: float | None = time.monotonic()
        next_beat = time.monotonic()
        while True:
            pause = _LOOK_AGAIN_S if self._admission.waiting else max(0.0, next_beat - time.monotonic())
            for key, _ in self._selector.select(pause):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._connections:
                    self._serve(self._connections[key.fd])
            if self._admission.waiting:
                self._grant()
            now = time.monotonic()
            if now < next_beat:
                continue
            next_beat = now + HEARTBEAT_S
            self._beat(now)
            self._listen_again_if_unlinked()
            _bound_log()
            if self._connections:
                idle_since = None
            elif idle_since is None:
                idle_since = now
            elif now - idle_since > IDLE_S:
                return

    def _accept(self) -> None:
        from . import channel

        try:
            endpoint, _ = self._listener.accept()
        except OSError:
            return
        connection = _Connection(endpoint)
        try:
            channel.peer_pid(endpoint)
        except channel.ChannelError as error:
            logger.warning("refused a connection: %s", error)
            connection.close()
            return
        endpoint.setblocking(False)
        connection.expect()
        if connection.answer(channel.Hello(protocol=channel.PROTOCOL), (self._record_fd,)):
            self._connections[endpoint.fileno()] = connection
            self._selector.register(endpoint, selectors.EVENT_READ)
        else:
            connection.close()

    def _serve(self, connection: _Connection) -> None:
        from . import channel

        try:
            received = channel.receive(connection.endpoint)
            if received is None:
                self._forget(connection)
                return
            message, descriptors = received
            if isinstance(message, channel.Submit) and connection.state is _State.GRANTED and len(descriptors) == 1:
                connection.state = _State.SUBMITTED
                connection.expect()
                self._commands.put(_Admit(connection.case_id, message, descriptors[0], time.monotonic()))
                return
            channel.close_all(descriptors)
            if isinstance(message, channel.Reserve) and connection.state is _State.IDLE:
                self._reserve(connection, message)
            elif isinstance(message, channel.Release) and connection.state is not _State.IDLE:
                self._release(connection)
            else:
                msg = f"a {message.kind} with {len(descriptors)} descriptors was not expected now"
                raise channel.ChannelError(msg)
        except BlockingIOError:
            return
        except (channel.ChannelError, OSError) as error:
            logger.warning("closed a connection: %s", error)
            self._forget(connection)

    def _reserve(self, connection: _Connection, message: Reserve) -> None:
        from . import channel
        from .admission import Claim

        connection.expect()
        claim = Claim(self._next_case, message.bytes, message.passes, message.guaranteed)
        self._next_case += 1
        if claim.exceeds(self._admission.budget) and not claim.guaranteed:
            detail = "this case needs more memory or forward passes than the engine has for all cases"
            connection.answer(channel.Failed(code="out_of_memory", detail=detail))
            return
        if not self._admission.ask(claim):
            detail = f"{self._admission.waiting} cases wait for memory already; try again later"
            connection.answer(channel.Failed(code="busy", detail=detail, retry_after_s=self._retry_after_s()))
            return
        connection.case_id, connection.state = claim.number, _State.WAITING
        self._owners[claim.number] = connection
        self._grant()

    def _grant(self) -> None:
        """Let the cases go on that fit now, seen together with what other engines hold."""
        from .channel import Granted

        self._host.hold(self._admission.charged_bytes + self._admission.waiting_bytes)
        self._admission.elsewhere = self._host.elsewhere()
        for case_id in self._admission.grant():
            connection = self._owners[case_id]
            connection.state = _State.GRANTED
            connection.answer(Granted(case_id=case_id))
        self._host.hold(self._admission.charged_bytes)

    def _release(self, connection: _Connection) -> None:
        self._commands.put(_Drop(connection.case_id))
        self._owners.pop(connection.case_id, None)
        self._admission.release(connection.case_id)
        self._host.hold(self._admission.charged_bytes)
        connection.state = _State.IDLE

    def _forget(self, connection: _Connection) -> None:
        """A worker has left or broke the protocol: its case is dropped at the next pass."""
        descriptor = connection.endpoint.fileno()
        if self._connections.pop(descriptor, None) is not None:
            self._selector.unregister(connection.endpoint)
        connection.close()
        if connection.state is not _State.IDLE:
            self._release(connection)

    def _beat(self, now: float) -> None:
        from .channel import Heartbeat

        began = self._pass_began
        if began is not None and now - began > PASS_LIMIT_S:
            return
        for connection in self._connections.values():
            connection.beat(Heartbeat())

    def _retry_after_s(self) -> int:
        """Seconds that the passes in hand take at the measured rate."""
        rate = self._core.passes / self._busy_s if self._busy_s else 1.0
        return max(1, min(_LONGEST_RETRY_S, math.ceil(self._admission.charged_passes / max(rate, 1e-3))))

    def _listen_again_if_unlinked(self) -> None:
        """Something cleaned the directory up: be found again."""
        path = self._folder / SOCKET
        if path.exists():
            return
        with suppress(OSError):
            listener = _listen(path)
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = listener
            self._selector.register(listener, selectors.EVENT_READ)

    # -- compute thread ---------------------------------------------------------------------------------------------

    def _compute_forever(self) -> None:
        try:
            while True:
                self._compute_once()
        except BaseException:
            logger.exception("the compute thread ends, and the engine with it")
            os._exit(1)

    def _compute_once(self) -> None:
        import queue

        with suppress(queue.Empty):
            while True:
                self._obey(self._commands.get(block=len(self._core) == 0))
        self._pass_began = time.monotonic()
        outcomes = self._core.step(self._pass_began)
        self._busy_s += time.monotonic() - self._pass_began
        self._pass_began = None
        for outcome in outcomes:
            self._report(outcome)

    def _obey(self, command: _Admit | _Drop) -> None:
        if isinstance(command, _Drop):
            self._core.drop(command.case_id)
            self._end(command.case_id)
            return
        from .core import as_serving_error

        try:
            self._core.admit(self._case(command))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            self._fail(command.case_id, as_serving_error(error))

    def _case(self, command: _Admit) -> Any:
        import torch

        from . import channel
        from .accumulator import Layout
        from .core import CaseInFlight

        networks, message, case_id = self._core.networks, command.message, command.case_id
        data = channel.attach(command.descriptor, message.shape, torch.float32)
        known = set(message.folds) <= set(networks.folds) and message.folds
        axes = set(range(len(networks.patch_size)))
        if data.shape[0] != networks.input_channels or not known or not set(message.mirroring_axes) <= axes:
            msg = (
                f"{data.shape[0]} channels, folds {message.folds}, mirroring {message.mirroring_axes}: not this model's"
            )
            raise channel.ChannelError(msg)
        layout = Layout(networks.classes, networks.patch_size, networks.device, self._core.batch)
        accumulator = self._device.place(case_id, layout, message, lambda where: self._accumulate(command, data, where))
        return CaseInFlight(case_id, accumulator, command.arrived, message.deadline, message.suspect)

    def _accumulate(self, command: _Admit, data: torch.Tensor, layout: Any) -> CaseAccumulator:
        import torch

        from . import channel
        from .accumulator import new_accumulator

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            tensor, self._results[command.case_id] = channel.share(shape, dtype, "nnunet-logits")
            return tensor

        on_host = layout.device.type == "cpu"
        with torch.inference_mode():
            return new_accumulator(
                data, command.message.settings(), layout, allocate if on_host else None, command.message.deadline
            )

    def _report(self, outcome: Outcome) -> None:
        case_id = outcome.case.case_id
        if outcome.error is not None:
            self._fail(case_id, outcome.error)
            return
        from .core import as_serving_error

        try:
            self._deliver(outcome)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            self._fail(case_id, as_serving_error(error))

    def _deliver(self, outcome: Outcome) -> None:
        from . import channel

        case = outcome.case
        logits = case.accumulator.result()
        if case.case_id not in self._results:  # it lies on the device, or was moved from there
            shared, self._results[case.case_id] = channel.share(logits.shape, logits.dtype, "nnunet-logits")
            with self._device.transfers():
                shared.copy_(logits)
        queue_s, network_s = case.times(time.monotonic())
        first, second, third, fourth = (int(n) for n in logits.shape)
        done = channel.Done(
            shape=(first, second, third, fourth),
            dtype=str(logits.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            unpad=tuple((int(s.start), int(s.stop)) for s in case.accumulator.unpad[1:]),
            queue_s=queue_s,
            network_s=network_s,
        )
        self._end(case.case_id, done, (self._results[case.case_id],))

    def _fail(self, case_id: int, error: ServingError) -> None:
        from .channel import Failed

        self._end(case_id, Failed(code=error.code, detail=str(error)))

    def _end(self, case_id: int, message: Message | None = None, descriptors: tuple[int, ...] = ()) -> None:
        """Tell the worker, if it is still there, and keep nothing of the case."""
        connection = self._owners.get(case_id)
        if connection is not None and message is not None:
            connection.answer(message, descriptors)
        if (descriptor := self._results.pop(case_id, None)) is not None:
            os.close(descriptor)
        self._device.free(case_id)


class _DeviceMemory:
    """A GPU's memory, shared with other engines; of a CPU nothing is kept here. The compute thread's."""

    def __init__(self, core: EngineCore, ledger: Any) -> None:
        import torch

        self._ledger = ledger
        self._cases: dict[int, int] = {}
        self._cuda = core.networks.device.type == "cuda"
        device = core.networks.device
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        if self._cuda:
            self._capacity = int(torch.cuda.get_device_properties(device).total_memory * _DEVICE_SHARE)
            self._networks = torch.cuda.memory_reserved(device)
            ledger.hold(self._networks)

    def place(self, case_id: int, layout: Any, message: Submit, accumulate: Any) -> CaseAccumulator:
        """The accumulator of a case, on the GPU where it fits, else on the host, as stock does."""
        import dataclasses

        import torch

        from .accumulator import held_bytes

        host = dataclasses.replace(layout, device=torch.device("cpu"))
        if not self._cuda:
            return accumulate(layout)  # type: ignore[no-any-return]
        needed = held_bytes(message.shape, message.settings(), layout)
        if not self._ledger.try_hold(self._networks + sum(self._cases.values()) + needed, self._capacity):
            logger.warning("case %d is summed on the host: other cases or engines hold the device's memory", case_id)
            return accumulate(host)  # type: ignore[no-any-return]
        self._cases[case_id] = needed
        try:
            return accumulate(layout)  # type: ignore[no-any-return]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self.free(case_id)
            logger.warning("case %d is summed on the host: the device is out of memory", case_id)
            return accumulate(host)  # type: ignore[no-any-return]

    def transfers(self) -> Any:
        """Copies made inside do not wait for the batch that runs."""
        import torch

        return torch.cuda.stream(self._stream)

    def free(self, case_id: int) -> None:
        """A case has ended."""
        if self._cases.pop(case_id, None) is not None:
            self._ledger.hold(self._networks + sum(self._cases.values()))


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with suppress(FileNotFoundError):
        path.unlink()
    # a path may have 107 bytes: go through the directory's descriptor
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _detach(folder: Path) -> None:
    """Fork away from the worker that started us, into a session of our own, with our own log."""
    if os.fork():
        os._exit(0)
    os.setsid()
    try:
        output = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    _bound_log()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(message)s")


def _bound_log() -> None:
    """Start the log over when it is too long."""
    with suppress(OSError):
        if os.fstat(2).st_size > _MAX_LOG_BYTES:
            os.ftruncate(2, 0)


def _take_life_lock(folder: Path) -> bool:
    """Hold ``alive`` until this process ends; ``False`` if another engine does. A reader's look lasts microseconds."""
    from .ledger import ALIVE

    alive = os.open(folder / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(20):
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
    os.close(alive)
    return False


def main(folder: Path, model_dir: Path, settings: str) -> int:
    """Run an engine; returns when it is idle, or at once if another one lives."""
    _detach(folder)
    if not _take_life_lock(folder):
        return 0
    path = folder / SOCKET
    listener = _listen(path)
    try:
        process = _load(folder, listener, model_dir, settings)
    except Exception as error:
        logger.exception("the engine cannot serve")
        _refuse_everybody(listener, f"{type(error).__name__}: {error}")
        return 1
    try:
        process.run()
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
    return 0


def _load(folder: Path, listener: socket.socket, model_dir: Path, settings_text: str) -> EngineProcess:
    import torch

    from ..bundle import ModelBundle
    from . import accumulator, admission, channel, core, faults, scheduler  # noqa: F401 (the directory may go away)
    from .network import load_networks, probe_batch

    settings = channel.EngineSettings.model_validate_json(settings_text)
    networks = load_networks(ModelBundle(model_dir), torch.device(settings.device))
    batch = probe_batch(networks) if settings.max_patch_batch == "auto" else settings.max_patch_batch
    record, record_fd = channel.FlightRecord.create()
    policy = scheduler.Policy(settings.policy)
    engine = core.EngineCore(networks, batch, policy, record.write, faults.Faults.from_environment())
    logger.info("ready: %s on %s, batches of %d, %s", model_dir.name, settings.device, batch, policy)
    return EngineProcess(folder, listener, engine, settings, record_fd)


def _refuse_everybody(listener: socket.socket, reason: str) -> None:
    """Tell the workers that wait why there will be no engine."""
    from .channel import Refused, send

    with suppress(OSError):
        while True:
            endpoint, _ = listener.accept()
            with suppress(OSError), endpoint:
                send(endpoint, Refused(reason=reason[:1000]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
