"""A device whose engine cannot be started again: who waits, who tries, and what ends it."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine import folder, outage, starter, switchboard
from nnunet_torchserve.engine.faults import Entry, Fault, Faults, Hold, Kind, LoadFails, StandIn, stand_in_device
from nnunet_torchserve.engine.outage import FIRST_PAUSE_S, LONGEST_PAUSE_S, Outage, pause_s
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.environment import FAULTS_VARIABLE, RUNTIME_DIR_VARIABLE, TESTING_VARIABLE
from nnunet_torchserve.errors import BundleError, CaseFailed, NoEngine
from support.chaos import engine_processes, has_ended, wait_for

CPU = torch.device("cpu")
PLAIN = Settings(member="3d_fullres", folds=(0,), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
HOLD_BACK_S = 0.3
PAUSE_S = 1.0
SOON_S = 30.0
"""Far less than the limits that a refusal could have waited for, and much for a slow machine."""

FAILED = "the engine cannot serve"


# -- the note ---------------------------------------------------------------------------------------------------------


def test_the_pause_doubles_up_to_its_limit() -> None:
    pauses = [pause_s(failures) for failures in range(1, 12)]
    assert pauses[0] == FIRST_PAUSE_S == 5
    assert all(later == min(2 * earlier, LONGEST_PAUSE_S) for earlier, later in itertools.pairwise(pauses))
    assert pauses[-1] == LONGEST_PAUSE_S == 300


def test_nobody_tries_until_the_pause_has_passed_and_then_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", LONGEST_PAUSE_S)
    mine, yours = Outage(tmp_path), Outage(tmp_path)
    with mine.claim() as may_i, yours.claim() as may_you:
        assert (may_i, may_you) == (True, True)  # no outage: whoever needs an engine looks for one
    mine.fail()
    with yours.claim() as may_you:
        assert not may_you
    pass_the_pause(tmp_path)
    with mine.claim() as may_i:
        assert may_i
        with yours.claim() as may_you:
            assert not may_you
        mine.fail()
        with yours.claim() as may_you:
            assert not may_you
    pass_the_pause(tmp_path)
    with yours.claim() as may_you:
        assert may_you
        yours.end(0.0)
    assert mine.read() is None


def test_one_engine_that_fails_is_one_failure_whoever_saw_it(tmp_path: Path) -> None:
    mine, yours = Outage(tmp_path), Outage(tmp_path)
    mine.note_start()
    assert mine.fail() == yours.fail() == mine.read()
    yours.note_start()
    began = time.monotonic()
    again = yours.fail()
    assert again.failures == 2
    assert began + 10 <= again.until <= time.monotonic() + 10
    left = mine.retry_after_s()
    assert again.until - time.monotonic() <= left <= 10


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"failures": 1, "until": 1e12, "started": 0}'])
def test_a_damaged_note_and_one_from_before_a_restart_of_the_machine_count_for_nothing(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "outage").write_text(text)
    (tmp_path / "started").write_text("1e12")
    assert Outage(tmp_path).read() is None
    assert Outage(tmp_path).started() == 0.0


def test_without_its_directory_there_is_no_outage(tmp_path: Path) -> None:
    gone = Outage(tmp_path / "gone")
    gone.fail()
    gone.end(0.0)
    with gone.claim() as may_i:
        assert may_i


# -- limits and faults ------------------------------------------------------------------------------------------------


def test_a_gpu_counts_as_hung_sooner_than_a_cpu() -> None:
    assert [switchboard.busy_limit_s(device) for device in ("cpu", "cpu:1", "cuda:0", "xpu:0")] == [300, 300, 60, 300]


def test_faults_are_ordered_for_a_device_or_for_all() -> None:
    raises = Fault(kind=Kind.RAISE, shape=(1, 2, 3, 4))
    entries = [StandIn(devices=2, busy_limit_s=7), LoadFails(device="cpu:1"), raises]
    environ = {FAULTS_VARIABLE: json.dumps([each.model_dump(mode="json") for each in entries])}
    stand_ins = [stand_in_device(number, environ) for number in range(3)]
    assert stand_ins == [torch.device("cpu", 0), torch.device("cpu", 1), None]
    assert stand_in_device(0, {}) is None
    for device in ("cpu:0", "cpu:1"):
        faults = Faults.from_environment(device, environ)
        assert faults.busy_limit_s == 7
        faults.before_load(follows_a_death=False)
        with pytest.raises(RuntimeError):
            faults.before_pass([(1, 2, 3, 4)])
    Faults.from_environment("cpu:0", environ).before_load(follows_a_death=True)
    with pytest.raises(RuntimeError):
        Faults.from_environment("cpu:1", environ).before_load(follows_a_death=True)


def test_a_pass_is_held_while_there_is_a_file_but_no_longer_than_it_may(tmp_path: Path) -> None:
    file = tmp_path / "hold"
    faults = Faults([Hold(shape=(1, 2, 3, 4), pass_s=0.1, while_exists=file)])

    def seconds(shape: tuple[int, ...]) -> float:
        began = time.monotonic()
        faults.before_pass([shape])
        return time.monotonic() - began

    file.touch()
    assert seconds((1, 2, 3, 4)) >= 0.1
    for_ever = Faults([Hold(shape=(1, 2, 3, 4), pass_s=3600, while_exists=file)])
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(for_ever.before_pass, [(1, 2, 3, 4)])
        for_ever.before_pass([(9, 9, 9, 9)])
        assert not held.done()
        file.unlink()
        held.result(300)


# -- with an engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(unpacked: Callable[[str], Path]) -> ModelBundle:
    return ModelBundle(unpacked("five_folds"))


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with short pauses; its engines are gone in the end."""
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "run"))
    monkeypatch.setattr(starter, "HOLD_BACK_S", HOLD_BACK_S)
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", PAUSE_S)
    yield tmp_path / "run"
    for engine in engine_processes(tmp_path / "run"):
        engine.kill()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """While there is this file, engines that are ordered to do not load."""
    file = tmp_path / "broken"
    file.touch()
    return file


