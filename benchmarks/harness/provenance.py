"""Where numbers come from: which commit, which machine; nothing that names the machine or its user.

Needs the standard library only, so that a benchmark on a borrowed machine can say it too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import ROOT

COMMIT_VARIABLE = "BENCHMARKS_COMMIT"
"""The commit, where the working tree was copied to a machine without its history."""

_GENERATED = ("benchmarks/results", "docs/figures", "docs/performance.md")
"""What benchmarks write themselves: a result that was written just now does not make the next one's code another."""

_DECIDING_FLAGS = re.compile(r"avx.*|amx.*|fma|f16c|.*vnni.*|.*bf16|asimd.*|sve.*|i8mm")
"""Instructions by which PyTorch, oneDNN and NumPy choose their kernels, on x86 and on Arm."""

_GIB = 1024**3


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> dict[str, object]:
    """The commit of the working tree, and whether it differs from that; ``None`` where nothing says so."""
    try:
        found = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in _GENERATED))
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get(COMMIT_VARIABLE), "uncommitted_changes": None}
    return {"commit": found, "uncommitted_changes": bool(changed)}


def cpu() -> dict[str, object]:
    """The processor's name, and the flags that decide kernels; several servers have one name and not the same flags."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", "")).split()
    numbers = [fields[name] for name in ("cpu family", "model", "stepping") if name in fields]
    return {
        "cpu": fields.get("model name", "unknown"),
        "cpu_family_model_stepping": " ".join(numbers),
        "cpu_flags": sorted(flag for flag in flags if _DECIDING_FLAGS.fullmatch(flag)),
    }


def machine(packages: Iterable[str]) -> dict[str, object]:
    """What numbers depend on, with the versions of ``packages``."""
    return {
        **cpu(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "os": platform.freedesktop_os_release()["PRETTY_NAME"],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in packages},
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
    }


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
