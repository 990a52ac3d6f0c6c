"""A server that is killed and started again while its clients go on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nnunet_torchserve_client import Case, Client, Event
from nnunet_torchserve_tools import launcher
from support import chaos
from support.ports import free_ports

pytestmark = [pytest.mark.serve, pytest.mark.long]

CASES = 30
OPTIONS = {"use_mirroring": False, "folds": [0]}


@pytest.mark.parametrize("archive", ["five_folds"])
def test_a_server_that_is_killed_and_started_again_loses_nothing(
    archive: str, model_store: Path, tmp_path: Path
) -> None:
    sizes = np.random.default_rng(0).integers(24, 60, (CASES, 3))
    shapes = [(int(x), int(y), int(z)) for x, y, z in sizes]
    bodies = [chaos.Case(shape, seed).body for seed, shape in enumerate(shapes)]
    cases = [Case(f"case {number}", body) for number, body in enumerate(bodies)]
    request = launcher.ServeRequest(
        model_store,
        [f"{archive}.mar"],
        tmp_path / "state",
        free_ports(),
        device=launcher.DeviceKind.CPU,
        workers=2,
        heap=1024**3,
    )
    server = launcher.start(request)
    again: list[Future[launcher.Server]] = []

    def has_started(_: Event) -> None:
        if again and again[0].done():
            again[0].result()

    try:
        with Client(server.inference_url, archive) as client, ThreadPoolExecutor(1) as pool:
            before = [outcome.value for outcome in client.predict_many(cases, OPTIONS)]
            outcomes = []
            for seen, outcome in enumerate(client.predict_many(cases, OPTIONS, ordered=False, on_event=has_started), 1):
                outcomes.append(outcome)
                if seen == CASES // 3:
                    kill(server)
                    again.append(pool.submit(launcher.start, request))
        outcomes.sort(key=lambda outcome: outcome.index)
        assert not [outcome.error for outcome in outcomes if outcome.error]
        assert [each.value and each.value.content for each in outcomes] == [each and each.content for each in before]
        assert max(outcome.answer.tries for outcome in outcomes if outcome.answer) > 1
    finally:
        launcher.stop(tmp_path / "state")


def kill(server: launcher.Server) -> None:
    """All of it, workers and engine too, as when the machine loses its power."""
    jvm = server.process()
    assert jvm is not None
    family = [*jvm.children(recursive=True), jvm]
    for process in family:
        process.kill()
    chaos.wait_for(lambda: all(chaos.has_ended(process) for process in family))
