"""What workers and the engine process say to each other, and how volumes change hands.

A Unix socket of sequenced packets: one packet is one message, so nothing is ever read halfway, and file descriptors
stay with the message that they came with. Messages are JSON, checked by pydantic on arrival. Volumes are memfds: they
are bounded by no /dev/shm, vanish with the last process that has them, and are sealed against shrinking, because a
shrunk file under a reader's map is a SIGBUS. A receiver believes neither size nor shape without looking.
"""

from __future__ import annotations

import array
import errno
import fcntl
import math
import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from ..backend import Backend
from ..cases import Settings
from ..errors import ServingError
from ..member_description import MemberName
from ..options import MIN_TILE_STEP_SIZE, Accumulate, FoldName, Priority

PROTOCOL = 9
MAX_MESSAGE_BYTES = 16 * 1024
HEARTBEAT_S = 1.0
PROGRESS_S = 0.5
"""While the case of a worker that watches is predicted, heartbeats come as often, and its own says what is done."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FROZEN = _SEALS | fcntl.F_SEAL_WRITE
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
_FD_BYTES = array.array("i").itemsize
FLIGHT_RECORD_CASES = 64


class EngineSettings(BaseModel):
    """What an engine is started with; part of its identity.

    Attributes:
        device: ``cpu`` or ``cuda:<n>``; ``cpu:<n>`` stands in for a GPU in tests.
        max_patch_batch: passes in a batch; ``auto`` probes what is fastest on CUDA, and is 1 on a CPU.
        policy: of :class:`~.scheduler.Policy`.
        memory_bytes, passes, waiting_cases: see :class:`~..limits.Limits`.
        machine_bytes: memory that the cases of all engines may take together.
        golden_interval_s: seconds between two checks of the golden patch; ``None``: it is checked at the start only.
        cache_bytes: of preprocessed volumes that are kept for later cases.
        unload_after_s: seconds without a case after which the networks give their memory back; ``None``: never.
        backend: that is to run; eager does where the machine cannot.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    max_patch_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    policy: str
    memory_bytes: int
    machine_bytes: int
    passes: int
    waiting_cases: int
    golden_interval_s: Annotated[float, Field(gt=0)] | None = None
    cache_bytes: Annotated[int, Field(ge=0)] = 0
    unload_after_s: Annotated[float, Field(gt=0)] | None = None
    backend: Backend = Backend.EAGER


class ChannelError(Exception):
    """The peer broke the protocol, or is another user's."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


_Voxels = Annotated[int, Field(ge=1)]
_Shape = tuple[_Voxels, _Voxels, _Voxels, _Voxels]
_Note = Annotated[str, Field(max_length=2000)]
_Key = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Hello(_Message):
    """Engine → worker, first of all, with the descriptors of flight record and tally: the networks are loaded.

    ``backend`` is what really runs them.
    """

    kind: Literal["hello"] = "hello"
    protocol: int
    backend: Backend


class Refused(_Message):
    """Engine → worker, instead of hello: it cannot serve."""

    kind: Literal["refused"] = "refused"
    reason: str


class Reserve(_Message):
    """Worker → engine, before a case is decoded: what it will take; see :class:`~.admission.Claim`.

    ``answer`` is that of :class:`~.prediction.Keys`.
    """

    kind: Literal["reserve"] = "reserve"
    bytes: Annotated[int, Field(ge=0)]
    passes: Annotated[int, Field(ge=0)]
    guaranteed: bool = False
    watched: bool = False
    answer: _Key | None = None
    priority: Priority = Priority.INTERACTIVE


class Granted(_Message):
    """Engine → worker: go on; the case's number, as the flight record names it."""

    kind: Literal["granted"] = "granted"
    case_id: int


class Amend(_Message):
    """Worker → engine, with a granted case that is not being predicted: what it takes is known now, and this.

    Answered with granted, or failed.
    """

    kind: Literal["amend"] = "amend"
    bytes: Annotated[int, Field(ge=0)]
    passes: Annotated[int, Field(ge=0)]


