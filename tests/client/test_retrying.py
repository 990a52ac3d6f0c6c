"""What is asked again, when and how often: exact sequences of answers from a server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest

from nnunet_torchserve_client import Case, Client, errors, transport
from nnunet_torchserve_client.events import Event, Kind
from support import peer
from support.leaps import leaping
from support.peer import Peer, Received, Reply, Wire

PATIENCE_S = 120.0
CASE = Case("head", b"an image")
OUT_OF_BODIES = json.dumps({"code": 507, "type": "OutOfMemoryError", "message": "direct memory"}).encode()


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


def client_of(server: Peer, **settings: object) -> Client:
    given: dict[str, object] = {"pause_s": 0.01, "deadline_s": PATIENCE_S} | settings
    return Client(server.url, "blobs", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(peer.plain(503, peer.QUEUE_FULL), id="the queue is full"),
        pytest.param(peer.plain(503, b"<html>"), id="503 of a proxy"),
        pytest.param(peer.plain(502, b"<html>"), id="502 of a proxy"),
        pytest.param(peer.problem(429, "busy"), id="busy"),
        pytest.param(peer.problem(503, "draining"), id="draining"),
        pytest.param(peer.problem(503, "draining", Retry_After="1 Jan 9999999999999999999 0:0"), id="at no date"),
        pytest.param(peer.problem(503, "internal"), id="no engine"),
        pytest.param(peer.plain(500, peer.WORKER_DIED), id="500 Worker died."),
        pytest.param(peer.plain(507, peer.WORKER_DIED), id="507 Worker died."),
        pytest.param(peer.plain(507, OUT_OF_BODIES), id="more uploads than memory"),
        pytest.param(peer.reset, id="a reset"),
        pytest.param(peer.truncated, id="a result that ends early"),
        pytest.param(peer.without_its_end, id="a stream without its last event"),
        pytest.param(peer.error_event(503, "internal"), id="no engine, told by an event"),
    ],
)
def test_what_a_second_try_mends_is_tried_again(failure: Reply, server: Peer) -> None:
    server.replies = [failure, peer.echo]
    told: list[Event] = []
    with client_of(server) as client:
        answer = client.predict(CASE, on_event=told.append)
    assert (answer.content, answer.tries) == (CASE.image, 2)
    assert [request.body for request in server.received] == [CASE.image] * 2
    assert [event.kind for event in told if event.kind in (Kind.RETRY, Kind.ANSWERED)] == [Kind.RETRY, Kind.ANSWERED]


def cut_off(status: int) -> Reply:
    """A refusal whose reason is not all there."""
    return lambda wire, _: wire.whole(status, b"<html", length=1000)


def nested(wire: Wire, _: Received) -> None:
    wire.head()
    wire.chunk(b"[" * 100_000 + b"\n")


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (peer.problem(504, "deadline"), errors.Deadline),
        (peer.plain(504, b"<html>"), errors.Deadline),
        (peer.problem(507, "out_of_memory"), errors.OutOfMemory),
        (peer.error_event(507, "out_of_memory"), errors.OutOfMemory),
        (peer.problem(500, "case_failed"), errors.CaseFailed),
        (peer.problem(500, "internal"), errors.ServerError),
        (peer.plain(500, b'{"code": 500, "type": "ErrorDataDecoderException", "message": "x"}'), errors.ServerError),
        (peer.problem(400, "bad_option"), errors.BadOption),
        (peer.plain(401), errors.Unauthorized),
        (peer.plain(403), errors.Unauthorized),
        (peer.plain(400, b'{"code": 400, "type": "InvalidKeyException", "message": "x"}'), errors.Unauthorized),
        (peer.plain(404, b'{"code": 404, "type": "ModelNotFoundException", "message": "x"}'), errors.UnknownModel),
        (peer.plain(405, b'{"code": 405, "type": "MethodNotAllowedException", "message": "x"}'), errors.UnknownModel),
        (peer.plain(408), errors.Refused),
        (peer.plain(413), errors.TooLarge),
        (peer.problem(413, "response_too_large"), errors.ResponseTooLarge),
        (peer.problem(422, "wrong_channels"), errors.WrongChannels),
        (peer.problem(422, "a_code_of_tomorrow"), errors.Refused),
        (cut_off(401), errors.Unauthorized),
        (cut_off(413), errors.TooLarge),
        (peer.plain(204), errors.BadAnswer),
        (peer.plain(200, b"<html>log in</html>", Content_Type="text/html"), errors.BadAnswer),
        (nested, errors.BadAnswer),
    ],
)
def test_what_no_try_mends_is_asked_once(failure: Reply, error: type[errors.ClientError], server: Peer) -> None:
    server.replies = [failure]
    with client_of(server) as client, pytest.raises(error) as caught:
        client.predict(CASE)
    assert type(caught.value) is error
    assert len(server.received) == 1


def more_than_it_said(wire: Wire, received: Received) -> None:
    wire.head()
    wire.result(received.body + b"!", promised=len(received.body))
    wire.chunk(b"")


@pytest.mark.parametrize(
    "reply",
    [more_than_it_said, peer.plain(200, bytes(11), X_Nnunet_Request_Id="server-7")],
    ids=["its own length", "any length"],
)
def test_an_answer_without_an_end_does_not_fill_the_memory(
    reply: Reply, server: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.replies = [reply]
    with client_of(server) as client:
        client.describe()
        monkeypatch.setattr(transport, "_MOST_ANSWER_BYTES", 10)
        with pytest.raises(errors.BadAnswer, match="more than"):
            client.predict(CASE)
    assert len(server.received) == 1


def test_an_error_names_the_case_the_request_and_the_server(server: Peer) -> None:
    server.replies = [peer.problem(422, "non_finite"), peer.plain(413)]
    with client_of(server) as client:
        with pytest.raises(errors.NonFinite) as said:
            client.predict(CASE)
        with pytest.raises(errors.TooLarge) as silent:
            client.predict(CASE)
    assert str(said.value) == "head: it is non_finite (422, non_finite, request server-7)"
    assert (said.value.case, said.value.request_id, said.value.server) == ("head", "server-7", server.url)
    assert silent.value.request_id == server.received[1].headers["x-request-id"], "by which the log can be searched"


def test_retry_after_is_honoured(server: Peer) -> None:
    server.replies = [peer.problem(503, "draining", Retry_After="1"), peer.echo]
    with client_of(server) as client:
        client.predict(CASE)
    first, second = server.received
    assert second.at - first.at >= 1.0


def test_a_server_that_stays_busy_is_asked_until_the_deadline_and_no_longer(
    server: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline comes with the eighth try."""
    clock = leaping(monkeypatch)

    def busy(wire: Wire, received: Received) -> None:
        if len(server.received) == 8:
            clock.leap(PATIENCE_S)
        peer.problem(429, "busy")(wire, received)

    server.replies = [busy]
    with client_of(server) as client, pytest.raises(errors.Busy) as caught:
        client.predict(CASE)
    assert caught.value.tries == len(server.received) == 8
    for number, (one, next_one) in enumerate(pairwise(server.received)):
        assert next_one.at - one.at >= 0.01 * 2**number / 2, "each pause is twice as long"
    server.replies = [peer.problem(429, "busy", Retry_After="3600")]
    with client_of(server, deadline_s=60.0) as client, pytest.raises(errors.Busy):
        client.predict(CASE)


