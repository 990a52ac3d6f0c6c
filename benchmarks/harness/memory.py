"""How much more memory a piece of work takes at most; Linux only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def with_extra_memory(work: Callable[[], Result]) -> tuple[Result, int]:
    """What ``work`` gives, and the peak of this process's memory meanwhile, above what it held before, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is from here on (man 5 proc)
    before = _status_bytes("VmRSS")
    result = work()
    return result, _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
