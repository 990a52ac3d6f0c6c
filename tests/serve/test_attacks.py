"""A live server under attack: every request gets the answer that it deserves, and nobody else notices.

``support.attacks`` holds the table. About 100 of it run always, all of it with the long tests.
"""

from __future__ import annotations

import gzip
import http.client
import io
import json
import re
import socket
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from support.attacks import ANSWERED, CATEGORIES, CLOSED, MARKER, Attack, Outcome, attacks, request, seeds, selection
from support.peaks import forget_peak, peak
from support.server import SERVED, LiveServer

pytestmark = pytest.mark.serve

AT_ONCE = 3
"""One that a worker has, and two in TorchServe's queue, which takes no more here."""

GOOD_EVERY = 10
PATIENCE_S, PROMPT_S = 300, 60
"""What a client waits, and what a refusal may take at most with the good requests before it: most take milliseconds."""

MEMORY_GROWTH, PEAK_GROWTH = 24 * 1024**2, 96 * 1024**2
"""Bytes of a worker: what it may keep of a whole category, and what it may take in between. A bomb is 320 MiB."""

QUEUE_FULL = (503, "ServiceUnavailableException")
_SECRETS = (MARKER, "/etc/", "/proc/", "/tmp/", "/home/", "site-packages", ".py", "Traceback", "root:")
"""What no answer of the handler may say."""

_ERROR = re.compile(r"MODEL_LOG - (\w+(?:Error|Exception)\b.{,200})")
_TRACEBACK = "Traceback (most recent call last)"
_TORCHSERVES_TRACEBACK = re.compile(r"Failed (?:json|utf-8) decoding of input data")
"""TorchServe logs what it cannot parse and hands it over as it is."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def outcome(self) -> Outcome:
        """As the table has it."""
        kind = self.headers.get("content-type", "")
        if not self.status:
            return 0, self.body.decode()
        if self.status < HTTPStatus.BAD_REQUEST or not kind.endswith("json"):
            return self.status, ""
        if not self.body:  # of a HEAD
            return self.status, ""
        document = json.loads(self.body)
        return self.status, document["code"] if kind == "application/problem+json" else document["type"]

    @property
    def text(self) -> str:
        """All of it, unpacked."""
        body = self.body
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        if body[:2] == b"PK":
            archive = zipfile.ZipFile(io.BytesIO(body))
            body = b"".join([*map(str.encode, archive.namelist()), *map(archive.read, archive.namelist())])
        return f"{self.headers} {body.decode('latin-1')}"


@dataclass(frozen=True)
class Sender:
    """Sends bytes as they are."""

    host: str
    port: int

    def send(self, wire: bytes, *, ends: bool = False) -> Reply:
        """One request; again where TorchServe's queue is full, as a client would."""
        deadline = time.monotonic() + PATIENCE_S
        while (reply := self._once(wire, ends=ends)).outcome == QUEUE_FULL and time.monotonic() < deadline:
            time.sleep(0.05)
        return reply

    def _once(self, wire: bytes, *, ends: bool) -> Reply:
        with socket.create_connection((self.host, self.port), timeout=PATIENCE_S) as connection:
            try:
                connection.sendall(wire)
                if ends:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # refused before the end; the answer may be there
            response = http.client.HTTPResponse(connection, method="HEAD" if wire.startswith(b"HEAD ") else None)
            try:
                response.begin()
                headers = {name.lower(): value for name, value in response.getheaders()}
                return Reply(response.status, headers, response.read())
            except TimeoutError:
                return Reply(0, {}, b"silence")
            except (http.client.BadStatusLine, ConnectionResetError):
                return Reply(0, {}, CLOSED[1].encode())


@pytest.fixture(scope="module")
def sender(server: LiveServer) -> Sender:
    """To the server's inference port."""
    url = urlsplit(server.server.inference_url)
    assert url.hostname is not None
    assert url.port is not None
    return Sender(url.hostname, url.port)


@pytest.fixture(scope="module")
def good(sender: Sender) -> bytes:
    """What the server answers to the good request."""
    reply = sender.send(GOOD)
    assert reply.outcome == ANSWERED, reply
    for seed in seeds().values():  # so that every library is loaded before memory is measured
        sender.send(seed.request(seed.body))
    return reply.body


IMAGE = seeds()["nii.gz"].body
GOOD = request(IMAGE)


