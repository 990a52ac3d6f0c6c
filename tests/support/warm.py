"""Engines that tests start, forked from a process that has imported PyTorch and nnU-Net.

A start takes some 7 s of a processor, and nearly all of it is importing them. Nothing else is spared: a forked engine
is a process of its own that goes through the same ``main``, and imports our own modules from where it would have.
Fresh interpreters are started by the servers of tests that run the command line, and where a test takes the fixture
``cold``.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from nnunet_torchserve.engine import starter
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE

from . import ask_fork_server, fork_server

_ENGINE = f"{fork_server.OURS}.engine.process"

_PYTHON = """\
#!/bin/bash
if [[ $1 == -m && $2 == {engine} ]]; then
    exec {real} -IS {ask} {socket} "$0" "$@"
fi
exec -a "$0" {real} "$@"
"""


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Instead of ``starter.run``: an interpreter is not started but forked."""
    ask_fork_server.ask(str(_fork_server()), list(command), dict(environment))


@cache
def python() -> Path:
    """The Python of a virtual environment like this one, which hands engines to the fork server.

    For servers: their workers start engines with the interpreter that runs them.
    """
    folder = _folder()
    (folder / "bin").mkdir()
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "pyvenv.cfg").write_bytes((Path(sys.prefix) / "pyvenv.cfg").read_bytes())
    real, ask = Path(sys.executable).resolve(), ask_fork_server.__file__
    script = folder / "bin" / "python"
    script.write_text(_PYTHON.format(engine=_ENGINE, real=real, ask=ask, socket=_fork_server()))
    script.chmod(0o755)
    return script


@cache
def _fork_server() -> Path:
    """Its socket; it ends with this process, which holds the other end of its standard input."""
    path = _folder() / "socket"
    command = [sys.executable, "-m", "support.fork_server"]
    environment = os.environ | starter.MALLOC | {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop(RUNTIME_DIR_VARIABLE, None)  # each engine has its own; this process belongs to none
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        command.append(str(listener.fileno()))
        server = subprocess.Popen(  # with MALLOC, which counts when a process starts
            command, env=environment, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
        )
    atexit.register(server.communicate)
    return path


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
