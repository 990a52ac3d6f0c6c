"""Which connections to a port are in use, as the kernel knows it.

TorchServe says nothing of a request whose body is still arriving, nor of an answer that is still leaving. The kernel
keeps for each TCP connection when its last byte came, when its last byte went, and how many: where bytes came after the
last ones went, somebody waits for an answer; where bytes lie in the send queue, an answer is on its way. It tells this
over a netlink socket of the family ``NETLINK_SOCK_DIAG`` (sock_diag(7); what ``ss --info`` shows), without any
privilege; some sandboxes forbid it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_INET_DIAG_INFO = 2
_ESTABLISHED, _CLOSE_WAIT = 1, 8
"""States in which a client may wait; in the second one it has said that nothing more will come."""

_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # struct inet_diag_req_v2 up to its id: family, protocol, extensions, states
_IDENTITY = struct.Struct("!HH16s16s")  # struct inet_diag_sockid: ports and addresses in the network's order ...
_COOKIE = struct.Struct("=I8s")  # ... interface and cookie
_MESSAGE_ID = 4  # offset of the identity in struct inet_diag_msg
_SEND_QUEUE = 60  # offset in it: bytes that the client has not taken
_MESSAGE_BYTES = 72  # of that struct; attributes follow
_ATTRIBUTE = struct.Struct("=HH")
_STATUS = struct.Struct("=i")
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_LAST_SENT, _LAST_RECEIVED = 44, 52  # offsets in struct tcp_info, in ms before now
_BYTES_ACKED, _BYTES_RECEIVED = 120, 128
_INFO_BYTES = 136
_BUFFER_BYTES = 2**18
_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class InUse:
    """A connection with a request that is not answered, or an answer that has not been taken.

    Attributes:
        cookie: names the socket for as long as it lives.
        received: bytes that have come on it so far.
        taken: bytes of answers that its client has taken so far.
        is_leaving: an answer is on its way.
        peer: the client's address, without its port.
    """

    cookie: bytes
    received: int
    taken: int
    is_leaving: bool
    peer: bytes = b""


def in_use(port: int) -> list[InUse] | None:
    """The connections of clients to a port of this network namespace that wait for an answer, or for the rest of it.

    A client that has connected and sent nothing is not among them, nor one that has read its answer and keeps the
    connection. Nor is a request that came within a few ms of the last answer, in the same tick of the kernel's clock:
    whoever asks here must know of it from the workers.

    Args:
        port: TCP, local.

    Returns:
        ``None`` if the kernel does not tell.
    """
    try:
        return [each for family in (socket.AF_INET, socket.AF_INET6) for each in _of_family(family, port)]
    except (OSError, struct.error):
        return None


def _of_family(family: int, port: int) -> Iterator[InUse]:
    states = 1 << _ESTABLISHED | 1 << _CLOSE_WAIT
    identity = _IDENTITY.pack(port, 0, bytes(16), bytes(16)) + _COOKIE.pack(0, b"\xff" * 8)
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), 0, states) + identity
    head = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    with closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)) as asked:
        asked.settimeout(_PATIENCE_S)
        asked.sendto(head + body, (0, 0))
        while True:
            for kind, message in _messages(asked.recv(_BUFFER_BYTES)):
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    [status] = _STATUS.unpack_from(message)
                    if status < 0 or kind == _NLMSG_ERROR:  # a dump may fail at its end: it was not whole
                        raise OSError(-status, "sock_diag")
                    return
                if (found := _read(message, port)) is not None:
                    yield found


def _messages(received: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each netlink message."""
    start = 0
    while start + _HEADER.size <= len(received):
        length, kind, *_ = _HEADER.unpack_from(received, start)
        if length < _HEADER.size:
            return
        yield kind, received[start + _HEADER.size : start + length]
        start += _aligned(length)


def _read(message: bytes, port: int) -> InUse | None:
    """A connection, if it is in use."""
    local, _, _, peer = _IDENTITY.unpack_from(message, _MESSAGE_ID)
    _, cookie = _COOKIE.unpack_from(message, _MESSAGE_ID + _IDENTITY.size)
    info = _information(message)
    if local != port or len(info) < _INFO_BYTES:
        return None
    [queued] = _U32.unpack_from(message, _SEND_QUEUE)
    [sent_ms], [received_ms] = _U32.unpack_from(info, _LAST_SENT), _U32.unpack_from(info, _LAST_RECEIVED)
    [taken], [received] = _U64.unpack_from(info, _BYTES_ACKED), _U64.unpack_from(info, _BYTES_RECEIVED)
    # both times are the connection's own at first
    waits = received > 0 and (received_ms < sent_ms or taken == 0)
    return InUse(cookie, received, taken, queued > 0, peer) if waits or queued else None


def _information(message: bytes) -> bytes:
    """The attribute that holds struct tcp_info; empty if there is none."""
    start = _MESSAGE_BYTES
    while start + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, start)
        if length < _ATTRIBUTE.size:
            break
        if kind == _INET_DIAG_INFO:
            return message[start + _ATTRIBUTE.size : start + length]
        start += _aligned(length)
    return b""


def _aligned(length: int) -> int:
    return (length + 3) & ~3
