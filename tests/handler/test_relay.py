"""Counts on their way to the front end: each once, whoever dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.engine.shared_memory import share
from nnunet_torchserve.engine.tally import Level, Tally, TallyReader, Total
from nnunet_torchserve.relay import DeviceMonitor, Relay, label
from nnunet_torchserve.telemetry import (
    CASES_IN_FLIGHT,
    DEVICE_MEMORY_TOTAL,
    DEVICE_MEMORY_USED,
    DEVICE_UTILIZATION,
    ENGINE_BACKEND,
    ENGINE_BUSY,
    ENGINE_UP,
    METRICS,
    PASSES,
    PASSES_WAITING,
    REQUESTS,
    STAGE_REQUESTS,
    STAGE_SECONDS,
    Counts,
    Kind,
    Metric,
    RequestRecord,
    Stage,
)
from support.descriptors import open_files
from support.metrics import configured, documented, queries

CPU = torch.device("cpu")


class Recorded:
    """A sink that adds up as the front end does."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.emitted: list[str] = []

    def __call__(self, metric: Metric, value: float, labels: Sequence[str]) -> None:
        assert len(labels) == len(metric.labels)
        key = (metric.name, *labels)
        self.values[key] = value + (self.values.get(key, 0) if metric.kind is Kind.COUNTER else 0)
        self.emitted.append(metric.name)

    def engine(self, metric: Metric) -> float:
        return self.values[metric.name, "model", "1.0", "cpu"]


def new_relay(sink: Recorded, device: torch.device = CPU) -> Relay:
    return Relay(sink, Counts(), ("model", "1.0"), device)


class EngineProcess:
    """A process to live and die, and the tally of an engine."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.pidfd = os.pidfd_open(self._process.pid)

    def hello(self, relay: Relay) -> None:
        relay.watch(os.dup(self.tally.descriptor), self.pidfd)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        os.close(self.pidfd)
        os.close(self.tally.descriptor)


@pytest.fixture
def engine() -> Iterator[EngineProcess]:
    process = EngineProcess()
    yield process
    process.close()


@pytest.fixture
def successor() -> Iterator[EngineProcess]:
    process = EngineProcess()
    yield process
    process.close()


def test_an_engines_totals_are_passed_on_once_by_one_of_its_workers(engine: EngineProcess) -> None:
    sinks = [Recorded() for _ in range(3)]
    relays = [new_relay(sink) for sink in sinks]
    for relay in relays:
        engine.hello(relay)
    for passes in (5, 12):
        engine.tally.total(Total.PASSES, passes)
        for relay in relays:
            relay.look()
    assert sinks[0].engine(PASSES) == 12
    assert not sinks[1].values
    assert not sinks[2].values


def test_another_worker_takes_over_where_a_dead_one_left(engine: EngineProcess) -> None:
    taker = TallyReader(os.dup(engine.tally.descriptor), os.dup(engine.pidfd))
    assert taker.become_relay()
    engine.tally.total(Total.PASSES, 7)
    assert taker.take()[Total.PASSES] == 7
    sink = Recorded()
    relay = new_relay(sink)
    engine.hello(relay)
    relay.look()
    assert not sink.values
    taker.close()  # as the kernel does it
    engine.tally.total(Total.PASSES, 9)
    relay.look()
    assert sink.engine(PASSES) == 2


def test_what_a_killed_engine_did_last_is_passed_on_and_its_levels_go_to_0(
    engine: EngineProcess, successor: EngineProcess
) -> None:
    sink = Recorded()
    relay = new_relay(sink)
    engine.hello(relay)
    engine.tally.total(Total.PASSES, 5)
    engine.tally.level(Level.CASES_IN_FLIGHT, 2)
    engine.tally.level(Level.PASSES_AHEAD, 30)
    engine.tally.level(Level.PASSES_REMAINING, 12)
    relay.look()
    assert [sink.engine(metric) for metric in (CASES_IN_FLIGHT, PASSES_WAITING, ENGINE_UP)] == [2, 42, 1]
    engine.tally.total(Total.PASSES, 8)
    engine.kill()
    relay.look()
    assert sink.engine(PASSES) == 8
    assert [sink.engine(metric) for metric in (CASES_IN_FLIGHT, PASSES_WAITING, ENGINE_UP)] == [0, 0, 0]
    successor.hello(relay)
    successor.tally.total(Total.PASSES, 3)
    relay.look()
    assert (sink.engine(PASSES), sink.engine(ENGINE_UP)) == (11, 1)


def test_an_engine_is_up_although_another_worker_says_last_that_the_one_before_is_gone(
    engine: EngineProcess, successor: EngineProcess
) -> None:
    page = Recorded()
    slow, quick = new_relay(page), new_relay(page)
    for relay in (slow, quick):
        engine.hello(relay)
        relay.look()
    engine.kill()
    successor.hello(quick)
    quick.look()
    assert page.engine(ENGINE_UP) == 1
    slow.look()
    assert page.engine(ENGINE_UP) == 0
    quick.look()
    assert page.engine(ENGINE_UP) == 1


def test_one_backend_runs_also_after_an_engine_that_ran_another(
    engine: EngineProcess, successor: EngineProcess
) -> None:
    sink = Recorded()
    relay = new_relay(sink)

    def running() -> set[str]:
        relay.look()
        found = {key[-1]: value for key, value in sink.values.items() if key[0] == ENGINE_BACKEND.name}
        assert len(found) == len(Backend)
        assert set(found.values()) <= {0, 1}
        return {name for name, value in found.items() if value}

    engine.hello(relay)
    assert running() == set()  # it has not said it
    engine.tally.runs(Backend.OPENVINO_INT8)
    assert running() == {"openvino_int8"}
    engine.kill()
    assert running() == set()
    successor.tally.runs(Backend.EAGER)
    successor.hello(relay)
    assert running() == {"eager"}


def test_the_same_engine_met_again_is_counted_once(engine: EngineProcess) -> None:
    sink = Recorded()
    relay = new_relay(sink)
    engine.tally.total(Total.BUSY_MICROSECONDS, 1_500_000)
    for _ in range(3):
        engine.hello(relay)
        relay.look()
    assert sink.engine(ENGINE_BUSY) == 1.5


def test_a_level_that_stays_is_not_said_again_and_again(engine: EngineProcess) -> None:
    sink = Recorded()
    relay = new_relay(sink)
    engine.hello(relay)
    for _ in range(3):
        relay.look()
    assert sink.emitted.count(ENGINE_UP.name) == 1


def test_nothing_is_held_after_an_engines_death(engine: EngineProcess) -> None:
    before = open_files(collected=True)
    relay = new_relay(Recorded())
    engine.hello(relay)
    relay.look()
    assert open_files() > before
    engine.kill()
    relay.look()
    assert open_files() == before


def test_a_tally_of_another_size_is_left_alone(engine: EngineProcess, caplog: pytest.LogCaptureFixture) -> None:
    _, descriptor = share((3,), torch.int64, "nnunet-other")
    relay = new_relay(Recorded())
    relay.watch(descriptor, engine.pidfd)
    relay.look()
    assert "the tally has another size" in caplog.text
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(descriptor)


def test_a_workers_counts_are_passed_on_with_its_model() -> None:
    sink, counts = Recorded(), Counts()
    relay = Relay(sink, counts, ("model", "1.0"), CPU)
    record = RequestRecord("id", "model/1.0", status=429, code="busy")
    record.clock.add(Stage.DECODE, 0.25)
    counts.add_request(record)
    counts.add_request(record)
    relay.turn()
    relay.turn()
    assert sink.values == {
        (REQUESTS.name, "model", "1.0", "429", "busy"): 2,
        (STAGE_SECONDS.name, "model", "1.0", "decode"): 0.5,
        (STAGE_REQUESTS.name, "model", "1.0", "decode"): 2,
    }


def test_every_code_that_an_alert_names_is_there_before_it_counts() -> None:
    sink = Recorded()
    relay = new_relay(sink)
    relay.introduce()
    relay.turn()
    alerts = (Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yaml").read_text()
    named = set(re.findall(r'[{ ]code="(\w+)"', alerts))
    assert len(named) >= 3
    assert named <= {key[-1] for key in sink.values if key[0] == REQUESTS.name}


def test_counters_are_there_before_they_count() -> None:
    sink = Recorded()
    relay = new_relay(sink)
    relay.introduce()
    relay.turn()
    assert set(sink.emitted) == {metric.name for metric in METRICS if metric.kind is Kind.COUNTER}
    assert set(sink.values.values()) == {0}


class RecordedCuda:
    """What ``torch.cuda`` said of an H100 with a model on it."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.asked = 0
        self._failure = failure

    def device_memory_used(self, device: torch.device) -> int:
        self.asked += 1
        if self._failure:
            raise self._failure
        return 3_221_225_472

    def utilization(self, device: torch.device) -> int:
        return 87


