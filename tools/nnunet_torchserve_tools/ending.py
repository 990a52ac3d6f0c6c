"""End a server at once, and notice that one has ended. What it had in hand is lost: :mod:`.stopping` comes before."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

import psutil

from .errors import ToolError
from .server import STATE_FILE, read_state, runs
from .tokens import key_file

STOPPING_FILE = "stopping"
"""Tells a ``serve`` in the foreground that its server ended on purpose."""

STOP_TIMEOUT_S = 60
_KILLED_S = 5.0
_POLL_S = 0.02


def stop(state_dir: Path, timeout_s: float = STOP_TIMEOUT_S) -> bool:
    """Stop the server of a state directory and remove its temporary files.

    Returns:
        Whether one was running.

    Raises:
        ToolError: it did not end in time.
    """
    server = read_state(state_dir)
    if server is None:
        return False
    with suppress(OSError):  # a full or read-only disk keeps nobody's server running
        (state_dir / STOPPING_FILE).touch()
    process = server.process()
    if process is not None:
        family = [process]
        with suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
            process.terminate()
        for leftover in _still_there(family, timeout_s):
            with suppress(psutil.NoSuchProcess):
                leftover.kill()
        if _still_there(family, _KILLED_S):
            msg = f"TorchServe (process {process.pid}) did not end"
            raise ToolError(msg)
    for folder in (server.temp_dir, *server.made):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (key_file(Path(server.control_dir)), state_dir / STATE_FILE):
        with suppress(OSError):  # it names a process that is gone
            file.unlink(missing_ok=True)
    return process is not None


def _still_there(family: list[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Those that have not ended after so many seconds; a zombie, which its parent has to reap, has."""
    deadline = time.monotonic() + within_s
    while (alive := [process for process in family if runs(process)]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return alive


def was_stopped(state_dir: Path) -> bool:
    """Whether the server of a state directory ended on purpose."""
    return (state_dir / STOPPING_FILE).exists()
