"""An idle machine: what is timed is timed alone.

Work that gives way does not count: in Linux's idle scheduling class and with a nice value (``chrt -i 0 nice -n 19``)
it gets a processor only while nothing else wants it.
"""

from __future__ import annotations

import time

import psutil

_QUIET_PERCENT = 10
_QUIET_SAMPLE_S = 0.5
_QUIET_PATIENCE_S = 300


def wait_for_quiet() -> None:
    """Return when the processors idle, so that a timing is not shared with other work; in the end even if not."""
    deadline = time.monotonic() + _QUIET_PATIENCE_S
    most_s = _QUIET_SAMPLE_S * (psutil.cpu_count() or 1) * _QUIET_PERCENT / 100
    while time.monotonic() < deadline:
        before = _seconds_by_process()
        time.sleep(_QUIET_SAMPLE_S)
        after = _seconds_by_process()
        if sum(seconds - before.get(pid, 0) for pid, seconds in after.items()) < most_s:
            return


def _seconds_by_process() -> dict[int, float]:
    """Seconds that each process without a nice value has computed so far, by process id."""
    infos = [process.info for process in psutil.process_iter(["pid", "nice", "cpu_times"])]
    return {
        info["pid"]: info["cpu_times"].user + info["cpu_times"].system
        for info in infos
        if info["cpu_times"] is not None and info["nice"] is not None and info["nice"] <= 0
    }
