"""The engine in a process of its own: one for each model and device, shared by all workers.

Life. A worker starts it (:mod:`.remote`); it forks away from that worker, into a session of its own, with a log of
its own. It holds a lock on ``alive`` for as long as it lives, which the kernel frees however it dies. It listens
before the slow imports, so that racing workers queue up instead of starting more engines, and says hello when the
networks are loaded. It imports everything up front: unregistering a model deletes the directory that it came from. It
leaves some seconds after its last worker.

Threads. The main thread owns every socket's reading, admission and the heartbeat; the compute thread owns the
:class:`~.core.EngineCore` and all torch work. The main thread hands commands over in a queue, in order; the compute
thread sends each outcome itself. The only lock is the one around a connection's sends and its closing.

Faults. Whatever a worker sends, only its own connection is closed. Whatever a case does, it alone fails
(:mod:`.core`). If the compute thread ends or a pass lasts too long, heartbeats stop and the workers start another
engine.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..errors import ServingError
    from .channel import Message, Submit
    from .core import EngineCore, Outcome

SOCKET, ALIVE, LOCK, LOG = "engine.sock", "alive", "lock", "engine.log"
HEARTBEAT_S = 1.0
IDLE_S = 5.0
PASS_LIMIT_S = 300.0
"""A forward pass that lasts longer is a hang."""

_BACKLOG = 128
_MAX_LOG_BYTES = 4 * 1024**2


class _Connection:
    """One worker."""

    def __init__(self, endpoint: socket.socket) -> None:
        import threading

        self.endpoint = endpoint
        self.case_id: int | None = None
        self._lock = threading.Lock()
        self._open = True

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> bool:
        """Send without waiting; a worker that does not read is given up."""
        from . import channel

        with self._lock:
            if not self._open:
                return False
            try:
                channel.send(self.endpoint, message, descriptors)
            except OSError:
                return False
            return True

    def close(self) -> None:
        """Close once, never under a send."""
        with self._lock:
            self._open = False
            self.endpoint.close()


class EngineProcess:
    """The main thread's state."""

    def __init__(self, folder: Path, listener: socket.socket, core: EngineCore, record: Any, record_fd: int) -> None:
        """Take over a listening socket.

        Args:
            folder: the engine's own directory.
            listener: bound and listening.
            core: networks loaded; from now on the compute thread's.
            record: the flight record that the core writes.
            record_fd: its descriptor, sent with every hello.
        """
        import queue
        import threading

        self._folder, self._listener, self._core = folder, listener, core
        self._record, self._record_fd = record, record_fd
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._connections: dict[int, _Connection] = {}
        self._owners: dict[int, _Connection] = {}
        self._results: dict[int, int] = {}
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._next_case = 1
        self._pass_began: float | None = None
        self._compute = threading.Thread(target=self._compute_forever, name="compute", daemon=True)

    def run(self) -> None:
        """Serve until idle for ``IDLE_S``."""
        self._compute.start()
        idle_since: float | None = time.monotonic()
        next_beat = time.monotonic()
        while True:
            for key, _ in self._selector.select(timeout=max(0.0, next_beat - time.monotonic())):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(self._connections[key.fd])
            now = time.monotonic()
            if now < next_beat:
                continue
            next_beat = now + HEARTBEAT_S
            if not self._compute.is_alive():
                msg = "the compute thread has ended"
                raise RuntimeError(msg)
            self._beat(now)
            self._listen_again_if_unlinked()
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
            sys.stderr.write(f"refused a connection: {error}\n")
            connection.close()
            return
        endpoint.setblocking(False)
        if connection.send(channel.Hello(protocol=channel.PROTOCOL, pid=os.getpid()), (self._record_fd,)):
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
            if not isinstance(message, channel.Submit) or len(descriptors) != 1 or connection.case_id is not None:
                channel.close_all(descriptors)
                msg = f"a {message.kind} with {len(descriptors)} descriptors was not expected now"
                raise channel.ChannelError(msg)
            case_id, self._next_case = self._next_case, self._next_case + 1
            connection.case_id = case_id
            self._owners[case_id] = connection
            connection.send(channel.Accepted(case_id=case_id))
            self._commands.put(("admit", case_id, message, descriptors[0], time.monotonic()))
        except BlockingIOError:
            return
        except (channel.ChannelError, OSError) as error:
            sys.stderr.write(f"closed a connection: {error}\n")
            self._forget(connection)

    def _forget(self, connection: _Connection) -> None:
        """A worker has left or broke the protocol: its case is dropped at the next pass."""
        descriptor = connection.endpoint.fileno()
        if self._connections.pop(descriptor, None) is not None:
            self._selector.unregister(connection.endpoint)
        connection.close()
        if connection.case_id is not None:
            self._commands.put(("drop", connection.case_id))

    def _beat(self, now: float) -> None:
        from .channel import Heartbeat

        began = self._pass_began
        if began is not None and now - began > PASS_LIMIT_S:
            return
        for connection in list(self._connections.values()):
            if connection.case_id is not None:
                connection.send(Heartbeat())

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
        import queue

        while True:
            with suppress(queue.Empty):
                while True:
                    self._obey(self._commands.get(block=len(self._core) == 0))
            self._pass_began = time.monotonic()
            outcomes = self._core.step(self._pass_began)
            self._pass_began = None
            for outcome in outcomes:
                self._report(outcome)
            del outcomes

    def _obey(self, command: tuple[Any, ...]) -> None:
        if command[0] == "drop":
            self._core.drop(command[1])
            self._end(command[1])
            return
        _, case_id, message, descriptor, arrived = command
        from .core import as_serving_error

        try:
            self._core.admit(self._case(case_id, message, descriptor, arrived))
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this case's)
            self._fail(case_id, as_serving_error(error))

    def _case(self, case_id: int, message: Submit, descriptor: int, arrived: float) -> Any:
        import torch

        from . import channel
        from .accumulator import CaseAccumulator
        from .core import CaseInFlight

        networks = self._core.networks
        data = channel.attach(descriptor, message.shape, torch.float32)
        spatial = len(networks.patch_size)
        known = set(message.folds) <= set(networks.folds) and message.folds
        if (
            data.shape[0] != networks.input_channels
            or not known
            or not set(message.mirroring_axes) <= set(range(spatial))
        ):
            msg = (
                f"{data.shape[0]} channels, folds {message.folds}, mirroring {message.mirroring_axes}: not this model's"
            )
            raise channel.ChannelError(msg)

        def allocate(shape: tuple[int, ...]) -> torch.Tensor:
            tensor, self._results[case_id] = channel.share(shape, torch.half, "nnunet-logits")
            return tensor

        on_host = networks.device.type == "cpu"
        with torch.inference_mode():
            accumulator = CaseAccumulator(
                data, networks.classes, networks.patch_size, message.settings(), networks.device,
                allocate if on_host else None, message.deadline,
            )  # fmt: skip
        return CaseInFlight(case_id, accumulator, arrived, message.deadline, message.suspect)

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
        if case.case_id not in self._results:  # it lies on the device
            shared, self._results[case.case_id] = channel.share(logits.shape, logits.dtype, "nnunet-logits")
            shared.copy_(logits)
        started, ended = case.first_pass or case.arrived, time.monotonic()
        first, second, third, fourth = (int(n) for n in logits.shape)
        done = channel.Done(
            case_id=case.case_id,
            shape=(first, second, third, fourth),
            unpad=tuple((int(s.start), int(s.stop)) for s in case.accumulator.unpad[1:]),
            queue_s=started - case.arrived,
            network_s=ended - started,
        )
        self._end(case.case_id, done, (self._results[case.case_id],))

    def _fail(self, case_id: int, error: ServingError) -> None:
        from .channel import Failed

        self._end(case_id, Failed(case_id=case_id, code=error.code, detail=str(error)))

    def _end(self, case_id: int, message: Message | None = None, descriptors: tuple[int, ...] = ()) -> None:
        """Tell the worker, if it is still there, and keep nothing of the case."""
        connection = self._owners.pop(case_id, None)
        if connection is not None:
            connection.case_id = None
            if message is not None:
                connection.send(message, descriptors)
        if (descriptor := self._results.pop(case_id, None)) is not None:
            os.close(descriptor)


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
    log = folder / LOG
    with suppress(OSError):
        if log.stat().st_size > _MAX_LOG_BYTES:
            log.unlink()
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def main(folder: Path, model_dir: Path, device_name: str, batch: int, policy: str) -> int:
    """Run an engine; returns when it is idle, or at once if another one lives."""
    _detach(folder)
    alive = os.open(folder / ALIVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    path = folder / SOCKET
    listener = _listen(path)
    try:
        process = _load(folder, listener, model_dir, device_name, batch, policy)
    except Exception as error:
        _refuse_everybody(listener, f"{type(error).__name__}: {error}")
        raise
    try:
        process.run()
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
    return 0


def _load(
    folder: Path, listener: socket.socket, model_dir: Path, device_name: str, batch: int, policy: str
) -> EngineProcess:
    import torch

    from ..bundle import ModelBundle
    from . import accumulator, channel, scheduler  # noqa: F401 (up front: the directory may be deleted)
    from .core import EngineCore
    from .network import load_networks

    networks = load_networks(ModelBundle(model_dir), torch.device(device_name))
    record, record_fd = channel.FlightRecord.create()
    core = EngineCore(networks, batch, scheduler.Policy(policy), record.write)
    return EngineProcess(folder, listener, core, record, record_fd)


def _refuse_everybody(listener: socket.socket, reason: str) -> None:
    """Tell the workers that wait why there will be no engine."""
    from .channel import Refused, send

    with suppress(OSError):
        while True:
            endpoint, _ = listener.accept()
            with suppress(OSError), endpoint:
                send(endpoint, Refused(reason=reason[:1000]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]))
