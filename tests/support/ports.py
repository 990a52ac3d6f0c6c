"""Ports for the servers of tests.

A port that the kernel gives out (``bind`` to 0) may be the source port of another connection a moment later, and then a
server that takes seconds to start does not get it. So these come from below the kernel's range, and each process of a
run has a range of its own.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
from contextlib import closing

from nnunet_torchserve_tools.launcher import Ports

_FIRST, _LAST = 10_000, 32_768
"""Linux gives out ports from the latter (``ip_local_port_range``)."""

_EACH = 1_000
_RANGES = (_LAST - _FIRST) // _EACH


def _own_range() -> range:
    """That of this process: by pytest-xdist's number where it has one, so that those of one run differ."""
    worker = re.fullmatch(r"gw(\d+)", os.environ.get("PYTEST_XDIST_WORKER", ""))
    number = (os.getppid() + int(worker[1]) if worker else os.getpid()) % _RANGES
    return range(_FIRST + number * _EACH, _FIRST + (number + 1) * _EACH)


_NUMBERS = itertools.cycle(_own_range())


def free_port() -> int:
    """A port that nothing listens on, and that no other call gives out soon."""
    for port in itertools.islice(_NUMBERS, _EACH):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    msg = "every port of this process is taken"
    raise RuntimeError(msg)


def free_ports() -> Ports:
    """All ports of a server."""
    return Ports(*(free_port() for _ in range(5)))
