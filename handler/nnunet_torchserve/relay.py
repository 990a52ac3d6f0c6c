"""A worker's metrics on their way to the front end: its own counts, and the engine's if it is the engine's relay.

One thread, which wakes when something was counted, and every ``INTERVAL_S`` to look at the engine's tally. No request
waits for it. It takes what was counted before it passes it on, so a worker that is killed loses at most what was
counted since it last did, and nothing is counted twice.

An engine's levels are passed on when they change, and now and then all the same: when an engine follows another, two
workers may speak of them for a moment, and the last word counts. So the new one's are said again and again at first.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import torch

from .backend import Backend
from .engine.channel import ChannelError
from .engine.tally import Level, TallyReader, Total
from .errors import Busy, Deadline, OutOfMemory
from .options import Priority
from .telemetry import (
    ANSWER_SECONDS,
    ANSWERS,
    BATCH_SLOTS,
    BATCHES,
    CACHE_LOOKUPS,
    CACHED_BYTES,
    CASES_FOLLOWING,
    CASES_IN_FLIGHT,
    CASES_WAITING,
    CHARGED_BYTES,
    DEVICE_MEMORY_TOTAL,
    DEVICE_MEMORY_USED,
    DEVICE_UTILIZATION,
    ENGINE_BACKEND,
    ENGINE_BUSY,
    ENGINE_LOADED,
    ENGINE_RELOAD_SECONDS,
    ENGINE_RELOADS,
    ENGINE_RESTARTS,
    ENGINE_STARTS,
    ENGINE_UNLOADS,
    ENGINE_UP,
    HIT,
    MISS,
    NO_CODE,
    PASSES,
    PASSES_WAITING,
    REQUESTS,
    SHARED_ANSWERS,
    SHARED_BATCHES,
    STAGE_REQUESTS,
    STAGE_SECONDS,
    STRIKES,
    Counts,
    Metric,
    MetricSink,
    Stage,
)

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
"""Between two looks at the engine's tally; Prometheus looks every 15 s or so."""

_GAP_S = 0.25
"""Between two turns at least: TorchServe writes a line of its log for each value."""

_REFRESH_S = 30.0
"""A level that does not change is passed on as often."""

_SETTLING_S = 10.0
"""For which those of an engine that follows another are passed on with each look: the other one's worker may say last
that it is gone."""

_AFTER_FAULT_S = 60.0
_MICROSECONDS = 1e6
_UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]")

_ALERTED = (Busy, Deadline, OutOfMemory)
"""Alerts name their codes: a series that is born with its first error has not increased."""

_TOTALS: Mapping[Total, Metric] = {
    Total.STARTS: ENGINE_STARTS,
    Total.RESTARTS: ENGINE_RESTARTS,
    Total.PASSES: PASSES,
    Total.BATCHES: BATCHES,
    Total.SLOTS: BATCH_SLOTS,
    Total.SHARED_BATCHES: SHARED_BATCHES,
    Total.BUSY_MICROSECONDS: ENGINE_BUSY,
    Total.UNLOADS: ENGINE_UNLOADS,
    Total.RELOADS: ENGINE_RELOADS,
    Total.RELOADING_MICROSECONDS: ENGINE_RELOAD_SECONDS,
}
_IN_MICROSECONDS = (Total.BUSY_MICROSECONDS, Total.RELOADING_MICROSECONDS)


_Levels = dict[tuple[Metric, tuple[str, ...]], float]
"""Metric and labels -> value."""


