"""A rollout under load: what clients lose, what they get, and what they wait.

Clients send small images, each its own and all of them different, one after another without a pause, and come again
only where an answer says ``Retry-After``. Meanwhile somebody does what docs/operations.md says: drains, scales from
four workers to one and back, registers version 2, makes it the default, drains version 1 and unregisters it. The
versions hold different folds: an answer must be, to the byte, the one that the version that it names gives to that
image when it is asked alone.

Threads: one for each client; they share :class:`Load` under its lock.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np

from benchmarks.harness.material import Material, crop_at_random, small_shape
from benchmarks.harness.results import Target
from benchmarks.harness.served import MODEL, Client, serving
from benchmarks.harness.spread import percentile_95, spread
from nnunet_torchserve.draining import DEFAULT_RETRY_AFTER_S
from nnunet_torchserve_tools import drain
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.chaos import wait_for

CLIENTS = 8
WORKERS = 4
OLD, NEW = "1.0", "2.0"
FOLDS = {OLD: 0, NEW: 1}
OPTIONS = {"use_mirroring": False}
SEED = 20261123

_NEW_FILE = f"{MODEL}-{NEW}.mar"
_PATIENCE_S = 300.0
_LOSSES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that was answered in the end.

    Attributes:
        image: number of what was sent.
        version: that answered.
        digest: sha256 of the answer.
        began: ``time.perf_counter()`` when it was first sent.
        seconds: until its answer.
        paused_s: of these, what the client waited before it came again.
    """

    image: int
    version: str
    digest: bytes
    began: float
    seconds: float
    paused_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """What somebody did to the server; seconds from the rollout's beginning."""

    what: str
    began_s: float
    seconds: float


@dataclass
class Load:
    """Clients that send one request after another.

    Attributes:
        client: of the server; every client has a connection of its own.
        images: bodies.
        sent: requests.
        answered: those answered with a result.
        refused: answers with ``Retry-After``, by status and code.
        lost: how the others ended.
    """

    client: Client
    images: Sequence[bytes]
    sent: int = 0
    answered: list[Answered] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """The clients send; in the end each still waits for its last answer."""
        with ThreadPoolExecutor(clients) as pool:
            sending = [pool.submit(self._send, range(first, len(self.images), clients)) for first in range(clients)]
            try:
                yield
            finally:
                self._over.set()
        for each in sending:
            each.result()

    def goes_on(self, answers: int) -> None:
        """Wait for so many answers more."""
        wanted = len(self.answered) + answers
        wait_for(lambda: len(self.answered) >= wanted, _PATIENCE_S)

    def _send(self, numbers: Sequence[int]) -> None:
        base = self.client.http.base_url
        with httpx.Client(base_url=base, timeout=_PATIENCE_S, trust_env=False) as http:
            own = Client(self.client.live, http, self.client.runtime)
            while not self._over.is_set():
                for number in numbers:
                    self._ask(own, number)

    def _ask(self, own: Client, number: int) -> None:
        with self._lock:
            self.sent += 1
        began, paused_s = time.perf_counter(), 0.0
        while True:
            try:
                answer = own.post(self.images[number], OPTIONS)
            except httpx.HTTPError as error:
                with self._lock:
                    self.lost.append(type(error).__name__)
                return
            pause = answer.headers.get("Retry-After")
            if pause is None:
                break
            with self._lock:
                self.refused[f"{answer.status_code} {answer.json()['code']}"] += 1
            time.sleep(float(pause))
            paused_s += float(pause)
        seconds = time.perf_counter() - began
        with self._lock:
            if answer.status_code == HTTPStatus.OK:
                digest = sha256(answer.content).digest()
                self.answered.append(Answered(number, version_of(answer), digest, began, seconds, paused_s))
            else:
                self.lost.append(f"{answer.status_code} {answer.text[:200]}")


class Rollout:
    """The operator: does one thing after the other and notes how long each took."""

    def __init__(self, client: Client) -> None:
        self.steps: list[Step] = []
        self._client = client
        self._began = time.perf_counter()

    def scale_down_and_up(self, load: Load, retry_after_s: int) -> None:
        """Four workers, one, four; the clients go on in between."""
        model, processes = MODEL, self._client.processes
        whole = drain.find_target(self._client.live.state_dir, None, model)
        self._do("drain every version", lambda: drain.drain(whole, _PATIENCE_S, retry_after_s))
        self._do(f"scale {WORKERS} to 1", lambda: processes.scale(model, 1))
        self._do("resume", lambda: drain.resume(whole))
        load.goes_on(2 * CLIENTS)
        self._do(f"scale 1 to {WORKERS}", lambda: processes.scale(model, WORKERS))
        load.goes_on(2 * CLIENTS)

    def replace_version(self, load: Load, retry_after_s: int) -> None:
        """Version 1, both, version 2; the clients go on."""
        model, processes = MODEL, self._client.processes
        self._do("register version 2", lambda: processes.register(_NEW_FILE, WORKERS))
        self._do("make it the default", lambda: self._manage("PUT", f"{model}/{NEW}/set-default"))
        old = drain.find_target(self._client.live.state_dir, None, f"{model}/{OLD}")
        self._do("drain version 1", lambda: drain.drain(old, _PATIENCE_S, retry_after_s))
        self._do("unregister version 1", lambda: processes.unregister(f"{model}/{OLD}"))
        load.goes_on(2 * CLIENTS)

    def _do(self, what: str, step: Callable[[], object]) -> None:
        began = time.perf_counter()
        step()
        ended = time.perf_counter()
        self.steps.append(Step(what, round(began - self._began, 3), round(ended - began, 3)))
        print(f"  {what}: {ended - began:.2f} s")

    def _manage(self, verb: str, path: str) -> None:
        url = f"{self._client.live.server.management_url}/models/{path}"
        httpx.request(verb, url, timeout=_PATIENCE_S, trust_env=False).raise_for_status()