class Recall(_Message):
    """Worker → engine, with a granted case that is not being predicted: the volume under a key of :class:`Keep`."""

    kind: Literal["recall"] = "recall"
    key: _Key


class Recalled(_Message):
    """Engine → worker that recalls: nothing, or with the descriptor of a kept volume its shape and its note."""

    kind: Literal["recalled"] = "recalled"
    shape: _Shape | None = None
    note: _Note = ""


class Answered(_Message):
    """Engine → worker, instead of granted, with the descriptor of so many bytes: an equal case's answer."""

    kind: Literal["answered"] = "answered"
    size: Annotated[int, Field(ge=1)]
    note: _Note


class Offer(_Message):
    """Worker → engine: the granted case has an answer."""

    kind: Literal["offer"] = "offer"


class Wanted(_Message):
    """Engine → worker that offers: so many equal cases wait for the answer; it is to come with the release."""

    kind: Literal["wanted"] = "wanted"
    cases: int


class Queued(_Message):
    """Engine → worker that watches, instead of a heartbeat: so many cases that wait for memory come first."""

    kind: Literal["queued"] = "queued"
    ahead: int


class Release(_Message):
    """Worker → engine: the granted case takes nothing any more, finished or not.

    With the descriptor of an answer of ``size`` bytes if that was wanted.
    """

    kind: Literal["release"] = "release"
    size: Annotated[int, Field(ge=1)] | None = None
    note: _Note = ""


class Keep(_Message):
    """The key under which a volume is to be kept, and what is noted with it."""

    key: _Key
    note: _Note


class Submit(_Message):
    """Worker → engine, with the volume's descriptor: predict the granted case, and keep the volume if it says so.

    A case of several members is submitted once for each of them, one after the other.
    """

    kind: Literal["submit"] = "submit"
    shape: _Shape
    member: MemberName
    folds: tuple[FoldName, ...]
    mirroring_axes: tuple[int, ...]
    tile_step_size: Annotated[float, Field(ge=MIN_TILE_STEP_SIZE, le=1)]
    use_gaussian: bool
    accumulate: Accumulate
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None
    suspect: bool
    passes_after: Annotated[int, Field(ge=0)] = 0
    watched: bool = False
    keep: Keep | None = None

    @field_validator("folds", "mirroring_axes")
    @classmethod
    def _are_distinct(cls, value: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(value)) != len(value):
            msg = "named twice"
            raise ValueError(msg)
        return value

    def settings(self) -> Settings:
        """How the case is predicted."""
        return Settings(
            self.member,
            self.folds,
            self.mirroring_axes,
            self.tile_step_size,
            self.use_gaussian,
            self.accumulate,
            self.priority,
        )


class Heartbeat(_Message):
    """Engine → worker, every second while it waits for an answer."""

    kind: Literal["heartbeat"] = "heartbeat"


class Progress(_Message):
    """Engine → worker that watches, instead of a heartbeat: the forward passes whose logits are in."""

    kind: Literal["progress"] = "progress"
    passes: int


class Done(_Message):
    """Engine → worker, with the logits' descriptor."""

    kind: Literal["done"] = "done"
    shape: tuple[int, int, int, int]
    dtype: Literal["float16", "float32"]
    unpad: tuple[tuple[int, int], ...]
    queue_s: float
    network_s: float


class Failed(_Message):
    """Engine → worker: the case was refused or ended with an error of :mod:`..errors`, by the name of its class."""

    kind: Literal["failed"] = "failed"
    error: str
    detail: str
    retry_after_s: int | None = None

    @classmethod
    def of(cls, error: ServingError) -> Failed:
        """The message that brings an error over."""
        return cls(error=type(error).__name__, detail=str(error), retry_after_s=error.retry_after_s)


Message = (
    (Hello | Refused | Heartbeat)
    | (Reserve | Queued | Granted | Answered | Amend)
    | (Submit | Progress | Done | Failed)
    | (Recall | Recalled)
    | (Offer | Wanted | Release)
)
_adapter: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])


