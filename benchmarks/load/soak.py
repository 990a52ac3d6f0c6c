"""Many requests while engines and workers are killed: does any client get a wrong answer, or none at all?

Clients send requests as fast as they are answered, and try again what the documentation calls worth trying again:
429 and 503 after ``Retry-After``, TorchServe's own 500 or 507 "Worker died.", and lost connections. Meanwhile an
engine or a worker, chosen at random, is killed every few seconds; but no engine is killed under a request that has lost
one already, because that is a second strike and rightly ends in 500. Every answer must be the one that the request
got alone before.

The requests come in rounds. Before the first one and after each, when nothing is killed any more, every worker is
READY and nothing is in flight, memory is taken. A killed process starts anew, small; so what counts is the largest
process of each kind: at no later point may it exceed the largest one of the first point, when each had been used, by
more than ``MOST_GROWTH`` and ``MOST_GROWTH_MB``. Then the server is stopped, and nothing of it may be left.
"""

from __future__ import annotations

import argparse
import gzip
import random
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from itertools import count
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import psutil

from benchmarks.harness.label_maps import digest_of, labels_of
from benchmarks.harness.material import Material, crop_at_random, find_material, small_shape
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import MODEL, Client, serving
from support.chaos import engines, family, shared_memory

MOST_GROWTH, MOST_GROWTH_MB = 0.1, 32.0
"""An allocator's own ups and downs."""

SEED = 20261123
TASKS = 40

_WORKER_DIED = "Worker died."
_PAUSE_S = 0.5
"""Before trying again where the server names no time."""

_TRY_AGAIN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


