"""How much memory a process took in between."""

from __future__ import annotations

import re
from pathlib import Path

import psutil


def forget_peak(process: psutil.Process) -> tuple[int, int]:
    """USS and RSS in bytes; the peak of the latter counts from now on."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return process.memory_full_info().uss, process.memory_info().rss


def peak(process: psutil.Process) -> int:
    """The largest RSS in bytes since :func:`forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