def order(monkeypatch: pytest.MonkeyPatch, *faults: Entry) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, json.dumps([fault.model_dump(mode="json") for fault in faults]))
    monkeypatch.setenv(TESTING_VARIABLE, "1")


@pytest.fixture
def connect(bundle: ModelBundle, runtime: Path) -> Iterator[Callable[..., RemoteEngine]]:
    made: list[RemoteEngine] = []

    def make(device: torch.device = CPU) -> RemoteEngine:
        made.append(RemoteEngine(bundle, device))
        return made[-1]

    yield make
    for engine in made:
        engine.disconnect()


def volume(size: int = 20) -> torch.Tensor:
    return torch.randn((1, size, size, size), generator=torch.Generator().manual_seed(size))


def kill_engine(runtime: Path) -> None:
    [running] = engine_processes(runtime)
    running.kill()
    wait_for(lambda: has_ended(running))


def let_somebody_try(engine: Path) -> None:
    """The pause of an outage is over, and so is the engine that could not serve."""
    wait_for(lambda: not engine_processes(engine.parent))
    pass_the_pause(engine)


def pass_the_pause(engine: Path) -> None:
    due = json.loads((engine / "outage").read_text()) | {"until": time.monotonic()}
    (engine / "outage").write_text(json.dumps(due))