def test_the_table_holds_hundreds_of_distinct_requests() -> None:
    assert len({attack.wire for attack in attacks()}) == len(attacks()) >= 300
    assert len({(attack.category, attack.name) for attack in attacks()}) == len(attacks())
    assert len(selection()) >= 100
    assert {attack.category for attack in selection()} == set(CATEGORIES)


@pytest.mark.parametrize("name", seeds())
def test_the_images_that_the_attacks_start_from_are_answered(name: str, sender: Sender) -> None:
    seed = seeds()[name]
    reply = sender.send(seed.request(seed.body))
    assert reply.outcome == ANSWERED, reply
    assert MARKER not in reply.text


@pytest.mark.parametrize("category", CATEGORIES)
def test_chosen_attacks_get_their_answer_and_hurt_nobody(
    category: str, server: LiveServer, sender: Sender, good: bytes
) -> None:
    _withstand(server, sender, good, [attack for attack in selection() if attack.category == category])


@pytest.mark.long
@pytest.mark.parametrize("category", CATEGORIES)
def test_every_attack_gets_its_answer_and_hurts_nobody(
    category: str, server: LiveServer, sender: Sender, good: bytes
) -> None:
    _withstand(server, sender, good, [attack for attack in attacks() if attack.category == category])


def _withstand(server: LiveServer, sender: Sender, good: bytes, chosen: Sequence[Attack]) -> None:
    def strike(number: int) -> list[str]:
        attack = chosen[number]
        started = time.monotonic()
        complaints = list(_complaints(attack, sender.send(attack.wire, ends=attack.ends)))
        if (took_s := time.monotonic() - started) > PROMPT_S:
            complaints.append(f"it took {took_s:.0f} s")
        if number % GOOD_EVERY == 0 and sender.send(GOOD).body != good:
            complaints.append("a good request beside it got another answer than before")
        return [f"{attack.name}: {complaint}" for complaint in complaints]

    watch = Watch(server)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        complaints = [each for found in pool.map(strike, range(len(chosen))) for each in found]
    behind = uuid4().hex
    if sender.send(request(IMAGE, headers=[(b"X-Request-Id", behind.encode())])).body != good:
        complaints.append("a good request behind them got another answer than before")
    assert server.logs(behind), "the log is written a little later"
    complaints += watch.harm()
    assert not complaints, "\n".join(complaints)


def _complaints(attack: Attack, reply: Reply) -> Iterator[str]:
    """What is wrong with a reply."""
    if reply.outcome not in attack.allowed:
        yield f"{reply.outcome} is none of {sorted(attack.allowed)}; {reply.body[:200]!r}"
    problem = reply.headers.get("content-type") == "application/problem+json"
    if problem and reply.body and json.loads(reply.body)["status"] != reply.status:
        yield "its problem has another status"
    if "set-cookie" in reply.headers:
        yield "it has a header of the client's"
    told = [secret for secret in (_SECRETS if problem else (MARKER,)) if secret in reply.text]
    if told:
        yield f"it tells {told}"


class Watch:
    """Looks at the workers and the logs from when it is made."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._read = {log: log.stat().st_size for log in sorted(Path(server.server.log_dir).iterdir())}
        self._workers = {model: server.workers(model) for model in SERVED}
        self._before = {worker: forget_peak(worker) for workers in self._workers.values() for worker in workers}

    def harm(self) -> Iterator[str]:
        """Workers that are others than before, or grew; tracebacks in their log; a patient's name in any log."""
        for model, workers in self._workers.items():
            if self._server.workers(model) != workers:
                yield f"{model} has other workers than before"
                return
        for worker, (kept, resident) in self._before.items():
            if (growth := worker.memory_full_info().uss - kept) > MEMORY_GROWTH:
                yield f"a worker keeps {growth} bytes more than before"
            if (growth := peak(worker) - resident) > PEAK_GROWTH:
                yield f"a worker took {growth} bytes more in between"
        for log, size in self._read.items():
            text = log.read_bytes()[size:].decode("utf-8", "replace")
            if MARKER in text:
                yield f"{log.name} tells {text[max(0, text.index(MARKER) - 200) : text.index(MARKER) + 50]!r}"
            if log.name == "model_log.log" and text.count(_TRACEBACK) != len(_TORCHSERVES_TRACEBACK.findall(text)):
                yield f"a traceback in the log: {_ERROR.findall(text)}"
