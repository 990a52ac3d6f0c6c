"""Several cases at once, against a server that has workers and a queue as TorchServe has."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from nnunet_torchserve_client import Answer, Case, Client, errors, known_description
from nnunet_torchserve_client.flight import MOST_FINISHING, MOST_KEPT
from nnunet_torchserve_client.server import WAITING_BATCH_CASES, WAITING_CASES
from nnunet_torchserve_client.stopping import Stop
from support import chaos, peer
from support.peer import Peer, Received, Wire

PATIENCE_S = 120.0


@dataclass
class Workers:
    """Replies as TorchServe with so many workers: an answer begins when one is free."""

    count: int
    queue: list[bytes] = field(default_factory=list)
    working: list[bytes] = field(default_factory=list)
    most_waiting: int = 0
    most_working: int = 0
    hold: dict[bytes, threading.Event] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, wire: Wire, received: Received) -> None:
        body = received.body
        with self.changed:
            self.queue.append(body)
            self.most_waiting = max(self.most_waiting, len(self.queue) - (self.count - len(self.working)))
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.queue[0] == body and len(self.working) < self.count, PATIENCE_S)
            self.working.append(self.queue.pop(0))
            self.most_working = max(self.most_working, len(self.working))
            self.changed.notify_all()
        try:
            wire.head()
            wire.event(event="progress", stage="network", done=0, total=1)
            if body in self.hold:
                self.hold[body].wait(PATIENCE_S)
        finally:
            with self.changed:
                self.working.remove(body)
                self.changed.notify_all()
        wire.result(body)
        wire.chunk(b"")


def cases(count: int) -> Iterator[Case]:
    return (Case(f"case {number}", f"{number:03d}".encode()) for number in range(count))


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


def client_of(server: Peer) -> Client:
    return Client(server.url, "blobs", pause_s=0.01, deadline_s=PATIENCE_S)


@pytest.mark.parametrize(("priority", "waiting"), [("interactive", WAITING_CASES), ("batch", WAITING_BATCH_CASES)])
def test_every_worker_has_a_case_and_hardly_any_waits_in_the_queue(priority: str, waiting: int, server: Peer) -> None:
    """The client is not told that there are five workers. All are held until all five are busy."""
    workers = Workers(5)
    release = threading.Event()
    workers.hold = {f"{number:03d}".encode(): release for number in range(5)}
    server.replies = [workers]

    def release_when_all_work() -> None:
        with workers.changed:
            workers.changed.wait_for(lambda: len(workers.working) == 5, PATIENCE_S)
        release.set()

    watch = threading.Thread(target=release_when_all_work)
    watch.start()
    with client_of(server) as client:
        outcomes = list(client.predict_many(cases(40), {"priority": priority}))
    watch.join()
    assert workers.most_working == 5
    assert workers.most_waiting <= waiting
    answers = [outcome.value and outcome.value.content for outcome in outcomes]
    assert answers == [case.image for case in cases(40)]


@pytest.mark.parametrize("ordered", [True, False])
def test_outcomes_come_in_the_order_of_the_cases_or_as_they_are_completed(ordered: bool, server: Peer) -> None:
    """The first case is held until the others are answered, or handed on where that can be."""
    workers = Workers(2)
    first_may_end = threading.Event()
    workers.hold = {b"000": first_may_end}
    server.replies = [workers]
    done = 0

    def finish(*_: object) -> None:
        nonlocal done
        done += 1
        if done == 5 and ordered:
            first_may_end.set()

    indices: list[int] = []
    with client_of(server) as client:
        for each in client.predict_many(cases(6), ordered=ordered, finish=finish):
            indices.append(each.index)
            if len(indices) == 5:
                first_may_end.set()
    assert sorted(indices) == list(range(6))
    assert indices.index(0) == (0 if ordered else 5)
    assert not ordered or indices == sorted(indices)


def test_a_slow_first_case_does_not_fill_the_memory(server: Peer) -> None:
    """Results that cannot be handed on are bounded, and so are the cases that are taken from the caller.

    The first is held until all others that were sent have ended; how many that are depends on the scheduler too.
    """
    workers = Workers(3)
    first_may_end = threading.Event()
    workers.hold = {b"000": first_may_end}
    server.replies = [workers]
    taken = 0

    def counted() -> Iterator[Case]:
        nonlocal taken
        for case in cases(100):
            taken += 1
            yield case

    kept = threading.Semaphore(0)

    def finish(_: Case, answer: Answer) -> bytes:
        kept.release()
        return answer.content

    def let_it_end() -> None:
        for _ in range(MOST_KEPT):
            kept.acquire(timeout=PATIENCE_S)
        chaos.wait_for(lambda: in_flight() == {"case-0"}, PATIENCE_S)
        first_may_end.set()

    def in_flight() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("case-")}

    watch = threading.Thread(target=let_it_end)
    watch.start()
    with client_of(server) as client:
        outcomes = client.predict_many(counted(), finish=finish)
        next(outcomes)
        assert MOST_KEPT < taken < 50, "and not all 100"
        assert len(list(outcomes)) == 99
    watch.join()


def test_answers_that_are_slow_to_write_do_not_pile_up(server: Peer) -> None:
    """The server is quick; nothing is written before as many cases wait for it as may, and a moment longer."""
    full, go_on = threading.Event(), threading.Event()
    writing = most = 0
    lock = threading.Lock()

    def write(*_: object) -> None:
        nonlocal writing, most
        with lock:
            writing += 1
            most = max(most, writing)
            if writing == MOST_FINISHING:
                full.set()
        go_on.wait(PATIENCE_S)
        with lock:
            writing -= 1

    def let_them_write() -> None:
        full.wait(PATIENCE_S)
        go_on.wait(0.3)
        go_on.set()

    watch = threading.Thread(target=let_them_write)
    watch.start()
    with client_of(server) as client:
        assert len(list(client.predict_many(cases(40), finish=write))) == 40
    watch.join()
    assert MOST_FINISHING <= most < 20, "and not all 40"


def test_one_case_that_fails_fails_alone(server: Peer) -> None:
    def reply(wire: Wire, received: Received) -> None:
        (peer.problem(422, "too_thin") if received.body == b"001" else peer.echo)(wire, received)

    server.replies = [reply]
    with client_of(server) as client:
        outcomes = list(client.predict_many([*cases(3), Case("large", bytes(1001)), Case("gone", "/no/such/file")]))
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None), errors.TooThin, type(None), errors.BodyTooLarge, errors.UnreadableFile,
    ]  # fmt: skip
    assert [outcome.error.case for outcome in outcomes if outcome.error] == ["case 1", "large", "gone"]
    assert len(server.received) == 3, "what is too large is not sent"


def test_an_iteration_that_ends_early_gives_up_what_is_in_flight(server: Peer) -> None:
    workers = Workers(3)
    never = threading.Event()
    workers.hold = {b"001": never, b"002": never}
    server.replies = [workers]
    with client_of(server) as client:
        outcomes = client.predict_many(cases(50), finish=lambda case, _: case.name)
        assert next(outcomes).value == "case 0"
        outcomes.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("case-")]
    never.set()


def test_an_error_of_the_caller_ends_the_flight_and_is_the_callers(server: Peer) -> None:
    def broken() -> Iterator[Case]:
        yield from cases(2)
        msg = "the caller's own"
        raise LookupError(msg)

    with client_of(server) as client:
        with pytest.raises(LookupError, match="the caller's own"):
            list(client.predict_many(broken()))
        with pytest.raises(ZeroDivisionError):
            list(client.predict_many(cases(5), finish=lambda *_: 1 // 0))


def test_a_server_that_refuses_gets_fewer_cases_at_once(server: Peer) -> None:
    """It takes three, and answers them when a fourth was refused."""
    refused = threading.Event()
    taken = threading.Lock()
    most = 0

    def reply(wire: Wire, received: Received) -> None:
        nonlocal most
        if received.beside >= 3:
            refused.set()
            peer.problem(429, "busy")(wire, received)
            return
        with taken:
            most = max(most, received.beside + 1)
        wire.head()
        wire.event(event="heartbeat")
        refused.wait(PATIENCE_S)
        wire.result(received.body)
        wire.chunk(b"")

    server.replies = [reply]
    with Client(server.url, "blobs", pause_s=60.0, deadline_s=PATIENCE_S) as client:
        outcomes = list(client.predict_many(cases(24)))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert most == 3
    refusals = len(server.received) - 24
    assert refusals <= WAITING_CASES + 1, "what it takes is learnt, not tried again with each case"


def test_a_refused_case_holds_up_no_other_and_does_not_wait_while_ours_leave_places(server: Peer) -> None:
    """It takes two, and says to come again in an hour, whereupon the client's deadline would be over."""

    def reply(wire: Wire, received: Received) -> None:
        if received.beside >= 2:
            refused.set()
            peer.problem(429, "busy", Retry_After="3600")(wire, received)
            return
        wire.head()
        wire.event(event="heartbeat")
        refused.wait(PATIENCE_S)
        wire.result(received.body)
        wire.chunk(b"")

    refused = threading.Event()
    server.replies = [reply]
    with Client(server.url, "blobs", pause_s=60.0, deadline_s=PATIENCE_S) as client:
        outcomes = list(client.predict_many(cases(20), {"priority": "batch"}))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert len(server.received) == 21


