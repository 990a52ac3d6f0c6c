"""The way between a worker and the engine process: a message, and the descriptors that come with it.

A Unix socket of sequenced packets: one packet is one message (:mod:`.messages`), so nothing is ever read halfway, and
file descriptors stay with the message that they came with.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence

from pydantic import ValidationError

from .messages import ANY_MESSAGE, Message

MAX_MESSAGE_BYTES = 16 * 1024
_PEER = struct.Struct("iII")  # struct ucred: pid, uid, gid
_FD_BYTES = array.array("i").itemsize


class ChannelError(Exception):
    """The peer broke the protocol, or is another user's."""


def new_socket() -> socket.socket:
    """A Unix socket of sequenced packets, closed on exec."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end.

    Raises:
        ChannelError: it belongs to another user.
    """
    pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != os.getuid():
        msg = f"process {pid} at the other end belongs to user {uid}"
        raise ChannelError(msg)
    return int(pid)


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message and its descriptors; the receiver gets its own copies of them."""
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    connection.sendmsg([message.model_dump_json().encode()], control)


def receive(connection: socket.socket) -> tuple[Message, list[int]] | None:
    """One message and its descriptors, which are the caller's to close; ``None`` if the peer has left.

    Python's ``recv_fds`` would leave the descriptors inheritable.

    Raises:
        ChannelError: no message of this protocol.
        TimeoutError: the socket's timeout passed.
    """
    space = socket.CMSG_SPACE(2 * _FD_BYTES)
    content, control, flags, _ = connection.recvmsg(MAX_MESSAGE_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % _FD_BYTES])
    received = list(descriptors)
    try:
        if not content:
            close_all(received)
            return None
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            msg = "a message or its descriptors were cut off"
            raise ChannelError(msg)
        return ANY_MESSAGE.validate_json(content), received
    except (ValidationError, ChannelError) as error:
        close_all(received)
        if isinstance(error, ChannelError):
            raise
        msg = f"not a message of this protocol: {error.error_count()} errors"
        raise ChannelError(msg) from error


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)