def version_of(answer: httpx.Response) -> str:
    """The version that ``X-Nnunet-Model`` names."""
    fields = (field.strip().partition("=") for field in answer.headers["X-Nnunet-Model"].split(";"))
    return {name: value for name, _, value in fields}["version"]


def measure(material: Material, scratch: Path, *, scalings: int, steady_s: float, images_each: int) -> dict[str, Any]:
    """Serve version 1 with clients, roll version 2 out.

    Args:
        material: its folds 0 and 1 are the versions.
        scratch: of this story.
        scalings: how often the workers are scaled from four to one and back.
        steady_s: seconds of load before and after the rollout.
        images_each: different images of a client.
    """
    images = cut_images(material, CLIENTS * images_each)
    with serving(material, scratch, folds=(FOLDS[OLD],), workers=WORKERS) as client:
        add_new_version(material, scratch)
        load = Load(client, images)
        expected = {OLD: ask_alone(client, images)}
        with load.running(CLIENTS):
            load.goes_on(2 * CLIENTS)  # each worker has answered several
            steady = time.perf_counter()
            time.sleep(steady_s)
            load.goes_on(2 * CLIENTS)  # on a slow machine too, some began and ended before the rollout
            rollout = Rollout(client)
            began = time.perf_counter()
            for _ in range(scalings):
                rollout.scale_down_and_up(load, DEFAULT_RETRY_AFTER_S)
            rollout.replace_version(load, DEFAULT_RETRY_AFTER_S)
            ended = time.perf_counter()
            time.sleep(steady_s)
        expected[NEW] = ask_alone(client, images)
    wrong = sum(each.digest != expected[each.version][each.image] for each in load.answered)
    before = [each for each in load.answered if each.began >= steady and each.began + each.seconds <= began]
    during = [each for each in load.answered if each.began <= ended and each.began + each.seconds >= began]
    return {
        "clients": CLIENTS,
        "workers": f"{WORKERS}, 1, {WORKERS}; {WORKERS} of version 2",
        "versions": {version: f"fold {fold}" for version, fold in FOLDS.items()},
        "options": OPTIONS,
        "images": len(images),
        "images_that_the_versions_answer_differently": sum(
            one != other for one, other in zip(expected[OLD], expected[NEW], strict=True)
        ),
        "retry_after_s": DEFAULT_RETRY_AFTER_S,
        "steps": [{"step": step.what, "began_s": step.began_s, "seconds": step.seconds} for step in rollout.steps],
        "drain_seconds": [step.seconds for step in rollout.steps if step.what.startswith("drain")],
        "rollout_seconds": round(ended - began, 2),
        "sent": load.sent,
        "answered": len(load.answered),
        "answered_by_version": Counter(each.version for each in load.answered),
        "refused": load.refused,
        "lost": len(load.lost),
        "lost_with": load.lost[:_LOSSES_SHOWN],
        "wrong": wrong,
        "latency_before": latency(before),
        "latency_during": latency(during),
    }


def latency(requests: Sequence[Answered]) -> dict[str, object]:
    """What a client waited, with its pauses before it came again and without."""
    whole = [each.seconds for each in requests]
    without = [each.seconds - each.paused_s for each in requests]
    return {
        "requests": len(requests),
        "that_were_refused_at_least_once": sum(each.paused_s > 0 for each in requests),
        "seconds": spread(whole),
        "p95_seconds": round(percentile_95(whole), 4),
        "seconds_without_pauses": spread(without),
        "p95_seconds_without_pauses": round(percentile_95(without), 4),
    }


def targets_of(measured: dict[str, Any]) -> list[Target]:
    """What was promised."""
    lost = measured["sent"] - measured["answered"]
    refused = sum(measured["refused"].values())
    wrong = measured["wrong"]
    return [
        Target(f"rollout under {CLIENTS} clients: requests lost", lost, lost == 0),
        Target(f"rollout under {CLIENTS} clients: wrong answers", wrong, wrong == 0),
        Target("rollout: somebody was there to be lost (answers with Retry-After, at least 1)", refused, refused > 0),
    ]


def add_new_version(material: Material, scratch: Path) -> None:
    """Put version 2 beside version 1 in the model store of the server of ``scratch``."""
    store = scratch / "model_store"
    request = ArchiveRequest(material.model_folder, scratch / "new", folds=(FOLDS[NEW],), name=MODEL, version=NEW)
    [archive] = make_archives(request)
    archive.rename(store / _NEW_FILE)


def cut_images(material: Material, count: int) -> list[bytes]:
    """Distinct images of one to one and a half patches along each axis."""
    generator = np.random.default_rng(SEED)
    coarse = nib.load(material.coarse)
    shapes = [small_shape(material, generator.uniform(1, 1.5)) for _ in range(count)]
    images = [gzip.compress(crop_at_random(coarse, shape, generator).to_bytes()) for shape in shapes]
    assert len(set(images)) == count
    return images


def ask_alone(client: Client, images: Sequence[bytes]) -> list[bytes]:
    """The sha256 of the answer to each image while nothing else is asked."""
    answers = [client.post(image, OPTIONS) for image in images]
    assert {answer.status_code for answer in answers} == {HTTPStatus.OK}
    return [sha256(answer.content).digest() for answer in answers]
