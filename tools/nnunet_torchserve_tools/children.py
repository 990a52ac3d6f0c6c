"""The processes below ``serve --foreground``: all of them become its children, and none stays a zombie.

TorchServe's starter leaves the JVM behind, and an engine forks away from the worker that starts it. Orphans go to
process 1, which in a container may be ``serve`` itself, or a shell that reaps nobody. As a *subreaper* (prctl(2))
``serve`` gets them whoever process 1 is.
"""

from __future__ import annotations

import ctypes
import os

_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> bool:
    """Take orphans in from now on; whether the kernel allows it. Process 1 has them anyhow."""
    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


def reap() -> int:
    """Take leave of children that have ended, without waiting for any; returns how many they were.

    Nothing else in this process may wait for a child of its own meanwhile.
    """
    reaped = 0
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            reaped += 1
    except ChildProcessError:
        pass
    return reaped
