"""Engines that tests in one process start, forked from a process that has imported all that an engine imports.

A start takes some 4 s of a processor, and nearly all of it is importing PyTorch and nnU-Net. Nothing else is spared: a
forked engine is a process of its own that goes through the same ``main``. Fresh interpreters are started by every live
TorchServe, and where a test takes the fixture ``cold``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from nnunet_torchserve.engine import starter

_PRELOADED = ["nnunet_torchserve.engine.switchboard", "nnunet_torchserve.engine.network", "setproctitle"]


def run(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Instead of ``starter.run``: an interpreter is not started but forked."""
    engine = _context().Process(target=_engine, args=(list(command), dict(environment)))
    engine.start()
    engine.join()


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in starter.MALLOC.items():  # which counts when a process starts
            environment.setenv(name, value)
        forkserver.ensure_running()
    return context


def _engine(command: list[str], environment: dict[str, str]) -> None:
    """The engine, from its command to its end: what follows is not multiprocessing's."""
    from setproctitle import setproctitle

    from nnunet_torchserve.engine.process import main

    setproctitle(" ".join(command))  # while its environment is where it was: it finds its title beside it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir("/")
    folder, model_dir, settings = command[3:]
    status = 1
    try:
        status = main(Path(folder), Path(model_dir), settings)
    finally:
        os._exit(status)
