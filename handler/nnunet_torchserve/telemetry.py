"""What is known of a request afterwards: where its time went, the one line that the log has of it, and what is counted.

Code takes a metric's name and labels from here. A new one needs four places: its :class:`Metric` and :data:`METRICS`
here, ``metrics.yaml`` for TorchServe, and docs/metrics.md for people; one that an engine counts also needs a number in
:mod:`.engine.tally`, which :mod:`.relay` passes on. Tests hold the lists to each other. A count is added in memory when
something happens; :mod:`.relay` takes it from there.

Locks: :class:`Counts` has one, held for an addition.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

SERVER_TIMING = "Server-Timing"

NO_CODE = "none"
"""The label of an answer that is no problem: TorchServe drops a label without a value, and the sample with it."""


class Stage(StrEnum):
    """The stages of a request, in their order."""

    DECODE = "decode"
    PREPROCESS = "preprocess"
    QUEUE = "queue"
    NETWORK = "network"
    EXPORT = "export"
    POSTPROCESS = "postprocess"
    ENCODE = "encode"


class Reused(StrEnum):
    """What a request took over from another one."""

    VOLUME = "volume"
    ANSWER = "answer"


class StageClock:
    """Seconds spent in each stage of one request. Used by one thread.

    Attributes:
        latest: the stage that began last; the one in which a request failed.
    """

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}
        self.latest: Stage | None = None

    def begin(self, stage: Stage) -> None:
        """Note that a stage begins, whose time is measured elsewhere."""
        self.latest = stage

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Add the time of the ``with`` block to ``stage``, also when it raises."""
        self.begin(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start)

    def add(self, stage: Stage, seconds: float) -> None:
        """Add time that was measured elsewhere."""
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @property
    def seconds(self) -> dict[Stage, float]:
        """Seconds per stage; a stage that was not reached is absent."""
        return dict(self._seconds)

    def server_timing(self, reused: Reused | None = None) -> str:
        """The value of a Server-Timing header (W3C Server Timing), durations in milliseconds."""
        stages = [f"{s};dur={self._seconds[s] * 1000:.1f}" for s in Stage if s in self._seconds]
        return ", ".join([*stages, *([f"reused;desc={reused}"] if reused else [])])


@dataclass(slots=True)
class RequestRecord:
    """One request for the log; nothing of the image or of a person.

    Attributes:
        request_id: as the answer has it.
        model: name and version.
        clock: seconds in each stage.
        shape: (Z, Y, X) of the image as sent, once its header is read.
        patches: windows of one fold.
        passes: forward passes in all.
        reused: what it took over from another request.
        priority: as it was asked for, once its options are read.
        status: of the answer.
        code: of the problem, if it is one.
        backend: what ran the networks.
        is_description: it was answered with the model's description, and is not counted.
    """

    request_id: str
    model: str
    clock: StageClock = field(default_factory=StageClock)
    shape: tuple[int, ...] | None = None
    patches: int | None = None
    passes: int | None = None
    reused: Reused | None = None
    priority: str | None = None
    status: int = 0
    code: str | None = None
    backend: str | None = None
    is_description: bool = False

    def line(self) -> str:
        """One JSON object; stage times in milliseconds."""
        stages = {str(stage): round(seconds * 1000, 1) for stage, seconds in self.clock.seconds.items()}
        document = {
            "id": self.request_id,
            "model": self.model,
            "status": self.status,
            "code": self.code,
            "shape": self.shape,
            "patches": self.patches,
            "passes": self.passes,
            "reused": self.reused,
            "priority": self.priority,
            "backend": self.backend,
            "ms": stages,
        }
        return json.dumps(document)


