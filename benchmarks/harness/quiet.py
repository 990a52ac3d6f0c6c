"""An idle machine: what is timed is timed alone."""

from __future__ import annotations

import time

import psutil

_QUIET_PERCENT = 10
_QUIET_SAMPLE_S = 0.5
_QUIET_PATIENCE_S = 300


def wait_for_quiet() -> None:
    """Return when the processors idle, so that a timing is not shared with other work; in the end even if not."""
    deadline = time.monotonic() + _QUIET_PATIENCE_S
    while psutil.cpu_percent(_QUIET_SAMPLE_S) > _QUIET_PERCENT and time.monotonic() < deadline:
        pass
