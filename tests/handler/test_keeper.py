"""A worker without a request sees that its engine is there, and greets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine import keeper
from nnunet_torchserve.engine.greeting import greets
from nnunet_torchserve.engine.keeper import Keeper
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from support.chaos import engine_processes, has_ended, wait_for

AT_ONCE_S, PATIENCE_S = 0.05, 60.0


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    runtime = tmp_path_factory.mktemp("keeper") / "run"
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(RUNTIME_DIR_VARIABLE, str(runtime))
        yield runtime
    for engine in engine_processes(runtime):
        engine.kill()


@pytest.fixture(scope="module")
def engine(unpacked: Callable[[str], Path], runtime: Path) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(ModelBundle(unpacked("flat")), torch.device("cpu"))
    yield engine
    engine.disconnect()


def process(runtime: Path) -> psutil.Process:
    """The one engine that lives."""
    [engine] = [each for each in engine_processes(runtime) if not has_ended(each)]
    return engine


def wait_for_another(keeping: Keeper, engine: RemoteEngine) -> None:
    """Look until an engine greets."""

    def looks() -> bool:
        keeping.look()
        return greets(engine.folder, PATIENCE_S)

    wait_for(looks)


def test_an_engine_that_died_while_nobody_asked_is_followed_by_another(engine: RemoteEngine, runtime: Path) -> None:
    first = process(runtime)
    assert engine.keep(), "there is nothing to do"
    assert process(runtime) == first
    assert greets(engine.folder, PATIENCE_S)
    first.kill()
    wait_for(lambda: has_ended(first))
    assert not greets(engine.folder, AT_ONCE_S)
    wait_for_another(Keeper(engine), engine)
    assert process(runtime) != first


def test_an_engine_that_does_not_greet_any_more_is_replaced(
    engine: RemoteEngine, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for(engine.keep)
    stopped = process(runtime)
    monkeypatch.setattr(keeper, "LISTEN_S", 0.0)
    monkeypatch.setattr(keeper, "SILENCE_S", PATIENCE_S)
    keeping = Keeper(engine)
    keeping.look()
    assert not has_ended(stopped), "it greets"
    stopped.suspend()
    monkeypatch.setattr(keeper, "SILENCE_S", AT_ONCE_S)
    assert not greets(engine.folder, AT_ONCE_S)
    keeping.look()
    assert not has_ended(stopped), "once may be the machine's fault"
    keeping.look()
    wait_for(lambda: has_ended(stopped))
    monkeypatch.setattr(keeper, "SILENCE_S", PATIENCE_S)
    wait_for_another(keeping, engine)
    assert process(runtime) != stopped


def test_an_engine_that_dies_soon_again_and_again_is_started_after_pauses_that_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each lives for a second; the first is followed at once, and one that lived long is again."""
    now, started = [1000.0], []

    class Dead:
        def is_over(self) -> bool:
            return True

        def close(self) -> None:
            pass

    class Starts:
        def link(self, _deadline: float) -> Dead:
            started.append(now[0])
            return Dead()

    engine = object.__new__(RemoteEngine)
    state = {"_starter": Starts(), "_lock": threading.RLock(), "_link": None, "_short_lives": 0}
    for name, value in (state | {"_linked": 0.0, "_not_kept_before": 0.0}).items():
        setattr(engine, name, value)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    while len(started) < 6:
        engine.keep()
        now[0] += 1.0
    assert [after - before for before, after in pairwise(started)] == [1, 3, 5, 9, 17]
    now[0] += 100.0
    engine.keep()
    assert started[-1] == now[0]


def test_nobody_greets_where_there_is_no_engine(tmp_path: Path) -> None:
    assert not greets(tmp_path, AT_ONCE_S)
    assert not greets(tmp_path / "nowhere", AT_ONCE_S)
