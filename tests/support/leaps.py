"""A clock that leaps when a test says so: a client's deadlines pass when they are to, however slow a machine is."""

from __future__ import annotations

import time

import pytest

from nnunet_torchserve_client import client, retrying, servers, transport


class LeapingClock:
    """In place of the module ``time``."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def leap(self, seconds: float) -> None:
        """So many seconds have passed at once."""
        self._ahead_s += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s


def leaping(monkeypatch: pytest.MonkeyPatch) -> LeapingClock:
    """The clock of whatever in the client looks at deadlines."""
    clock = LeapingClock()
    for module in (client, retrying, servers, transport):
        monkeypatch.setattr(module, "time", clock)
    return clock
