"""How much more memory a piece of work takes at most; Linux only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def with_extra_memory(work: Callable[[], Result]) -> tuple[Result, int]:
    """What ``work`` gives, and the peak of this process's memory meanwhile, above what it held before, in bytes."""
    ctypes.CDLL(None).malloc_trim(0)
    return extra_memory_of([os.getpid()], work)


def extra_memory_of(processes: Sequence[int], work: Callable[[], Result]) -> tuple[Result, int]:
    """What ``work`` gives, and the peaks of the processes' memory meanwhile, above what each held before, in bytes.

    Peaks that come one after another are added up all the same, and so is memory that processes share.
    """
    before = 0
    for pid in processes:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the highest resident set is from here on (man 5 proc)
        before += _status_bytes(pid, "VmRSS")
    result = work()
    return result, sum(_status_bytes(pid, "VmHWM") for pid in processes) - before


def _status_bytes(pid: int, field: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])
