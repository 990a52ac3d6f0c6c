"""What a bare socket receives."""

from __future__ import annotations

import socket
from contextlib import suppress


def read_all(connection: socket.socket) -> bytes:
    """What the other side sends until it ends the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            received += part
    return received