def test_a_gpus_memory_and_utilization() -> None:
    monitor = DeviceMonitor(torch.device("cuda:1"), RecordedCuda())
    assert monitor.read() == {DEVICE_MEMORY_USED: 3_221_225_472, DEVICE_UTILIZATION: 0.87}


def test_without_the_drivers_library_a_gpu_has_no_numbers_and_is_not_asked_again() -> None:
    cuda = RecordedCuda(ModuleNotFoundError("nvidia-ml-py does not seem to be installed"))
    monitor = DeviceMonitor(torch.device("cuda:0"), cuda)
    assert monitor.read() == monitor.read() == {}
    assert cuda.asked == 1


def test_a_gpus_numbers_are_labelled_with_the_device_alone(engine: EngineProcess) -> None:
    sink = Recorded()
    relay = new_relay(sink, torch.device("cuda:1"))
    relay._monitor = DeviceMonitor(torch.device("cuda:1"), RecordedCuda())
    engine.tally.level(Level.DEVICE_BYTES, 85_520_809_984)
    engine.hello(relay)
    relay.look()
    assert sink.values[DEVICE_MEMORY_TOTAL.name, "cuda1"] == 85_520_809_984
    assert sink.values[DEVICE_UTILIZATION.name, "cuda1"] == 0.87


@pytest.mark.parametrize(("value", "expected"), [("a,b:c|d\n", "a_b_c_d_"), ("", "_"), ("1.0+rc-2_x", "1.0+rc-2_x")])
def test_a_label_holds_nothing_that_torchserve_splits_at(value: str, expected: str) -> None:
    assert label(value) == expected


def test_torchserves_configuration_and_the_documentation_have_every_metric() -> None:
    assert configured() == {metric.name: (metric.kind, metric.labels) for metric in METRICS}
    model = {"model_name", "model_version"}
    assert documented() == {metric.name: set(metric.labels) - model for metric in METRICS}
    asked = " ".join(queries() + queries("promql-cuda"))
    assert [metric.name for metric in METRICS if metric.name not in asked] == []