def test_an_outcome_is_handed_on_while_the_callers_iterator_blocks(server: Peer) -> None:
    """It gives its third case only when the first two outcomes are there."""
    seen = threading.Semaphore(0)

    def waiting() -> Iterator[Case]:
        for number, case in enumerate(cases(5)):
            if number == 2:
                assert seen.acquire(timeout=PATIENCE_S)
                assert seen.acquire(timeout=PATIENCE_S)
            yield case

    with client_of(server) as client:
        for outcome in client.predict_many(waiting()):
            assert outcome.error is None
            seen.release()


def test_cases_go_on_while_an_outcome_is_looked_at(server: Peer) -> None:
    with client_of(server) as client:
        outcomes = client.predict_many(cases(5))
        next(outcomes)
        chaos.wait_for(lambda: len(server.received) == 5)
        assert len(list(outcomes)) == 4


def test_a_flight_is_given_up_while_the_callers_iterator_blocks(server: Peer) -> None:
    never, asked, stop = threading.Event(), threading.Event(), Stop()

    def blocked() -> Iterator[Case]:
        asked.set()
        never.wait(PATIENCE_S)
        yield from cases(1)

    def give_up() -> None:
        asked.wait(PATIENCE_S)
        stop.set()

    giving_up = threading.Thread(target=give_up)
    giving_up.start()
    with client_of(server) as client, pytest.raises(errors.Cancelled):
        list(client.predict_many(blocked(), stop=stop))
    never.set()
    giving_up.join()
    assert not server.received


