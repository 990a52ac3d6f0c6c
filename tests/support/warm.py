"""Engines, workers and other programs that tests start, forked from a process that has imported PyTorch and nnU-Net.

A start takes some 5 s of a processor, and nearly all of it is importing them. Nothing else is spared: what is forked
is a process of its own that runs the same program, and imports our own modules from where it would have
(:mod:`.fork_server`). Fresh interpreters are started by tests that run the command line, by tests/chaos, whose faults
are about processes and their parents, and where a test takes the fixture ``cold``.

The fork servers belong to the whole run: the first process of it that needs one starts it.
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
from functools import cache, partial
from pathlib import Path

from nnunet_torchserve.engine import starter
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE

from . import ask_fork_server
from .fork_server import ENGINES, OURS, PROGRAMS
from .once import once

_PYTHON = """\
#!/bin/bash
ask() {{
    exec {real} -IS {ask} "$@"
}}
case "$1 $2" in
    {cases}
esac
exec -a "$0" {real} "$@"
"""
_FORKED, _FRESH = '{pattern}) ask {socket} "$0" "$@" ;;', "{pattern}) ;;"
_AN_ENGINE, _A_WORKER, _ANYTHING = f'"-m {OURS}.engine.process"', '*"/ts/model_service_worker.py --"*', "*"

_run_folders: list[Path] = []


def share(folder: Path) -> None:
    """Where the processes of a run find its fork servers."""
    _run_folders.append(folder)


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Instead of ``starter.run``: an engine's interpreter is not started but forked."""
    with Path(os.devnull).open("r+b") as nowhere:
        streams = (nowhere.fileno(), nowhere.fileno(), nowhere.fileno())
        ask_fork_server.ask(str(_fork_server(ENGINES)), list(command), dict(environment), "/", streams)


@cache
def python() -> Path:
    """The Python of a virtual environment like this one, whose engines are forked.

    For servers: their workers start engines with the interpreter that runs them.
    """
    return _interpreter({_AN_ENGINE: ENGINES})


@cache
def python_of_workers() -> Path:
    """The same; TorchServe's workers are forked too."""
    return _interpreter({_AN_ENGINE: ENGINES, _A_WORKER: PROGRAMS})


@cache
def python_of_programs() -> Path:
    """Another one, whose programs are forked, ``-c CODE``, ``-m MODULE`` or a file, and their engines are not."""
    return _interpreter({_AN_ENGINE: None, _ANYTHING: PROGRAMS})


def _interpreter(kinds: Mapping[str, str | None]) -> Path:
    folder = _folder()
    (folder / "bin").mkdir()
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "pyvenv.cfg").write_bytes((Path(sys.prefix) / "pyvenv.cfg").read_bytes())
    real, ask = Path(sys.executable).resolve(), ask_fork_server.__file__
    cases = [
        (_FORKED if kind else _FRESH).format(pattern=pattern, socket=kind and _fork_server(kind))
        for pattern, kind in kinds.items()
    ]
    script = folder / "bin" / "python"
    script.write_text(_PYTHON.format(real=real, ask=ask, cases="\n    ".join(cases)))
    script.chmod(0o755)
    return script


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _fork_server(kind: str) -> Path:
    """Its socket."""
    [run_folder] = _run_folders
    known = run_folder / f"{kind}.socket"
    once(known.with_suffix(".started"), partial(_start, kind, known))
    return Path(known.read_text())


def _start(kind: str, known: Path) -> None:
    """Start one that ends with the run, and takes the folder of its socket away then."""
    path = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"  # a short name: a run's folder may have a long one
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    if kind == ENGINES:
        environment |= starter.MALLOC  # which counts when a process starts
    environment.pop(RUNTIME_DIR_VARIABLE, None)  # each engine has its own; this process belongs to none
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        command = [sys.executable, "-P", "-m", "support.fork_server", kind, str(listener.fileno()), str(owner)]
        subprocess.run(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            check=True,
        )
    known.write_text(str(path))