def test_every_request_says_when_nobody_waits_any_more(server: Peer) -> None:
    server.replies = [peer.reset, peer.echo]
    with client_of(server, deadline_s=PATIENCE_S) as client:
        client.predict(CASE)
        client.predict(CASE, {"timeout_s": 2.5})
    first, second, third = (request.options["timeout_s"] for request in server.received)
    assert 0 < second < first <= PATIENCE_S
    assert third == 2.5


def test_an_address_where_nothing_ever_answered_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is over after the third try, and the deadline is far away."""
    clock = leaping(monkeypatch)
    told: list[Event] = []

    def tell(event: Event) -> None:
        told.append(event)
        if len(told) == 3:
            clock.leap(120.0)

    with Peer().listening() as gone:
        pass
    with (
        client_of(gone, first_contact_s=120.0, deadline_s=3600.0) as client,
        pytest.raises(errors.Unreachable) as caught,
    ):
        client.predict(CASE, on_event=tell)
    assert [event.kind for event in told] == [Kind.RETRY] * 3 + [Kind.FAILED]
    assert caught.value.of_all_cases
    assert caught.value.tries == 4
    assert str(caught.value).startswith("blobs: no connection to the server: Connection refused: does it run")
    assert caught.value.request_id is None, "no server's log has it"


def test_a_url_that_cannot_be_right_is_said(server: Peer) -> None:
    port = server.url.rpartition(":")[2]
    for url, reason in (
        (f"https://127.0.0.1:{port}", "speak TLS at this port: is it http, not https?"),
        ("http://no-such-host.invalid", "is the host's name right?"),
    ):
        settings: dict[str, Any] = {"pause_s": 0.01, "first_contact_s": 0.01, "use_proxies": False}
        with Client(url, "blobs", **settings) as client, pytest.raises(errors.Unreachable) as caught:
            client.predict(CASE)
        assert reason in str(caught.value)


def test_a_server_that_is_started_again_has_lost_nothing() -> None:
    server = Peer()
    gone = threading.Event()
    with ExitStack() as first, client_of(first.enter_context(server.listening())) as client:
        client.describe()
        first.close()

        def start_again(event: Event) -> None:
            if event.kind is Kind.RETRY and not gone.is_set():
                gone.set()
                again.enter_context(server.listening())

        with ExitStack() as again:
            assert client.predict(CASE, on_event=start_again).tries > 1
    assert gone.is_set()


def test_a_case_that_kills_workers_is_tried_three_times_the_last_one_alone(server: Peer) -> None:
    """Another case is held in flight until the second worker has died; the third try waits for it."""
    deaths = 0
    died_twice, good_is_there = threading.Event(), threading.Event()

    def reply(wire: Wire, received: Received) -> None:
        nonlocal deaths
        if received.body == b"killer":
            deaths += 1
            good_is_there.wait(PATIENCE_S)
            wire.whole(500, peer.WORKER_DIED)
            if deaths == 2:
                died_twice.set()
            return
        wire.head()
        wire.event(event="heartbeat")
        good_is_there.set()
        died_twice.wait(PATIENCE_S)
        wire.result(received.body)
        wire.chunk(b"")

    server.replies = [reply]
    cases = [Case("good", b"good"), Case("killer", b"killer")]
    with client_of(server) as client:
        good, killer = client.predict_many(cases)
    assert good.error is None
    assert isinstance(killer.error, errors.WorkerDied)
    assert killer.error.tries == 3
    tries = [request for request in server.received if request.body == b"killer"]
    assert len(tries) == 3
    assert tries[2].beside == 0
    assert tries[1].beside == 1


def test_a_case_whose_answers_are_cut_off_is_tried_as_often_as_one_that_kills_workers(server: Peer) -> None:
    """Once events have come, a killed worker is a stream that ends."""
    server.replies = [peer.truncated]
    with client_of(server) as client, pytest.raises(errors.CutOff) as caught:
        client.predict(CASE)
    assert caught.value.tries == len(server.received) == 3


def test_an_answer_that_was_cut_off_because_the_whole_server_went_is_no_worker_that_died(server: Peer) -> None:
    server.replies = [peer.truncated, peer.reset, peer.truncated, peer.truncated, peer.echo]
    with client_of(server) as client:
        assert client.predict(CASE).tries == 5


def test_a_case_that_kills_whole_servers_is_stopped_too(server: Peer) -> None:
    """Each time it is cut off, and then nothing is there for a while."""
    server.replies = [peer.truncated, peer.reset] * 10
    with client_of(server) as client, pytest.raises(errors.CutOff):
        client.predict(CASE)
    assert len(server.received) == 7, "four deaths, the first of which may have been the server's own"


def test_a_server_that_is_away_does_not_excuse_deaths_at_another_one(server: Peer) -> None:
    with Peer().listening() as away:
        pass
    server.replies = [peer.truncated] * 20
    settings: dict[str, Any] = {"pause_s": 0.01, "deadline_s": PATIENCE_S}
    with Client([server.url, away.url], "blobs", **settings) as client, pytest.raises(errors.CutOff):
        client.predict(CASE)
    assert len(server.received) == 3


def test_a_server_that_falls_silent_is_given_up(server: Peer) -> None:
    silent = threading.Event()

    def fall_silent(wire: Wire, _: Received) -> None:
        wire.head()
        wire.event(event="heartbeat")
        silent.wait(PATIENCE_S)

    server.replies = [fall_silent, peer.echo]
    with client_of(server, silence_s=0.3) as client:
        assert client.predict(CASE).tries > 1
    silent.set()


@pytest.mark.parametrize("model_is_there", [True, False])
def test_a_request_that_is_lost_in_the_servers_queue_is_asked_for_again(
    model_is_there: bool, server: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a model is unregistered, and registered anew: the connection stays open."""
    monkeypatch.setattr(transport, "QUEUE_LOOK_SHARE", 0.004)
    over = threading.Event()

    def reply(wire: Wire, received: Received) -> None:
        if received.options.get("describe"):
            peer.plain(404, b"{}")(wire, received)
        elif received is not server.received[0]:
            peer.echo(wire, received)
        else:
            if not model_is_there:
                server.description = None  # the question comes to the replies
            over.wait(PATIENCE_S)

    server.replies = [reply]
    with client_of(server, silence_s=0.3) as client:
        answer = client.predict(CASE)
    over.set()
    assert answer.content == CASE.image
    assert answer.tries > 1, "twice, unless the second answer is as slow as one that is lost"


def test_a_request_that_waits_in_a_long_queue_is_not_sent_twice(server: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is lost is asked again and again, and not answered either."""
    monkeypatch.setattr(transport, "QUEUE_LOOK_SHARE", 0.001)
    asked = threading.Semaphore(0)

    def reply(wire: Wire, received: Received) -> None:
        if received.options.get("describe"):
            asked.release()
            return
        server.description = None  # the question comes to the replies
        for _ in range(3):
            assert asked.acquire(timeout=PATIENCE_S)
        peer.echo(wire, received)

    server.replies = [reply]
    with client_of(server) as client:
        assert client.predict(CASE).tries == 1
    assert len([request for request in server.received if request.body]) == 1


def test_the_deadline_holds_while_a_server_talks(server: Peer) -> None:
    over = threading.Event()

    def talk(wire: Wire, _: Received) -> None:
        wire.head()
        while not over.wait(0.01):
            wire.event(event="heartbeat")

    server.replies = [talk]
    with client_of(server, deadline_s=1.0) as client, pytest.raises(errors.TooLate):
        client.predict(CASE)
    over.set()
