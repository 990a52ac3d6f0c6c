"""Whether an engine greets whoever connects to it, asked from outside. Imports nothing slow.

An engine's main thread says hello to each connection once its networks are loaded: so a hello says that there is an
engine, that it has loaded, and that the thread which all workers depend on goes round. Whoever asks leaves at once.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing
from pathlib import Path

from .folder import SOCKET

_MAX_HELLO_BYTES = 4096


def greets(folder: Path, within_s: float) -> bool:
    """Ask an engine.

    Args:
        folder: the engine's own directory.
        within_s: seconds to wait for its hello.
    """
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)) as endpoint:
            endpoint.settimeout(within_s)
            endpoint.connect(f"/proc/self/fd/{directory}/{SOCKET}")
            # the descriptors that come with it are not taken: the kernel closes them
            hello = json.loads(endpoint.recv(_MAX_HELLO_BYTES))
            return isinstance(hello, dict) and hello.get("kind") == "hello"
    except (OSError, ValueError):
        return False
    finally:
        os.close(directory)
