"""Several servers: load is spread, a dead one is left out and tried again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import pairwise

import httpx
import pytest

from nnunet_torchserve_client import Case, Client, errors
from nnunet_torchserve_client.events import Event, Kind
from nnunet_torchserve_client.server import (
    LONGEST_ABSENCE_S,
    MOST_FAULTS,
    RAREST_PROBE_S,
    WAITING_CASES,
    Company,
    Server,
)
from nnunet_torchserve_client.servers import Servers, Wish
from nnunet_torchserve_client.stopping import Stop
from support import chaos, peer
from support.leaps import leaping
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
    """One server takes none up until all others are done: they go to the other one."""
    slow, quick = servers
    done = 0

    def hold(wire: Wire, received: Received) -> None:
        chaos.wait_for(lambda: done + len(slow.received) >= 12)
        wire.head()
        wire.result(received.body)
        wire.chunk(b"")

    slow.replies = [hold]
    with client_of(slow, quick) as client:
        for outcome in client.predict_many(cases(12), ordered=False):
            assert outcome.error is None
            done += 1
    assert len(slow.received) + len(quick.received) == 12
    assert 1 <= len(slow.received) <= WAITING_CASES


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


BROKEN = [
    pytest.param(peer.problem(500, "internal"), id="500 to everything"),
    pytest.param(peer.error_event(500, "internal"), id="500 to everything, told by an event"),
    pytest.param(peer.plain(404, b"{}"), id="it lacks the model"),
    pytest.param(peer.plain(401), id="it wants another token"),
    pytest.param(peer.plain(200, b"", Transfer_Encoding="x"), id="no HTTP that anyone knows"),
    pytest.param(peer.plain(204), id="no answer of a server"),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_server_fails_no_case_while_another_is_whole(broken: peer.Reply, servers: tuple[Peer, Peer]) -> None:
    """It answers faster than the other one, and has always the least to do."""
    bad, good = servers
    bad.replies = [broken]
    with client_of(bad, good, pause_s=60.0) as client:
        for case in cases(4 * MOST_FAULTS):
            assert client.predict(case).content == case.image
    assert 1 <= len(bad.received) <= MOST_FAULTS, "then it is left out"
    assert len(good.received) == 4 * MOST_FAULTS


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_server_fails_none_of_many_cases_at_once(broken: peer.Reply, servers: tuple[Peer, Peer]) -> None:
    """How many it is sent depends on how soon the client reads the ends of answers that have begun."""
    bad, good = servers
    bad.replies = [broken]
    with client_of(bad, good, pause_s=60.0) as client:
        outcomes = list(client.predict_many(cases(20), ordered=False))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert bad.received
    assert len(good.received) == 20


def test_a_broken_server_that_is_mended_is_asked_again(servers: tuple[Peer, Peer]) -> None:
    bad, good = servers
    bad.replies = [peer.plain(404), peer.plain(404), peer.echo]
    with client_of(bad, good) as client:
        more = 0
        while len(bad.received) < 6:
            client.predict(Case(f"case {more}", b"x"))
            more += 1
            assert more < 10_000


def test_what_every_server_says_is_the_answer_and_holds_for_all_cases(servers: tuple[Peer, Peer]) -> None:
    for server in servers:
        server.replies = [peer.plain(404)]
    with client_of(*servers) as client, pytest.raises(errors.UnknownModel) as caught:
        client.predict(cases(1)[0])
    assert caught.value.of_all_cases
    assert caught.value.tries == 2


def test_a_case_that_fails_at_one_server_and_is_unknown_to_the_other_stops_no_other_case(
    servers: tuple[Peer, Peer],
) -> None:
    for first, second in (servers, servers[::-1]):
        first.replies, second.replies = [peer.problem(500, "internal")], [peer.plain(404)]
        with client_of(first, second) as client, pytest.raises(errors.ServerError) as caught:
            client.predict(cases(1)[0])
        assert not caught.value.of_all_cases


def test_what_one_server_said_is_told_where_the_other_was_never_there(servers: tuple[Peer, Peer]) -> None:
    bad, _ = servers
    bad.replies = [peer.plain(404)]
    with Peer().listening() as away:
        pass
    urls = [away.url, bad.url]  # the second is asked first, and is no stranger when the other one is not there
    with (
        Client(urls, "blobs", pause_s=0.01, first_contact_s=0.2) as client,
        pytest.raises(errors.Unreachable, match=f"no connection.*{bad.url} said: nothing is served"),
    ):
        client.predict(cases(1)[0])


def test_no_server_at_all(servers: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are tried until the deadline, which comes with the twelfth try, and each more and more rarely."""
    clock = leaping(monkeypatch)

    def reset(wire: Wire, received: Received) -> None:
        if sum(len(server.received) for server in servers) == 12:
            clock.leap(PATIENCE_S)
        peer.reset(wire, received)

    for server in servers:
        server.replies = [reset]
    with client_of(*servers) as client, pytest.raises(errors.Unreachable) as caught:
        client.predict(cases(1)[0])
    assert caught.value.tries == sum(len(server.received) for server in servers) == 12
    for server in servers:
        assert len(server.received) > 1
        for number, (one, next_one) in enumerate(pairwise(server.received)):
            assert next_one.at - one.at >= 0.01 * 2**number / 2


@pytest.fixture
def server() -> Iterator[Server]:
    with httpx.Client() as connections:
        yield Server("http://a", connections, 1.0)


def refuse(server: Server, now: float, *, in_flight: int, retry_after_s: float | None = None) -> None:
    server.in_flight = in_flight
    error = errors.Busy("busy", status=429, retry_after_s=retry_after_s)
    company = Company(in_flight - 1, server.begun)
    server.note(error, now, waited=True, company=company, among_others=False)
    server.in_flight -= 1


