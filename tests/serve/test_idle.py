"""A served model that nobody asks: its networks leave the memory, and are back for the next request."""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve_tools.cli import app
from support.bad_requests import FAST, GOOD
from support.chaos import ChaosServer, wait_for
from support.metrics import scrape
from support.server import running

pytestmark = pytest.mark.serve


@pytest.mark.long  # tests/handler/test_idle_engine.py has it without a server
def test_an_idle_model_is_unloaded_and_answers_as_before(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["archive", str(models["flat"]), "--name", "flat", "--output", str(tmp_path), "--unload-after", "0.005"]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    monkeypatch.setenv(RUNTIME_DIR_VARIABLE, str(tmp_path / "engines"))
    with running(tmp_path, tmp_path / "state") as live:
        engine = ChaosServer(live, tmp_path / "engines").engine("flat/1.0")

        def counted() -> tuple[int, int]:
            """Unloads and loads on demand that the engine's log has."""
            return engine.log.count("networks unloaded"), engine.log.count("networks loaded again")

        def is_unloaded() -> bool:
            unloads, reloads = counted()
            return unloads == reloads + 1

        def ask() -> bytes:
            answer = live.predict("flat", GOOD, options=FAST)
            assert answer.status_code == HTTPStatus.OK, answer.text
            return answer.content

        def relayed() -> tuple[float, ...]:
            seen = scrape(live.server.metrics_url)
            names = ("unloads_total", "reloads_total", "loaded", "up")
            return tuple(seen.value(f"nnunet_engine_{name}") for name in names)

        first = ask()
        wait_for(is_unloaded)
        _, reloads = counted()
        assert ask() == first
        wait_for(is_unloaded)
        assert counted() == (reloads + 2, reloads + 1)
        wait_for(lambda: relayed() == (*counted(), 0, 1))
        assert 0 < scrape(live.server.metrics_url).value("nnunet_engine_reload_seconds_total") < 60
