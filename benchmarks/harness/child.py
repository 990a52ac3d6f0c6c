"""A module of the benchmarks as a fresh process, which holds nothing but what it measures."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import ROOT


def last_line_of(module: str, *arguments: str) -> str:
    """Run ``python -m MODULE ARGUMENTS``; the last line that it prints.

    Raises:
        CalledProcessError: it failed; it has said why on stderr.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]
