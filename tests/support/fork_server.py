"""The process that engines of tests are forked from: it has imported what is not ours, and forks when it is asked to.

``python -m support.fork_server LISTENER`` (a socket's descriptor) answers until its standard input ends. A request is
JSON, the arguments and environment of a command ``python -m nnunet_torchserve.engine.process ...``; the answer is one
byte, when the command would have returned. Our own modules are imported after the fork, from where the command's
PYTHONPATH says.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import socket
import sys
from pathlib import Path

OURS = "nnunet_torchserve"
_PRELOADED = (
    f"{OURS}.engine.switchboard",
    f"{OURS}.engine.network",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer",
    "setproctitle",
)


def preload() -> None:
    """Import all that an engine imports, and forget our own part of it."""
    gc.disable()
    for name in _PRELOADED:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == OURS]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # what is never looked through stays shared with the parent


def serve(listener: socket.socket) -> None:
    """Fork an engine for each request."""
    preload()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in selector.select()):
            connection, _ = listener.accept()
            with connection.makefile("rb") as sent:
                request = json.load(sent)
            child = os.fork()
            if child == 0:
                selector.close()
                listener.close()
                connection.close()
                _engine(**request)
            os.waitpid(child, 0)  # it forks away at once
            connection.sendall(b".")
            connection.close()


def _engine(arguments: list[str], environment: dict[str, str]) -> None:
    """The engine, from its command to its end."""
    from setproctitle import setproctitle

    setproctitle(" ".join(arguments))  # while its environment is where it was: it finds its title beside it
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir("/")
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    status = 1
    try:
        gc.enable()
        folder, model_dir, settings = arguments[3:]
        status = importlib.import_module(f"{OURS}.engine.process").main(Path(folder), Path(model_dir), settings)
    finally:
        os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