def refusal(engine: RemoteEngine, deadline: float | None = None) -> tuple[NoEngine, float]:
    """How a request is refused, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(NoEngine) as refused:
        engine.predict(volume(), PLAIN, deadline)
    return refused.value, time.monotonic() - began


def test_an_outage_is_tried_by_one_worker_a_pause_and_ends_with_an_engine(
    runtime: Path, connect: Callable[..., RemoteEngine], broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(monkeypatch, LoadFails(while_exists=broken))
    workers = [connect() for _ in range(3)]
    expected = workers[0].predict(volume(), PLAIN).logits
    kill_engine(runtime)
    [log] = runtime.glob(f"*/{folder.LOG}")
    note = Outage(log.parent)
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 100.0)
    with ThreadPoolExecutor() as pool:  # the first engine after the death is everybody's
        first = [each.result()[0] for each in [pool.submit(refusal, worker) for worker in workers]]
    assert log.read_text().count(FAILED) == 1
    assert all(50 < (error.retry_after_s or 0) <= 100 for error in first)

    again, seconds = refusal(workers[0])
    assert "on cpu cannot be started for now" in str(again)
    assert HOLD_BACK_S <= seconds < SOON_S
    assert 0 < (again.retry_after_s or 0) <= 100
    monkeypatch.setattr(starter, "HOLD_BACK_S", 60.0)
    _, seconds = refusal(workers[0], time.monotonic() + 0.2)
    assert seconds < SOON_S
    monkeypatch.setattr(starter, "HOLD_BACK_S", HOLD_BACK_S)
    assert log.read_text().count(FAILED) == 1

    let_somebody_try(log.parent)
    with ThreadPoolExecutor() as pool:
        second = [each.result()[0] for each in [pool.submit(refusal, worker) for worker in workers]]
    assert log.read_text().count(FAILED) == 2
    assert max(error.retry_after_s or 0 for error in second) > 100
    left = note.read()
    assert left is not None
    assert left.failures == 2

    broken.unlink()
    let_somebody_try(log.parent)
    assert torch.equal(workers[1].predict(volume(), PLAIN).logits, expected)
    assert note.read() is None
    assert all(torch.equal(worker.predict(volume(), PLAIN).logits, expected) for worker in workers)
    assert len(engine_processes(runtime)) == 1


@pytest.mark.long
def test_a_worker_that_loads_tries_whatever_is_noted(
    runtime: Path, connect: Callable[..., RemoteEngine], broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr(starter, "HOLD_BACK_S", 60.0)
    order(monkeypatch, LoadFails(while_exists=broken))
    worker = connect()
    kill_engine(runtime)
    refusal(worker)
    with pytest.raises(BundleError, match="ordered by a test"):
        connect()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(worker.predict, volume(), PLAIN)  # held back, as the note stands
        broken.unlink()
        wait_for(lambda: not engine_processes(runtime))  # the one that could not serve says so for a moment
        loaded = connect()
        assert torch.equal(waiting.result().logits, loaded.predict(volume(), PLAIN).logits)


@pytest.mark.long
def test_engines_that_die_while_they_load_are_no_endless_wait(
    runtime: Path, connect: Callable[..., RemoteEngine], broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order(monkeypatch, LoadFails(while_exists=broken, dies=True))
    worker = connect()
    kill_engine(runtime)
    refused, seconds = refusal(worker)
    assert (refused.retry_after_s or 0) <= PAUSE_S
    assert seconds < 60
    broken.unlink()
    [note] = map(Outage, runtime.iterdir())
    wait_for(lambda: not note.stands())
    worker.predict(volume(), PLAIN)


@pytest.mark.long  # one that hangs and dies when it is killed is below
def test_an_engine_that_was_killed_and_does_not_die_is_an_outage(
    runtime: Path, connect: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still holds the lock of its life, as one that is stuck in a driver does."""
    monkeypatch.setattr(starter, "HELLO_LIMIT_S", 1.0)
    worker = connect()
    [alive] = runtime.glob(f"*/{folder.ALIVE}")
    assert worker._starter._limit(1000.0) == 1001  # for one that has loaded
    kill_engine(runtime)
    held = os.open(alive, os.O_RDWR)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        _, seconds = refusal(worker)
        assert 1 <= seconds < SOON_S
        assert engine_processes(runtime) == []
        _, seconds = refusal(worker)
        assert seconds < SOON_S
    finally:
        os.close(held)
    wait_for(lambda: not Outage(alive.parent).stands())
    worker.predict(volume(), PLAIN)


def test_an_engine_that_hangs_while_it_loads_is_given_one_limit_and_not_one_a_request(
    runtime: Path, connect: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "CONNECT_LIMIT_S", 50.0)
    worker = connect()
    [own] = runtime.iterdir()
    now = time.monotonic()
    assert worker._starter._limit(now) == now + starter.HELLO_LIMIT_S
    Outage(own).note_start()
    started = Outage(own).started()
    assert worker._starter._limit(now - 45) == worker._starter._limit(now) == started + 50
    assert worker._starter._limit(started + 15) == started + 50
    assert worker._starter._limit(started + 45) == started + 45 + starter.HELLO_LIMIT_S
    (own / "started").unlink()
    assert worker._starter._limit(now) == now + 50  # nobody knows when it was started


def test_a_pass_that_never_ends_costs_one_devices_engine_and_its_case(
    runtime: Path, connect: Callable[..., RemoteEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is that engine's alone: on a machine that does much else an ordinary pass may take as long."""
    order(monkeypatch, StandIn(devices=2))
    healthy = connect(torch.device("cpu", 0))
    hangs = Fault(kind=Kind.HANG, shape=(1, 21, 21, 21), device="cpu:1")
    order(monkeypatch, StandIn(devices=2, busy_limit_s=3.0), hangs)
    sick = connect(torch.device("cpu", 1))
    before = set(engine_processes(runtime))
    assert len(before) == 2
    assert healthy.predict(volume(21), PLAIN).logits.isfinite().all()
    with pytest.raises(CaseFailed, match="died 2 times"):
        sick.predict(volume(21), PLAIN)
    assert torch.equal(sick.predict(volume(), PLAIN).logits, healthy.predict(volume(), PLAIN).logits)
    wait_for(lambda: len(engine_processes(runtime)) == 2)
    assert len(before & set(engine_processes(runtime))) == 1
