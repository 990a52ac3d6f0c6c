"""Several servers: load is spread, a dead one is left out and tried again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx
import pytest

from nnunet_torchserve_client import Case, Client, errors
from nnunet_torchserve_client.events import Event, Kind
from nnunet_torchserve_client.flight import WAITING_CASES
from nnunet_torchserve_client.servers import Server, Servers
from nnunet_torchserve_client.stopping import Stop
from support import chaos, peer
from support.peer import Peer, Received, Wire

PATIENCE_S = 120.0


@pytest.fixture
def servers() -> Iterator[tuple[Peer, Peer]]:
    with Peer().listening() as one, Peer().listening() as other:
        yield one, other


def client_of(*servers: Peer, pause_s: float = 0.01, deadline_s: float = PATIENCE_S) -> Client:
    return Client([server.url for server in servers], "blobs", pause_s=pause_s, deadline_s=deadline_s)


def cases(count: int) -> list[Case]:
    return [Case(f"case {number}", f"{number:03d}".encode()) for number in range(count)]


def test_cases_go_to_the_server_that_has_least_to_do(servers: tuple[Peer, Peer]) -> None:
    """One server holds its first case: all others go to the other one, or wait for neither."""
    slow, quick = servers
    done = 0

    def hold(wire: Wire, received: Received) -> None:
        wire.head()
        wire.event(event="heartbeat")
        chaos.wait_for(lambda: done + len(slow.received) >= 12)
        wire.result(received.body)
        wire.chunk(b"")

    slow.replies = [hold]
    with client_of(slow, quick) as client:
        for outcome in client.predict_many(cases(12), ordered=False):
            assert outcome.error is None
            done += 1
    assert len(slow.received) + len(quick.received) == 12
    assert 1 <= len(slow.received) < len(quick.received)


def test_a_dead_server_is_left_out_and_loses_nothing(servers: tuple[Peer, Peer]) -> None:
    dead, alive = servers
    dead.replies = [peer.reset]
    with client_of(dead, alive, pause_s=60.0) as client:  # who is tried again soon would be asked twice
        outcomes = list(client.predict_many(cases(10)))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert len(dead.received) <= 2 * WAITING_CASES, "those that were in flight when it was found to be dead"
    assert len(alive.received) == 10


def test_a_server_that_comes_back_is_asked_again() -> None:
    gone, alive = Peer(), Peer()
    with ExitStack() as running:
        first = running.enter_context(ExitStack())
        first.enter_context(gone.listening())
        running.enter_context(alive.listening())
        with client_of(gone, alive) as client:
            client.describe()
            first.close()
            for case in cases(4):
                client.predict(case)
            assert not gone.received
            running.enter_context(gone.listening())
            more = 0
            while not gone.received:
                client.predict(Case(f"another {more}", b"x"))
                more += 1
                assert more < 10_000


def test_a_busy_servers_cases_go_elsewhere_at_once(servers: tuple[Peer, Peer]) -> None:
    busy, idle = servers
    busy.replies = [peer.problem(429, "busy", Retry_After="3000")]
    told: list[Event] = []
    with client_of(busy, idle) as client:
        for case in cases(4):
            client.predict(case, on_event=told.append)
    assert len(busy.received) == 1
    assert [event.pause_s for event in told if event.kind is Kind.RETRY] == [0.0]


def test_no_server_at_all(servers: tuple[Peer, Peer]) -> None:
    for server in servers:
        server.replies = [peer.reset]
    with client_of(*servers, deadline_s=2.0) as client, pytest.raises(errors.Unreachable) as caught:
        client.predict(cases(1)[0])
    assert 1 < caught.value.tries < 40


def test_what_a_server_takes_is_tried_again_less_often_each_time() -> None:
    """It takes three. Each refused fourth doubles the number of answers before the next."""
    answered = []
    with httpx.Client() as connections:
        server = Server("http://a", connections, 1.0)
        for _ in range(5):
            count = 0
            while server.places < 4:
                server.in_flight = 3
                server.note(None, 0.0, among_others=False)
                count += 1
            answered.append(count)
            server.in_flight = 4
            server.note(errors.Busy("busy"), 0.0, among_others=False)
            assert server.places == 3
    assert answered == [0, 24, 48, 96, 192]


@pytest.mark.parametrize(
    ("error", "reached"),
    [
        (errors.UnreadableFile("gone"), False),
        (errors.WrongUse("no"), False),
        (errors.Untrusted("no"), False),
        (errors.TooLate("late"), False),
        (errors.Unreachable("502 of a proxy", status=502), False),
        (errors.CutOff("ended"), True),
        (errors.BadAnswer("no event"), True),
        (errors.TooThin("thin", status=422), True),
        (None, True),
    ],
)
def test_a_server_is_reached_once_it_has_answered(error: errors.ClientError | None, reached: bool) -> None:
    """And not where this machine could not read the image, or did not trust it."""
    with httpx.Client() as connections:
        known = Servers([Server("http://a", connections, 1.0)])
        with suppress(errors.ClientError), known.place(Stop(), time.monotonic() + PATIENCE_S):
            if error is not None:
                raise error
    assert known.reached is reached
