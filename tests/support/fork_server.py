"""The process that programs of tests are forked from: it has imported what is not ours, and forks when it is asked to.

``python -P -m support.fork_server KIND LISTENER OWNER`` returns at once; what it has forked answers on the socket
``LISTENER`` (a descriptor) until the process ``OWNER`` has ended, and takes the socket's folder away then. A request
is a line of JSON, with the descriptors of its standard streams, from a process that waits in the program's place:
:mod:`.ask_fork_server`. The answer is a line too, with the program's exit status. Our own modules and TorchServe's are
imported after the fork, from where a fresh interpreter would have found them.

There are two kinds: ``engines``, which have the settings of memory that a worker starts its engine with, and
``programs``. What differs from a fresh interpreter: the parent, which is this process (``os.getppid`` tells of the
waiting one's), and ``/proc/<pid>/environ``; the runtime directory of engines stands in front of the command line.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import logging
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE

OURS = "nnunet_torchserve"
ENGINES, PROGRAMS = "engines", "programs"

_PRELOADED = {
    ENGINES: (
        f"{OURS}.engine.switchboard",
        f"{OURS}.engine.network",
        "nnunetv2.training.nnUNetTrainer.nnUNetTrainer",
        "setproctitle",
    ),
    PROGRAMS: (
        f"{OURS}.engine.keeper",
        f"{OURS}.engine.local",
        f"{OURS}.pipeline",
        f"{OURS}.relay",
        "ts.model_service_worker",
        "setproctitle",
    ),
}
_IMPORTED_ANEW = (OURS, "support", "ts")
_PR_SET_PDEATHSIG = 1
_STREAMS = 3
_LINE_BYTES = 2**20


def preload(kind: str) -> None:
    """Import all that such a program imports, and forget our own part of it."""
    gc.disable()
    for name in _PRELOADED[kind]:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in _IMPORTED_ANEW]:
        del sys.modules[name]
    own = os.environ.pop("PYTHONPATH").split(os.pathsep)
    sys.path[:] = [entry for entry in sys.path if entry not in own]
    logging.root.handlers.clear()
    gc.collect()
    gc.freeze()  # what is never looked through stays shared with the parent


class Server:
    """Forks, and tells those who wait how their programs ended. One thread."""

    def __init__(self, kind: str, listener: socket.socket, owner: int) -> None:
        self._kind, self._listener = kind, listener
        self._selector = selectors.DefaultSelector()
        self._owner = os.pidfd_open(owner)
        self._ended = False

    def run(self) -> None:
        """Until the owner has ended."""
        preload(self._kind)
        self._selector.register(self._listener, selectors.EVENT_READ, self._fork)
        self._selector.register(self._owner, selectors.EVENT_READ, self._end)
        while not self._ended:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is key:  # what came before may have been the end of it
                    key.data()

    def _end(self) -> None:
        self._ended = True

    def _fork(self) -> None:
        connection, _ = self._listener.accept()
        line, streams, *_ = socket.recv_fds(connection, _LINE_BYTES, _STREAMS)
        while line and not line.endswith(b"\n"):
            line += connection.recv(_LINE_BYTES)
        if not line:
            connection.close()
            return
        request = json.loads(line)
        place = _peer(connection)
        child = os.fork()
        if child == 0:
            _become(**request, streams=streams, place=place)
        for stream in streams:
            os.close(stream)
        process = os.pidfd_open(child)
        ended = partial(self._tell, connection, process, child)
        self._selector.register(process, selectors.EVENT_READ, ended)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, connection, process))

    def _hear(self, connection: socket.socket, process: int) -> None:
        """A signal for the program, or the end of who waits for it, which is its end too."""
        numbers = connection.recv(1)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, numbers[0] if numbers else signal.SIGKILL)
        if not numbers:
            self._selector.unregister(connection)

    def _tell(self, connection: socket.socket, process: int, child: int) -> None:
        """The program has ended."""
        self._selector.unregister(process)
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        os.close(process)
        _, status = os.waitpid(child, 0)
        with suppress(OSError), connection:
            connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _peer(connection: socket.socket) -> int:
    """The process at the other end."""
    process, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(process)


def _become(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int], place: int) -> NoReturn:
    """The program, from its command to its end."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _take_place(arguments, environment, folder, streams, place)
        status = _status_of(_program(arguments))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(status)


def _take_place(arguments: list[str], environment: dict[str, str], folder: str, streams: list[int], place: int) -> None:
    """What an interpreter has from the process that started it."""
    from setproctitle import setproctitle

    words = [f"{RUNTIME_DIR_VARIABLE}={environment.get(RUNTIME_DIR_VARIABLE)}", *arguments]
    setproctitle(" ".join(words))  # while its environment is where it was: it finds its title beside it
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(_STREAMS, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    vars(os)["getppid"] = partial(_parent, place)
    sys.executable, sys.argv = arguments[0], arguments[1:]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    gc.enable()


def _parent(process: int) -> int:
    """A process's parent, 0 if it is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _program(arguments: list[str]) -> Callable[[], object]:
    """What an interpreter does with its arguments: ``-c CODE``, ``-m MODULE`` or a file."""
    match arguments[1:]:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path.insert(0, "")
            names: dict[str, Any] = {"__name__": "__main__"}
            return partial(exec, compile(code, "<string>", "exec"), names)
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            sys.path.insert(0, str(Path.cwd()))
            return partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
        case [file, *_]:
            sys.path.insert(0, str(Path(file).parent))
            return partial(runpy.run_path, file, run_name="__main__")
        case _:
            msg = "a program is needed"
            raise ValueError(msg)


def _status_of(program: Callable[[], object]) -> int:
    """Run it; the exit status that an interpreter would have."""
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:  # noqa: BLE001 (as an interpreter does)
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if os.fork() == 0:
        kind, descriptor, owner = sys.argv[1:]
        listener = socket.socket(fileno=int(descriptor))
        path = Path(listener.getsockname())
        try:
            Server(kind, listener, int(owner)).run()
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)
