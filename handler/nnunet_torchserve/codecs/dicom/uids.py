"""UIDs and times of objects that are made here: the same for the same request.

A client that asks again, because a connection broke or a PACS did not answer, must not fill an archive with copies: so
nothing is random, and nothing says when it was made.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

_NAMESPACE = uuid.UUID("6c9f3a52-1d0e-5b7c-9a44-2f6d0c8e7b31")
"""Of this project's names; any other would do, but it must never change."""

_DATE, _TIME = (
    re.compile(r"(1[89]|[2-9][0-9])[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])"),
    re.compile(r"([01][0-9]|2[0-3])(([0-5][0-9])([0-5][0-9](\.[0-9]{1,6})?)?)?"),
)
NO_DATE, NO_TIME = "19700101", "000000"
"""Where a series says no date: an object of several frames must have one."""


def uid_of(*words: str) -> str:
    """A UID that these words have and no others, of the root that everybody may use (PS3.5, annex B.2)."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(0).join(words)).int}"


def date_and_time(candidates: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The first date that is one, and the time beside it.

    Args:
        candidates: DA and TM as they were found.
    """
    for date, time in candidates:
        if _DATE.fullmatch(date):
            return date, time if _TIME.fullmatch(time) else NO_TIME
    return NO_DATE, NO_TIME
