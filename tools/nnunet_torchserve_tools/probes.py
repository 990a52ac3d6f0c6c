"""What is asked of a server's health, and what the answer is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Probe(StrEnum):
    """What is asked."""

    LIVE = "live"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a probe.

    Attributes:
        ok: whether it holds.
        code: why not, in a word: ``loading``, ``stopping``, ``draining``, ``front_end``, ``workers``, ``engine``; or
            ``ok``.
        detail: the same in a sentence, without paths.
    """

    ok: bool
    code: str
    detail: str

    def document(self) -> dict[str, Any]:
        """As JSON, a problem of RFC 9457 if it does not hold."""
        if self.ok:
            return {"status": 200, "title": "OK", "code": self.code, "detail": self.detail}
        title = "Service Unavailable"
        return {"type": "about:blank", "status": 503, "title": title, "code": self.code, "detail": self.detail}
