"""A stop that is given no time, and one that somebody else asks for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve_tools import launcher
from support.chaos import Case, ChaosServer, engines, wait_for
from support.foreground import Foreground, foreground

pytestmark = [pytest.mark.serve, pytest.mark.long]  # test_foreground.py has a stop that has its time

Start = Callable[..., AbstractContextManager[tuple[Foreground, ChaosServer]]]

SLOW = Case((40, 44, 12))
"""It can be held."""


@pytest.fixture
def started(archive_of: Callable[[str], Path], unpacked: Callable[[str], Path], tmp_path: Path) -> Start:
    @contextmanager
    def start(*arguments: str) -> Iterator[tuple[Foreground, ChaosServer]]:
        faults = [SLOW.held(ModelBundle(unpacked("flat")).lead, tmp_path)]
        store = archive_of("flat").parent
        with foreground(store, tmp_path, "--models", "flat.mar", "--workers", "1", *arguments, faults=faults) as serve:
            serve.wait_until_ready()
            yield serve, serve.chaos()

    return start


@pytest.mark.parametrize("how", ["the grace is over", "a second signal"])
def test_what_a_stop_does_not_wait_for_is_said_and_ends_with_3(how: str, started: Start) -> None:
    grace = ["--grace", "0.5"] if how == "the grace is over" else []
    with started(*grace) as (serve, chaos), ThreadPoolExecutor(1) as pool, chaos.held():
        case = pool.submit(chaos.live.predict, "flat", SLOW.body, options=SLOW.options)
        wait_for(lambda: engines(chaos.runtime)[0].cases == 1)
        serve.signal()
        if how == "a second signal":
            wait_for(lambda: serve.says("ready", "stopping"))
            serve.signal()
        code, said = serve.end()
        assert code == 3, said
        assert "the server was ended although there was a request of flat/1.0 with worker" in said
        if how == "the grace is over":
            assert case.result().status_code in (500, 507)
            assert case.result().json()["message"] == "Worker died."
        else:
            assert isinstance(case.exception(), httpx.TransportError)
        assert launcher.read_state(serve.state_dir) is None


def test_stop_waits_as_a_signal_does_and_both_processes_end_with_0(started: Start) -> None:
    with started() as (serve, chaos), ThreadPoolExecutor(1) as pool:
        command = [sys.executable, "-m", "nnunet_torchserve_tools.cli", "stop", "--state-dir", str(serve.state_dir)]
        with chaos.held():
            case = pool.submit(chaos.live.predict, "flat", SLOW.body, options=SLOW.options)
            wait_for(lambda: engines(chaos.runtime)[0].cases == 1)
            stop = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            wait_for(lambda: serve.says("ready", "draining"))
            assert not case.done()
        out, said = stop.communicate(timeout=600)
        assert (stop.returncode, out) == (0, "stopped\n"), said
        assert case.result().status_code == 200
        assert serve.end()[0] == 0