def test_what_a_server_takes_is_tried_again_less_often_each_time_but_once_a_minute(server: Server) -> None:
    """It takes three. Each refused fourth doubles the time before the next."""
    now, pauses = 0.0, []
    for _ in range(9):
        refuse(server, now, in_flight=4)
        assert server.places == 3
        assert not server.has_room(now, batch=False)
        pauses.append(server.next_change(now) - now)
        now = server.next_change(now)
        assert server.has_room(now, batch=False)
    assert pauses == [1, 2, 4, 8, 16, 32, RAREST_PROBE_S, RAREST_PROBE_S, RAREST_PROBE_S]


def test_a_server_that_takes_more_again_is_soon_given_more(server: Server) -> None:
    """Other clients had kept it busy for an hour; now they are gone."""
    now = 0.0
    while now < 3600:
        refuse(server, now, in_flight=2)
        now = server.next_change(now)
    started = now
    while server.places < 8:
        server.in_flight = int(server.places) + 1
        server.taken_up(now, probes=True)
        now = server.next_change(now)
    assert now - started <= 8 * server.pause_s


def test_a_place_that_a_case_of_ours_leaves_is_taken_without_a_pause(server: Server) -> None:
    refuse(server, 0.0, in_flight=3, retry_after_s=3000.0)
    assert not server.has_room(1.0, batch=False)
    server.in_flight -= 1
    assert server.has_room(1.0, batch=False)


@pytest.mark.parametrize("company", [Company(others=2, begun=3), Company(others=0, begun=1)])
def test_a_case_that_was_refused_beside_others_which_have_ended_meanwhile_goes_at_once(
    company: Company, server: Server
) -> None:
    """It was sent after them, or before them."""
    server.begun, server.in_flight = 3, 1
    error = errors.Busy("busy", status=429, retry_after_s=3600.0)
    server.note(error, 0.0, waited=True, company=company, among_others=False)
    assert server.places == max(1, company.others)
    server.in_flight = 0
    assert server.has_room(0.0, batch=False)


def test_where_a_server_says_when_it_is_asked_then_however_often_it_refused_before(server: Server) -> None:
    """A client whose pauses grew would stay away while places are free, and others take them."""
    now = 0.0
    for _ in range(20):
        refuse(server, now, in_flight=1, retry_after_s=4.0)
        assert 4.0 <= server.next_change(now) - now <= 5.0
        now = server.next_change(now)
    refuse(server, now, in_flight=1)
    assert LONGEST_ABSENCE_S / 2 <= server.next_change(now) - now <= LONGEST_ABSENCE_S


def test_a_server_that_drains_is_left_alone_whatever_of_ours_it_has(server: Server) -> None:
    server.in_flight = 3
    error = errors.Draining("draining", status=503, retry_after_s=10.0)
    server.note(error, 0.0, waited=True, company=Company(2, 0), among_others=False)
    server.in_flight = 0
    assert not server.has_room(9.9, batch=False)
    assert server.places > 3


def test_a_request_that_hears_nothing_in_a_queue_says_nothing_of_the_server(server: Server) -> None:
    server.note(errors.Silent("nothing"), 0.0, waited=True, company=Company(0, 0), among_others=True)
    assert server.has_room(0.0, batch=False)
    server.note(errors.Silent("nothing any more"), 0.0, waited=False, company=Company(0, 0), among_others=True)
    assert not server.has_room(0.0, batch=False)


def take(servers: Servers, wish: Wish) -> Server:
    with servers.place(wish, Stop()) as place:
        return place.server


def test_a_call_that_was_never_sent_is_not_too_late_while_others_of_its_client_get_on(server: Server) -> None:
    """Its deadline is over, but a worker has just taken up another one, which leaves its place."""
    server.places = 1
    known, now = Servers([server]), time.monotonic()
    waits = Wish(now - 100.0, now - 1.0, is_first=True)
    server.probe_at = now + PATIENCE_S
    with ExitStack() as running, known.place(Wish(now, now + PATIENCE_S), Stop()) as place:
        with pytest.raises(errors.TooLate), known.place(waits, Stop()):
            pass
        place.taken_up()
        pool = running.enter_context(ThreadPoolExecutor(1))
        later = pool.submit(take, known, waits)
        chaos.wait_for(lambda: bool(known._queue))
    assert later.result(PATIENCE_S) is server


def test_who_waited_longest_is_next_and_interactive_cases_before_batch_cases(server: Server) -> None:
    server.places = 1
    known, now = Servers([server]), time.monotonic()
    order: list[str] = []
    wishes = {
        "batch, and old": Wish(now - 100.0, now + PATIENCE_S, batch=True),
        "interactive, later": Wish(now, now + PATIENCE_S),
        "batch": Wish(now - 1.0, now + PATIENCE_S, batch=True),
        "interactive": Wish(now - 0.5, now + PATIENCE_S),
    }

    def ask(name: str, wish: Wish) -> None:
        with known.place(wish, Stop()):
            order.append(name)

    with ThreadPoolExecutor(len(wishes)) as pool, known.place(Wish(now, now + PATIENCE_S), Stop()) as place:
        server.probe_at = now + PATIENCE_S
        place.taken_up()
        for name, wish in wishes.items():
            pool.submit(ask, name, wish)
        chaos.wait_for(lambda: len(known._queue) == len(wishes))
    assert order == ["batch, and old", "interactive", "interactive, later", "batch"]


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
        wish = Wish(time.monotonic(), time.monotonic() + PATIENCE_S)
        with suppress(errors.ClientError), known.place(wish, Stop()):
            if error is not None:
                raise error
    assert known.reached() is reached
