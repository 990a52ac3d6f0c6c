"""The environment variables of a server, beside the limits of :mod:`.limits`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

RUNTIME_DIR_VARIABLE = "NNUNET_TORCHSERVE_RUNTIME_DIR"
"""Where engines have their sockets, ledgers and logs."""

FAULTS_VARIABLE = "NNUNET_TORCHSERVE_FAULTS"
"""Faults that a test orders: :mod:`.engine.faults`."""

CONTROL_DIR_VARIABLE = "NNUNET_TORCHSERVE_CONTROL_DIR"
"""The server's private directory: :mod:`.draining`. Set by ``nnunet-torchserve serve``."""

TESTING_VARIABLE = "NNUNET_TORCHSERVE_TESTING"
"""Set to 1 by ``nnunet-torchserve serve --testing``."""


def runtime_dir() -> Path:
    """The directory that all servers of this user share; absolute, because engines run elsewhere.

    Whoever names one may name a link to it; a link with the name of the default one may be anybody's.
    """
    configured = os.environ.get(RUNTIME_DIR_VARIABLE)
    if configured:
        return Path(configured).resolve()
    return (Path(tempfile.gettempdir()) / f"nnunet-torchserve-{os.getuid()}").absolute()


def control_dir(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The server's private directory; a bare TorchServe has none."""
    configured = environ.get(CONTROL_DIR_VARIABLE)
    return Path(configured) if configured else None


def refuse_faults_outside_tests(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ``RuntimeError`` if faults are ordered and this is no test."""
    if environ.get(FAULTS_VARIABLE) and environ.get(TESTING_VARIABLE) != "1":
        msg = f"{FAULTS_VARIABLE} is set, which is for tests only: unset it"
        raise RuntimeError(msg)
