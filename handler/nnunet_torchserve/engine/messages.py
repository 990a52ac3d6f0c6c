"""What workers and the engine process say to each other.

Messages are JSON, checked by pydantic on arrival: a field that is missing, unknown or of another type is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from ..backend import Backend
from ..cases import Settings
from ..errors import ServingError
from ..member_description import MemberName
from ..options import MIN_TILE_STEP_SIZE, Accumulate, FoldName, Priority

PROTOCOL = 9
HEARTBEAT_S = 1.0
PROGRESS_S = 0.5
"""While the case of a worker that watches is predicted, heartbeats come as often, and its own says what is done."""


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
ANY_MESSAGE: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="kind")])
"""Reads and checks the JSON of one."""
