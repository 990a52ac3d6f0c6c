"""The systemd unit of deploy/systemd: systemd's own opinion of it, and that it fits the command.

No test starts it: that needs a machine that systemd has booted. What it does to a server (a user without a name, a
read-only root, no capabilities, SIGTERM to one process) is run without it, in tests/serve.
"""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.charts import DEPLOY

UNIT = DEPLOY / "systemd" / "nnunet-torchserve.service"
PROGRAM = "/opt/nnunet-torchserve/bin/nnunet-torchserve"
MOST_EXPOSED = 40
"""Tenths, of 100; an ordinary service has 96."""


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    unit = configparser.RawConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text())
    return unit["Service"]


@pytest.fixture(scope="module")
def parsed(service: configparser.SectionProxy) -> dict[str, Any]:
    """What the command understands."""
    program, verb, *arguments = shlex.split(service["ExecStart"])
    assert program == PROGRAM
    command = typer.main.get_command(app)
    params: dict[str, Any] = command.commands[verb].make_context(verb, arguments).params  # type: ignore[attr-defined]
    return params


def analyze(verb: str, *arguments: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What systemd-analyze says of a unit whose program is there."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed: Debian's systemd has it")
    file = folder / UNIT.name
    file.write_text(text.replace(PROGRAM, "/bin/true"))
    command = [program, verb, *arguments, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    done = analyze("verify", "--man=no", text=UNIT.read_text(), folder=tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_line_that_systemd_does_not_understand_would_be_noticed(tmp_path: Path) -> None:
    done = analyze("verify", "--man=no", text=UNIT.read_text().replace("KillMode", "KilMode"), folder=tmp_path)
    assert "KilMode" in done.stderr


def test_it_is_held_tightly(tmp_path: Path) -> None:
    arguments = ["--offline=true", "--no-pager", f"--threshold={MOST_EXPOSED}"]
    done = analyze("security", *arguments, text=UNIT.read_text(), folder=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_its_command_is_one_and_writes_where_it_may(service: configparser.SectionProxy, parsed: dict[str, Any]) -> None:
    assert parsed["foreground"] is True
    state = Path("/var/lib", service["StateDirectory"])
    assert parsed["state_dir"].parent == state == Path(service["WorkingDirectory"])
    environment = dict(each.split("=", 1) for each in shlex.split(service["Environment"]))
    assert Path(environment["NNUNET_TORCHSERVE_RUNTIME_DIR"]).parent == Path("/run", service["RuntimeDirectory"])


def test_a_stop_has_the_time_that_it_may_take_and_one_process_is_told(
    service: configparser.SectionProxy, parsed: dict[str, Any]
) -> None:
    assert parsed["grace"] is None, "the longest response timeout"
    assert int(service["TimeoutStopSec"]) >= ServingSettings().response_timeout_s + 30
    assert service["KillMode"] == "mixed"
    assert "KillSignal" not in service


def test_gpus_stay_within_reach(service: configparser.SectionProxy) -> None:
    """One device that is allowed shuts all others out, and before systemd 253 ``ProtectClock`` allows one."""
    assert not {"PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow"} & set(service)


def test_one_process_that_is_killed_for_its_memory_stops_no_other(service: configparser.SectionProxy) -> None:
    """systemd's default stops the service; the server replaces an engine or a worker itself (tests/chaos)."""
    assert service["OOMPolicy"] == "continue"


def test_what_a_restart_cannot_mend_is_not_restarted(service: configparser.SectionProxy) -> None:
    """The exit codes of docs/operations.md: wrong usage, and a stop that somebody asked for."""
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "3"]
