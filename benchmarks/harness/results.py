"""One shape of result file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks import RESULTS
from benchmarks.harness.material import USUAL_OPTIONS, Material

_VERSIONS = ("nnunet-torchserve", "nnunetv2", "torch", "torchserve", "numpy", "scipy", "SimpleITK", "httpx")
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what was measured."""

    claim: str
    measured: float
    met: bool


def write_results(name: str, material: Material, measured: Mapping[str, object], targets: Sequence[Target]) -> int:
    """Write ``results/NAME.json`` and print the targets.

    Returns:
        The exit code: 0 if every target was met.
    """
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "material": material.source,
        "options": USUAL_OPTIONS,
        **measured,
        "targets": [asdict(target) for target in targets],
        "passed": all(target.met for target in targets),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    for target in targets:
        print(f"{'met   ' if target.met else 'MISSED'} {target.claim}: measured {target.measured:.4g}")
    return 0 if document["passed"] else 1


def _machine() -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine or its user."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
        "os": platform.freedesktop_os_release()["PRETTY_NAME"],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in _VERSIONS},
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
    }