@dataclass(frozen=True, slots=True)
class Task:
    """One request."""

    body: bytes
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much and how hard.

    Attributes:
        requests: answers in all.
        most_seconds: of all rounds; what is not sent by then is not sent.
        rounds: parts, after each of which memory is taken.
        kill_every_s: seconds between two kills; more, where workers take longer to be ready again.
        clients: at once.
        workers: of TorchServe.
        give_up_s: a request that is not answered by then, with all its tries, hangs.
    """

    requests: int = 1000
    most_seconds: float = 3600.0
    rounds: int = 5
    kill_every_s: float = 20.0
    clients: int = 8
    workers: int = 4
    give_up_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    """One process at a quiet point."""

    kind: str
    pid: int
    age_s: float
    uss_mb: float
    descriptors: int


@dataclass(slots=True)
class Report:
    """What happened.

    Attributes:
        answered: requests with a right answer in the end.
        wrong: answers that were not the request's own.
        failed: requests that ended with something not worth trying again: status and text.
        hung: requests without an answer after ``give_up_s``.
        tries_again: how often, by reason.
        kills: seconds from the start, what was killed, and the cases in flight in the engine then.
        quiet: every process at each quiet point.
        held_when_quiet: volumes and logits in shared memory that somebody held at a quiet point.
        left_over: what was there after the server was stopped.
        seconds: of all rounds.
    """

    answered: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    hung: int = 0
    tries_again: dict[str, int] = field(default_factory=dict)
    kills: list[tuple[float, str, int]] = field(default_factory=list)
    quiet: list[list[Size]] = field(default_factory=list)
    held_when_quiet: int = 0
    left_over: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def growth_mb(self, kind: str) -> float:
        """By how much the largest process of a kind ever exceeded the largest one of the first quiet point."""
        first, *later = (max(size.uss_mb for size in sizes if size.kind == kind) for sizes in self.quiet)
        return max(later) - first

    def allowed_mb(self, kind: str) -> float:
        """What that may be."""
        first = max(size.uss_mb for size in self.quiet[0] if size.kind == kind)
        return max(MOST_GROWTH * first, MOST_GROWTH_MB)


def run(
    model: Material | Path,
    tasks: Sequence[Task],
    plan: Plan,
    scratch: Path,
    *,
    others: tuple[Path, ...] = (),
    previous_stages: tuple[Path, ...] = (),
    trainer_files: tuple[Path, ...] = (),
) -> Report:
    """Serve a model, all folds of it, under fire.

    Args:
        model: as for :func:`benchmarks.harness.served.serving`.
        tasks: distinct requests; each is sent again and again.
        plan: see there.
        scratch: a directory of this run's own.
        others: as there, as what follows.
        previous_stages: of a cascade.
        trainer_files: of somebody's own.
    """
    report = Report()
    with serving(
        model,
        scratch,
        folds=None,
        others=others,
        previous_stages=previous_stages,
        trainer_files=trainer_files,
        workers=plan.workers,
    ) as client:
        _Soak(client, tasks, plan, report).run()
        server, memory = client.live.server, shared_memory(family(client.runtime))
    report.left_over += [f"process {process.pid}" for process in family(client.runtime)]
    report.left_over += [f"shared memory {inode}" for inode in memory & shared_memory(psutil.process_iter())]
    report.left_over += [str(file) for file in client.runtime.glob("*/*.sock")]
    report.left_over += [server.temp_dir] if Path(server.temp_dir).exists() else []
    return report


class _Soak:
    """Threads: one for each client, which share the report under a lock, and one that kills."""

    def __init__(self, client: Client, tasks: Sequence[Task], plan: Plan, report: Report) -> None:
        self._client, self._tasks, self._plan, self._report = client, tasks, plan, report
        self._lock = threading.Lock()
        self._random = random.Random(SEED)  # noqa: S311 (no secret)
        self._expected: dict[int, str] = {}
        self._numbers = count()
        self._in_flight: set[int] = set()
        self._struck: set[int] = set()

    def run(self) -> None:
        """Everything but the end of the server."""
        for number, task in enumerate(self._tasks):
            response = self._client.post(task.body, task.options)
            assert response.status_code == HTTPStatus.OK, response.text
            self._expected[number] = digest_of(labels_of(response.content))
        with ThreadPoolExecutor(self._plan.clients) as pool:  # nobody is killed yet: all processes get used
            list(pool.map(self._ask, range(len(self._tasks))))
        self._report.answered = 0
        self._take_memory()
        started = time.monotonic()
        for _ in range(self._plan.rounds):
            self._round(started)
            self._take_memory()
            print(f"  {self._report.answered} answered, {len(self._report.kills)} kills, {self._memory_line()}")
        self._report.seconds = time.monotonic() - started

    def _round(self, started: float) -> None:
        quota = iter(range(self._plan.requests // self._plan.rounds))
        ends = time.monotonic() + self._plan.most_seconds / self._plan.rounds
        over = threading.Event()

        def send() -> None:
            while time.monotonic() < ends:
                with self._lock:
                    if next(quota, None) is None:
                        return
                    number = next(self._numbers)
                self._ask(number)

        killer = threading.Thread(target=self._kill_until, args=(over, started))
        killer.start()
        try:
            with ThreadPoolExecutor(self._plan.clients) as pool:
                for sending in [pool.submit(send) for _ in range(self._plan.clients)]:
                    sending.result()
        finally:
            over.set()
            killer.join()

    def _ask(self, number: int) -> None:
        """Send a request until it has an answer."""
        task = number % len(self._tasks)
        gives_up = time.monotonic() + self._plan.give_up_s
        with self._lock:
            self._in_flight.add(number)
        pause: float | None = 0.0
        while pause is not None and (left := gives_up - time.monotonic()) > 0:
            time.sleep(pause)
            pause = self._try(task, left)
        with self._lock:
            self._in_flight.discard(number)
            self._report.hung += pause is not None

    def _try(self, number: int, timeout_s: float) -> float | None:
        """Send a request once; the seconds after which it should be sent again, ``None`` if it is settled."""
        task, report = self._tasks[number], self._report
        try:
            with httpx.Client(base_url=self._client.http.base_url, timeout=timeout_s, trust_env=False) as http:
                response = Client(self._client.live, http, self._client.runtime).post(task.body, task.options)
        except httpx.TransportError as error:
            with self._lock:
                self._note_try(type(error).__name__)
            return _PAUSE_S
        died = response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR and _WORKER_DIED in response.text
        with self._lock:
            if response.status_code == HTTPStatus.OK:
                right = digest_of(labels_of(response.content)) == self._expected[number]
                report.answered += right
                report.wrong += not right
                return None
            if died or response.status_code in _TRY_AGAIN:
                self._note_try(f"{response.status_code} {_WORKER_DIED if died else ''}".strip())
                return float(response.headers.get("Retry-After", _PAUSE_S))
            report.failed.append(f"{response.status_code} {response.text[:300]}")
            return None

    def _note_try(self, reason: str) -> None:
        """Under the lock."""
        self._report.tries_again[reason] = self._report.tries_again.get(reason, 0) + 1

    def _kill_until(self, over: threading.Event, started: float) -> None:
        while not over.wait(self._plan.kill_every_s):
            if set(self._client.processes.workers(MODEL).values()) != {"READY"}:
                continue  # else a slow machine would be kept from ever having a worker
            running = {"engine": self._engines(), "worker": self._client.workers()}
            cases = len(shared_memory(running["engine"], "logits"))
            with self._lock, suppress(psutil.NoSuchProcess, IndexError):  # nothing runs, or no more
                if self._struck & self._in_flight:
                    del running["engine"]
                kind = self._random.choice([kind for kind, processes in running.items() if processes])
                self._random.choice(running[kind]).kill()
                self._report.kills.append((round(time.monotonic() - started, 1), kind, cases))
                if kind == "engine":
                    self._struck = set(self._in_flight)

    def _engines(self) -> list[psutil.Process]:
        return [engine.process for engine in engines(self._client.runtime)]

    def _take_memory(self) -> None:
        """Wait until nothing happens any more, then look at every process."""
        self._client.processes.wait_ready(MODEL, self._plan.workers)
        kinds = {"engine": self._engines(), "worker": self._client.workers()}
        torchserve = self._client.live.server.process()
        kinds["torchserve"] = [] if torchserve is None else [torchserve]
        processes = [process for each in kinds.values() for process in each]
        self._report.held_when_quiet += len(shared_memory(processes, "volume") | shared_memory(processes, "logits"))
        self._report.quiet.append([_size(kind, process) for kind, processes in kinds.items() for process in processes])

    def _memory_line(self) -> str:
        sizes = self._report.quiet[-1]
        return ", ".join(f"{size.kind} {size.uss_mb:.0f} MB" for size in sizes)


def _size(kind: str, process: psutil.Process) -> Size:
    return Size(
        kind=kind,
        pid=process.pid,
        age_s=round(time.time() - process.create_time(), 1),
        uss_mb=round(process.memory_full_info().uss / 1e6, 1),
        descriptors=process.num_fds(),
    )


def tasks_of(material: Material, number: int) -> list[Task]:
    """Distinct images of one to two patches along each axis; every fourth with two folds, the others with one."""
    generator = np.random.default_rng(SEED)
    coarse = nib.load(material.coarse)
    tasks = []
    for each in range(number):
        shape = small_shape(material, generator.uniform(1, 2))
        cut = crop_at_random(coarse, shape, generator)
        folds = [0, 1] if each % 4 == 0 else [0]
        tasks.append(Task(gzip.compress(cut.to_bytes()), {"folds": folds, "use_mirroring": False}))
    return tasks


def targets_of(report: Report) -> list[Target]:
    """The claims of the soak, and whether they were met."""
    failed = len(report.failed) + report.wrong
    targets = [
        Target("requests with a wrong answer, or with an error that nobody should try again", failed, failed == 0),
        Target("requests that hang", report.hung, report.hung == 0),
        Target("volumes and logits that are held when nothing is in flight", *_none(report.held_when_quiet)),
        Target("processes, shared memory, sockets and folders left after stop", *_none(len(report.left_over))),
    ]
    for kind in ("engine", "worker"):
        growth, allowed = report.growth_mb(kind), report.allowed_mb(kind)
        claim = f"{kind}: the largest grows by at most {allowed:.0f} MB"
        targets.append(Target(claim, growth, growth <= allowed))
    return targets


def _none(number: int) -> tuple[int, bool]:
    return number, number == 0


def main() -> int:
    """Run, write ``results/soak.json``."""
    plan = Plan()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=plan.requests)
    parser.add_argument("--most-seconds", type=float, default=plan.most_seconds)
    parser.add_argument("--rounds", type=int, default=plan.rounds)
    parser.add_argument("--kill-every-s", type=float, default=plan.kill_every_s)
    parser.add_argument("--clients", type=int, default=plan.clients)
    parser.add_argument("--workers", type=int, default=plan.workers)
    parser.add_argument("--tasks", type=int, default=TASKS, help="distinct requests, which are sent again and again")
    arguments = vars(parser.parse_args())
    number = arguments.pop("tasks")
    plan = Plan(**arguments)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        report = run(material, tasks_of(material, number), plan, scratch)
    measured = {"options": "folds [0], or [0, 1] for every fourth request; no mirroring", "plan": asdict(plan)}
    return write_results("soak", material, {**measured, **asdict(report)}, targets_of(report))


if __name__ == "__main__":
    sys.exit(main())