class Relay:
    """Passes metrics of one worker, and of engines, to a sink."""

    def __init__(self, sink: MetricSink, counts: Counts, model: tuple[str, str], device: torch.device) -> None:
        """Begin with nothing.

        Args:
            sink: where the metrics go.
            counts: the worker's own.
            model: name and version.
            device: of the engine.
        """
        self._emit, self._counts = sink, counts
        self._model = (label(model[0]), label(model[1]))
        self._device = label(str(device).replace(":", ""))
        self._monitor = DeviceMonitor(device, torch.cuda) if device.type == "cuda" else None
        self._found: queue.SimpleQueue[TallyReader] = queue.SimpleQueue()
        self._tallies: list[TallyReader] = []
        self._levels: _Levels = {}
        self._refreshed = -_REFRESH_S
        self._settles_until = -math.inf
        self._has_met = False
        self._looked = -INTERVAL_S

    def watch(self, descriptor: int, process: int) -> None:
        """Look at an engine's tally from now on; any thread may say so.

        Args:
            descriptor: the tally's; becomes the relay's to close.
            process: a pidfd of the engine; stays the caller's.
        """
        own = os.dup(process)
        try:
            self._found.put(TallyReader(descriptor, own))
        except (ChannelError, OSError):
            os.close(own)
            logger.exception("no metrics of this engine")

    def start(self) -> None:
        """Begin to pass on, in a thread of its own."""
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def introduce(self) -> None:
        """Pass zeros on: a rate is only known of a counter that was there before it counted."""
        self._counts.add(REQUESTS, 0, "200", NO_CODE)
        for error in _ALERTED:
            self._counts.add(REQUESTS, 0, str(int(error.status)), error.code)
        self._counts.add(STRIKES, 0)
        self._counts.add(SHARED_ANSWERS, 0)
        for result in (HIT, MISS):
            self._counts.add(CACHE_LOOKUPS, 0, result)
        for priority in Priority:
            self._counts.add(ANSWERS, 0, priority)
            self._counts.add(ANSWER_SECONDS, 0, priority)
        for stage in Stage:
            self._counts.add(STAGE_SECONDS, 0, stage)
            self._counts.add(STAGE_REQUESTS, 0, stage)
        for metric in _TOTALS.values():
            self._emit(metric, 0, (*self._model, self._device))

    def turn(self) -> None:
        """Pass on what there is."""
        for (metric, labels), amount in self._counts.take().items():
            self._emit(metric, _number(amount), (*self._model, *map(label, labels)))
        if time.monotonic() - self._looked >= INTERVAL_S:
            self._looked = time.monotonic()
            self.look()

    def look(self) -> None:
        """Pass on what the tallies say of which this worker is the relay."""
        self._meet()
        for tally in list(self._tallies):
            alive = tally.is_alive()  # asked first: what a dead engine wrote is complete
            if tally.become_relay():
                for total, added in tally.take().items():
                    if added:
                        value = added / _MICROSECONDS if total in _IN_MICROSECONDS else added
                        self._emit(_TOTALS[total], _number(value), (*self._model, self._device))
                self._pass_levels(tally if alive else None)
            if not alive:
                self._tallies.remove(tally)
                tally.close()

    def _run(self) -> None:
        while True:
            try:
                self.introduce()
                while True:
                    self.turn()
                    time.sleep(_GAP_S)
                    self._counts.fresh.wait(INTERVAL_S - _GAP_S)
            except Exception:
                logger.exception("metrics are not passed on for a while")
                time.sleep(_AFTER_FAULT_S)

    def _meet(self) -> None:
        """Take in the tallies that were found; the same engine is met again after a lost connection."""
        while not self._found.empty():
            tally = self._found.get()
            if any(known.identity == tally.identity for known in self._tallies):
                tally.close()
            else:
                self._tallies.append(tally)
                if self._has_met:
                    self._settles_until = time.monotonic() + _SETTLING_S
                self._has_met = True

    def _pass_levels(self, tally: TallyReader | None) -> None:
        """The levels of an engine, ``None`` if it is dead."""

        def level(name: Level) -> int:
            return 0 if tally is None else tally.level(name)

        engine = (*self._model, self._device)
        ahead = level(Level.PASSES_AHEAD) + level(Level.PASSES_REMAINING)
        levels: _Levels = {
            (ENGINE_UP, engine): int(tally is not None),
            (ENGINE_LOADED, engine): level(Level.NETWORKS_LOADED),
            (CASES_IN_FLIGHT, engine): level(Level.CASES_IN_FLIGHT),
            (CASES_WAITING, engine): level(Level.CASES_WAITING),
            (CASES_FOLLOWING, engine): level(Level.CASES_FOLLOWING),
            (PASSES_WAITING, engine): ahead,
            (CHARGED_BYTES, engine): level(Level.CHARGED_BYTES),
            (CACHED_BYTES, engine): level(Level.CACHED_BYTES),
        }
        runs = None if tally is None else tally.backend
        for backend in Backend:  # an engine that follows another one may run something else
            levels[ENGINE_BACKEND, (*engine, label(backend))] = int(backend is runs)
        if total := level(Level.DEVICE_BYTES):
            levels[DEVICE_MEMORY_TOTAL, (self._device,)] = total
        now = time.monotonic()
        if now < self._settles_until or now - self._refreshed >= _REFRESH_S:
            self._refreshed = now
            self._levels.clear()
        self._emit_changed(levels)
        if self._monitor is not None:  # last: a driver that hangs may do it here
            device = (self._device,)
            self._emit_changed({(metric, device): value for metric, value in self._monitor.read().items()})

    def _emit_changed(self, levels: _Levels) -> None:
        for (metric, labels), value in levels.items():
            if self._levels.get((metric, labels)) != value:
                self._levels[metric, labels] = value
                self._emit(metric, value, labels)


class DeviceMonitor:
    """A GPU's memory and utilisation as its driver reports them. Makes no CUDA context, which would take memory."""

    def __init__(self, device: torch.device, cuda: Any) -> None:
        """Watch ``device`` through ``cuda``, which is :mod:`torch.cuda` or gives recorded numbers."""
        self._device, self._cuda = device, cuda
        self._available = True

    def read(self) -> dict[Metric, float]:
        """Bytes used by all processes, and the share of the last moment in which it computed; empty if unknown."""
        if not self._available:
            return {}
        try:
            used, percent = self._cuda.device_memory_used(self._device), self._cuda.utilization(self._device)
        except Exception as error:  # noqa: BLE001 (nvidia-ml-py is missing, or whatever the driver says)
            self._available = False
            logger.warning("no metrics of %s: %s", self._device, error)
            return {}
        return {DEVICE_MEMORY_USED: int(used), DEVICE_UTILIZATION: percent / 100}


def label(value: str) -> str:
    """A label's value as TorchServe can read it: it separates values by commas and colons, and drops empty ones."""
    return _UNSAFE.sub("_", value) or "_"


def _number(value: float) -> float:
    """As TorchServe can read it: digits, no plus sign in an exponent."""
    return int(value) if value == int(value) else round(value, 6)
