"""What happens to a case, as it is told to whoever wants to know.

The server's events (docs/http.md, "Progress") and the client's own are one kind of object, so that a progress bar needs
no second source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """What happened.

    SENDING, WAITING, RETRY, RECEIVING, ANSWERED and FAILED are the client's own; the others are the server's.
    """

    SENDING = "sending"
    """``done`` of ``total`` bytes are sent."""

    WAITING = "waiting"
    """All is sent, and no worker has taken it yet: it is in TorchServe's queue."""

    QUEUED = "queued"
    """A worker has it, and it waits for memory; ``position`` others come first."""

    PROGRESS = "progress"
    """``done`` of ``total`` steps of ``stage``."""

    HEARTBEAT = "heartbeat"
    """Nothing new, but the server is there."""

    RECEIVING = "receiving"
    """``done`` of ``total`` bytes of the answer are there."""

    RETRY = "retry"
    """It failed because of ``reason``, and is tried again in ``pause_s`` seconds."""

    ANSWERED = "answered"
    """The answer is there, whole."""

    FAILED = "failed"
    """It is given up because of ``reason``."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a case.

    Attributes:
        case: its name.
        kind: what it was.
        server: base URL of the server that has the case, if one has.
        position: cases before it, for ``QUEUED``.
        stage: ``preprocess``, ``network``, ``export`` or ``postprocess``, for ``PROGRESS``.
        member: whose stage it is, of an archive of several members; else ``None``.
        done, total: steps or bytes; 0 where there are none.
        reason: of a ``RETRY`` or a failure.
        pause_s: seconds until the next try, for ``RETRY``.
    """

    case: str
    kind: Kind
    server: str | None = None
    position: int | None = None
    stage: str | None = None
    done: int = 0
    total: int = 0
    reason: str | None = None
    pause_s: float = 0.0
    member: str | None = None


Listener = Callable[[Event], object]
"""Is told each event. Called by one thread at a time, not always by the same; must not take long, must not raise."""

_TOLD = (Kind.QUEUED, Kind.PROGRESS, Kind.HEARTBEAT)


def server_event(case: str, server: str, document: Mapping[str, Any]) -> Event | None:
    """An event of the server's stream; ``None`` if it is of a kind that this client does not know."""
    kind = document.get("event")
    if kind not in _TOLD:
        return None
    position, stage, member = document.get("position"), document.get("stage"), document.get("member")
    return Event(
        case,
        Kind(kind),
        server,
        position=position if isinstance(position, int) else None,
        stage=stage if isinstance(stage, str) else None,
        done=_count(document.get("done")),
        total=_count(document.get("total")),
        member=member if isinstance(member, str) else None,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