def new_socket() -> socket.socket:
    """A Unix socket of sequenced packets, closed on exec."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end.

    Raises:
        ChannelError: it belongs to another user.
    """
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != os.getuid():
        msg = f"process {pid} at the other end belongs to user {uid}"
        raise ChannelError(msg)
    return int(pid)


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message and its descriptors; the receiver gets its own copies of them."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([message.model_dump_json().encode()], control)


def receive(connection: socket.socket) -> tuple[Message, list[int]] | None:
    """One message and its descriptors, which are the caller's to close; ``None`` if the peer has left.

    Python's ``recv_fds`` would leave the descriptors inheritable.

    Raises:
        ChannelError: no message of this protocol.
        TimeoutError: the socket's timeout passed.
    """
    space = socket.CMSG_SPACE(2 * _FD_BYTES)
    content, control, flags, _ = connection.recvmsg(MAX_MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    received = list(descriptors)
    try:
        if not content:
            close_all(received)
            return None
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            msg = "a message or its descriptors were cut off"
            raise ChannelError(msg)
        return _adapter.validate_json(content), received
    except (ValidationError, ChannelError) as error:
        close_all(received)
        if isinstance(error, ChannelError):
            raise
        msg = f"not a message of this protocol: {error.error_count()} errors"
        raise ChannelError(msg) from error


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def share(shape: Sequence[int], dtype: torch.dtype, name: str) -> tuple[torch.Tensor, int]:
    """A zeroed tensor in shared memory, and the descriptor to send; the tensor lives as long as it is referenced."""
    size = math.prod(shape) * dtype.itemsize
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        memory = mmap.mmap(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape)), descriptor


def freeze(descriptor: int) -> bool:
    """Seal shared memory against writing, by anybody; whether that could be done: nobody may have it mapped."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    except OSError:
        return False
    return True


def is_frozen(descriptor: int, size: int) -> bool:
    """Whether a descriptor is a memfd of exactly this size that nobody can change."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _FROZEN == _FROZEN and os.fstat(descriptor).st_size == size
    except OSError:
        return False


def attach(descriptor: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor behind a received descriptor; writing to it does not reach the sender. Closes the descriptor.

    Raises:
        ChannelError: it is no sealed memfd of exactly this size.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        actual = os.fstat(descriptor).st_size
        if min(shape) < 1 or not sealed or actual != size:
            msg = f"shared memory of {actual} bytes (sealed: {sealed}) for shape {tuple(shape)}, {size} bytes expected"
            raise ChannelError(msg)
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise
        msg = "the descriptor is no sealed memfd"
        raise ChannelError(msg) from error
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


class FlightRecord:
    """Which cases are in the running batch, readable after the engine died.

    The first entry is how many follow; it is written last before a batch and first after it.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        """``numbers``: int64 (1 + FLIGHT_RECORD_CASES,) in shared memory."""
        self._numbers = numbers

    @classmethod
    def create(cls) -> tuple[FlightRecord, int]:
        """A new record and its descriptor."""
        numbers, descriptor = share((1 + FLIGHT_RECORD_CASES,), torch.int64, "nnunet-flight-record")
        return cls(numbers), descriptor

    @classmethod
    def map(cls, descriptor: int) -> FlightRecord:
        """The engine's record, seen from a worker. Closes the descriptor."""
        size = (1 + FLIGHT_RECORD_CASES) * torch.int64.itemsize
        try:
            if os.fstat(descriptor).st_size != size:
                msg = "the flight record has another size"
                raise ChannelError(msg)
            memory = mmap.mmap(descriptor, size)  # shared: it must show what the engine writes later
        finally:
            os.close(descriptor)
        return cls(torch.frombuffer(memory, dtype=torch.int64))

    def write(self, cases: Sequence[int]) -> None:
        """Note the cases of the batch that starts now, or none."""
        self._numbers[0] = 0
        for position, case_id in enumerate(cases[:FLIGHT_RECORD_CASES], start=1):
            self._numbers[position] = case_id
        self._numbers[0] = min(len(cases), FLIGHT_RECORD_CASES)

    def read(self) -> set[int]:
        """The cases of the running batch."""
        count = int(self._numbers[0])
        return {int(number) for number in self._numbers[1 : 1 + count]}