def test_single_calls_do_not_fill_the_servers_queue_either(server: Peer) -> None:
    """As an event loop's gather makes them: 30 at once, and two workers."""
    workers = Workers(2)
    release = threading.Event()
    workers.hold = {case.image: release for case in cases(30) if isinstance(case.image, bytes)}
    server.replies = [workers]
    with client_of(server) as client, ThreadPoolExecutor(30) as pool:
        client.describe()
        calls = [pool.submit(client.predict, case) for case in cases(30)]
        with workers.changed:
            full = workers.changed.wait_for(lambda: len(workers.working) == 2 and len(workers.queue) == 2, PATIENCE_S)
        assert full
        release.set()
        assert [call.result(PATIENCE_S).content for call in calls] == [case.image for case in cases(30)]
    assert workers.most_waiting <= WAITING_CASES


def test_the_model_is_described_once_and_a_long_wait_for_that_is_said(
    server: Peer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(known_description, "_PATIENT_S", 0.2)
    server.description = None

    def describe(wire: Wire, _: Received) -> None:
        chaos.wait_for(lambda: bool(caplog.records))
        wire.whole(200, json.dumps(peer.DESCRIPTION).encode(), {"Content-Type": "application/json"})

    server.replies = [describe, peer.echo]
    with client_of(server) as client:
        assert len(list(client.predict_many(cases(5)))) == 5
        assert client.describe().digest == "sha256:1"
    assert [request.options.get("describe") for request in server.received] == [True] + [None] * 5
    assert "the question what model blobs is waits in the server's queue" in caplog.text


def test_closing_a_client_gives_up_what_it_does(server: Peer) -> None:
    never = threading.Event()
    asked = threading.Event()

    def reply(wire: Wire, _: Received) -> None:
        asked.set()
        never.wait(PATIENCE_S)

    server.replies = [reply]
    client = client_of(server)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            client.predict(Case("head", b"image"))
        except errors.ClientError as error:
            caught.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert asked.wait(PATIENCE_S)
    client.close()
    asking.join(PATIENCE_S)
    never.set()
    assert [type(error) for error in caught] == [errors.Cancelled]
    with pytest.raises(errors.WrongUse, match="closed"):
        client.predict(Case("head", b"image"))
