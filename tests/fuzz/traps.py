"""What ``guard`` and ``child`` must notice, each on purpose: a fuzzer that finds nothing should be able to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from .guard import ACCEPTED, CANARY


def trap(data: bytes) -> str:
    """What ``guard`` and ``child`` must notice; the data names it."""
    _TRAPS.get(data, str)()
    return ACCEPTED


def _raise() -> None:
    raise ZeroDivisionError


def _open() -> None:
    with contextlib.suppress(OSError), open("no such file", "rb"):  # noqa: PTH123 (as a decoder would)
        pass


def _open_in_c() -> None:
    os.close(ctypes.CDLL(None).open(CANARY.encode(), os.O_RDONLY))


_TRAPS: dict[bytes, Callable[[], object]] = {
    b"signal": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    b"exit": lambda: os._exit(0),
    b"raise": _raise,
    b"warn": lambda: warnings.warn("unexpected", stacklevel=1),
    b"hang": lambda: time.sleep(3600),
    b"memory": lambda: b"x" * 2**30,
    b"touched memory": lambda: b"x" * 2**27,
    b"open": _open,
    b"open in C": _open_in_c,
    b"unpickle": lambda: pickle.loads(pickle.dumps(Path)),  # noqa: S301 (that it is noticed is the point)
    b"leak": lambda: os.dup(0),
    b"print": lambda: os.write(2, b"a library prints\n"),
}