class Kind(StrEnum):
    """What is done with a metric's value."""

    COUNTER = "counter"
    """It is added to what was there."""

    GAUGE = "gauge"
    """It replaces what was there."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric, named as Prometheus names them.

    Attributes:
        name: unique.
        kind: see :class:`Kind`.
        labels: in the order in which values are given.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]


HIT, MISS = "hit", "miss"
"""The labels of a look into the cache."""

_MODEL = ("model_name", "model_version")
_ENGINE = (*_MODEL, "device")

REQUESTS = Metric("nnunet_requests_total", Kind.COUNTER, (*_MODEL, "status", "code"))
STAGE_SECONDS = Metric("nnunet_stage_seconds_total", Kind.COUNTER, (*_MODEL, "stage"))
STAGE_REQUESTS = Metric("nnunet_stage_requests_total", Kind.COUNTER, (*_MODEL, "stage"))
ANSWERS = Metric("nnunet_answers_total", Kind.COUNTER, (*_MODEL, "priority"))
ANSWER_SECONDS = Metric("nnunet_answer_seconds_total", Kind.COUNTER, (*_MODEL, "priority"))
CACHE_LOOKUPS = Metric("nnunet_cache_lookups_total", Kind.COUNTER, (*_MODEL, "result"))
SHARED_ANSWERS = Metric("nnunet_shared_answers_total", Kind.COUNTER, _MODEL)
STRIKES = Metric("nnunet_strikes_total", Kind.COUNTER, _MODEL)

PASSES = Metric("nnunet_passes_total", Kind.COUNTER, _ENGINE)
BATCHES = Metric("nnunet_batches_total", Kind.COUNTER, _ENGINE)
BATCH_SLOTS = Metric("nnunet_batch_slots_total", Kind.COUNTER, _ENGINE)
SHARED_BATCHES = Metric("nnunet_shared_batches_total", Kind.COUNTER, _ENGINE)
ENGINE_BUSY = Metric("nnunet_engine_busy_seconds_total", Kind.COUNTER, _ENGINE)
ENGINE_STARTS = Metric("nnunet_engine_starts_total", Kind.COUNTER, _ENGINE)
ENGINE_RESTARTS = Metric("nnunet_engine_restarts_total", Kind.COUNTER, _ENGINE)
ENGINE_UNLOADS = Metric("nnunet_engine_unloads_total", Kind.COUNTER, _ENGINE)
ENGINE_RELOADS = Metric("nnunet_engine_reloads_total", Kind.COUNTER, _ENGINE)
ENGINE_RELOAD_SECONDS = Metric("nnunet_engine_reload_seconds_total", Kind.COUNTER, _ENGINE)
ENGINE_UP = Metric("nnunet_engine_up", Kind.GAUGE, _ENGINE)
ENGINE_LOADED = Metric("nnunet_engine_loaded", Kind.GAUGE, _ENGINE)
ENGINE_BACKEND = Metric("nnunet_engine_backend", Kind.GAUGE, (*_ENGINE, "backend"))
CASES_IN_FLIGHT = Metric("nnunet_cases_in_flight", Kind.GAUGE, _ENGINE)
CASES_WAITING = Metric("nnunet_cases_waiting", Kind.GAUGE, _ENGINE)
CASES_FOLLOWING = Metric("nnunet_cases_following", Kind.GAUGE, _ENGINE)
PASSES_WAITING = Metric("nnunet_passes_waiting", Kind.GAUGE, _ENGINE)
CHARGED_BYTES = Metric("nnunet_charged_bytes", Kind.GAUGE, _ENGINE)
CACHED_BYTES = Metric("nnunet_cached_bytes", Kind.GAUGE, _ENGINE)

DEVICE_MEMORY_USED = Metric("nnunet_device_memory_used_bytes", Kind.GAUGE, ("device",))
DEVICE_MEMORY_TOTAL = Metric("nnunet_device_memory_total_bytes", Kind.GAUGE, ("device",))
DEVICE_UTILIZATION = Metric("nnunet_device_utilization_ratio", Kind.GAUGE, ("device",))

METRICS = (
    *(REQUESTS, STAGE_SECONDS, STAGE_REQUESTS, ANSWERS, ANSWER_SECONDS, CACHE_LOOKUPS, SHARED_ANSWERS, STRIKES),
    *(PASSES, BATCHES, BATCH_SLOTS, SHARED_BATCHES, ENGINE_BUSY, ENGINE_STARTS, ENGINE_RESTARTS),
    *(ENGINE_UP, CASES_IN_FLIGHT, CASES_WAITING, CASES_FOLLOWING, PASSES_WAITING, CHARGED_BYTES, CACHED_BYTES),
    *(ENGINE_UNLOADS, ENGINE_RELOADS, ENGINE_RELOAD_SECONDS, ENGINE_LOADED, ENGINE_BACKEND),
    *(DEVICE_MEMORY_USED, DEVICE_MEMORY_TOTAL, DEVICE_UTILIZATION),
)
"""All of them."""


class MetricSink(Protocol):
    """Where metrics go."""

    def __call__(self, metric: Metric, value: float, labels: Sequence[str]) -> None:
        """Add to a counter or set a gauge; ``labels`` are values in the metric's order."""


class Counts:
    """What one worker has counted since somebody last took it. Any thread may use it.

    A metric of a worker's own needs no more than ``counts.add(METRIC, amount, *labels)`` where it happens.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._amounts: dict[tuple[Metric, tuple[str, ...]], float] = {}
        self.fresh = threading.Event()

    def add(self, metric: Metric, amount: float, *labels: str) -> None:
        """Add to a counter; ``labels`` are those beyond the model's name and version. 0 makes it visible."""
        with self._lock:
            key = (metric, labels)
            self._amounts[key] = self._amounts.get(key, 0) + amount
        self.fresh.set()

    def add_request(self, record: RequestRecord) -> None:
        """Count an answered request and the stages that it reached."""
        self.add(REQUESTS, 1, str(record.status), record.code or NO_CODE)
        for stage, seconds in record.clock.seconds.items():
            self.add(STAGE_SECONDS, seconds, stage)
            self.add(STAGE_REQUESTS, 1, stage)
        if record.priority is not None and record.code is None:
            self.add(ANSWERS, 1, record.priority)
            self.add(ANSWER_SECONDS, sum(record.clock.seconds.values()), record.priority)

    def take(self) -> dict[tuple[Metric, tuple[str, ...]], float]:
        """What was added since the last call."""
        with self._lock:
            self.fresh.clear()
            taken, self._amounts = self._amounts, {}
        return taken
