"""Which connections are in use: what the kernel says of real ones."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from nnunet_torchserve_tools.connections import InUse, in_use
from nnunet_torchserve_tools.stopping import STALLED_S, Exchanges, nobody_comes
from support.chaos import wait_for

Pair = tuple[socket.socket, socket.socket]

TICK_S = 0.05
"""More than a tick of any kernel's clock, by which it notes when data came and went: 10 ms at most."""


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A client's socket and the server's; a server that listens everywhere has IPv6 sockets, as TorchServe's."""
    everywhere = request.param == socket.AF_INET6
    try:
        listener = socket.create_server(
            ("::" if everywhere else "127.0.0.1", 0), family=request.param, dualstack_ipv6=everywhere
        )
    except OSError:
        pytest.skip("there is no IPv6 here")
    with ExitStack() as stack:
        stack.enter_context(closing(listener))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", listener.getsockname()[1])))
        server = stack.enter_context(listener.accept()[0])
        if in_use(server.getsockname()[1]) is None:
            pytest.skip("this kernel does not tell")
        yield client, server


def seen(pair: Pair) -> list[InUse]:
    found = in_use(pair[1].getsockname()[1])
    assert found is not None
    return found


def test_a_connection_is_in_use_from_the_first_byte_of_a_request_to_the_last_of_its_answer(pair: Pair) -> None:
    client, server = pair
    assert seen(pair) == []
    for _ in range(2):  # the second request comes on a connection that is kept
        client.sendall(b"GET")
        wait_for(lambda: len(seen(pair)) == 1)
        server.recv(3)
        assert len(seen(pair)) == 1, "it has been read, and not answered"
        server.sendall(b"here")
        client.recv(4)
        wait_for(lambda: seen(pair) == [])
        time.sleep(TICK_S)  # of two that come in one the kernel does not tell which was the later


def test_who_says_that_no_more_will_come_waits_still(pair: Pair) -> None:
    client, server = pair
    client.sendall(b"GET")
    client.shutdown(socket.SHUT_WR)
    wait_for(lambda: [each.received >= 3 for each in seen(pair)] == [True])
    port = server.getsockname()[1]
    server.close()
    wait_for(lambda: in_use(port) == [])


def test_an_answer_that_has_not_been_read_is_on_its_way(pair: Pair) -> None:
    client, server = pair
    client.sendall(b"GET")
    server.recv(3)
    server.setblocking(False)
    sent = server.send(bytes(20_000_000))
    assert [each.is_leaving for each in seen(pair)] == [True]
    while sent > 0:
        sent -= len(client.recv(2**20))
    wait_for(lambda: seen(pair) == [])


def test_an_upload_lasts_and_requests_that_are_answered_one_after_the_other_do_not() -> None:
    exchanges = Exchanges()
    upload = [InUse(b"upload", received, 0, is_leaving=False) for received in (10, 20, 30)]
    hasty = [InUse(b"hasty", 10 * n, 7 * n, is_leaving=False) for n in (1, 2, 3)]
    slow = [InUse(b"reader", 10, 100 * n, is_leaving=True) for n in (1, 2, 3)]
    seen = [exchanges.look(each, now) for now, each in enumerate(zip(upload, hasty, slow, strict=True))]
    assert [[each.seconds for each in at] for at in seen] == [[0, 0, 0], [1, 0, 1], [2, 0, 2]]


def test_who_sends_nothing_any_more_is_not_waited_for() -> None:
    exchanges = Exchanges()
    stalled = InUse(b"stalled", 10, 0, is_leaving=False)
    for now, lasts in ((0.0, [0.0]), (STALLED_S - 1, [STALLED_S - 1]), (STALLED_S, [])):
        assert [each.seconds for each in exchanges.look([stalled], now)] == lasts
    again = InUse(b"stalled", 11, 0, is_leaving=False)
    assert [each.seconds for each in exchanges.look([again], STALLED_S + 1)] == [STALLED_S + 1]


def test_refused_clients_come_again_together_and_leave_a_part_of_each_period_to_nobody() -> None:
    from nnunet_torchserve.draining import retry_after_s
    from nnunet_torchserve_tools.stopping import PERIOD_S

    for refused_at in (tenth / 10 for tenth in range(4000, 4000 + 20 * PERIOD_S)):
        comes = refused_at + retry_after_s(f'{{"together_s": {PERIOD_S}}}', refused_at)
        assert 0 < comes - refused_at <= PERIOD_S
        assert not nobody_comes(comes)


def test_a_dump_that_failed_at_its_end_is_not_taken_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def settimeout(self, _: float) -> None: ...

        def sendto(self, *_: object) -> None: ...

        def close(self) -> None: ...

        def recv(self, _: int) -> bytes:
            return struct.pack("=IHHIIi", 20, 3, 0, 1, 0, -errno.EINTR)

    monkeypatch.setattr(socket, "socket", lambda *_: Kernel())
    assert in_use(1) is None
