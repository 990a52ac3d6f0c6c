"""One shape of result file: what was measured, where and with which code, and which promises were kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import RESULTS
from benchmarks.harness import provenance
from benchmarks.harness.material import USUAL_OPTIONS, Material

PACKAGES = ("nnunet-torchserve", "nnunetv2", "torch", "torchserve", "numpy", "scipy", "SimpleITK", "httpx")


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
    save_results(name, material, measured, targets)
    return print_targets(targets)


def save_results(
    name: str, material: Material, measured: Mapping[str, object], targets: Sequence[Target], folder: Path = RESULTS
) -> None:
    """Write ``NAME.json`` into a folder: ``results/``, unless it is a trial."""
    document = {
        "benchmark": name,
        "date": provenance.now(),
        **provenance.commit(),
        "machine": provenance.machine(PACKAGES),
        "material": material.source,
        "options": USUAL_OPTIONS,
        **measured,
        "targets": [asdict(target) for target in targets],
        "passed": all(target.met for target in targets),
    }
    write_json(folder / f"{name}.json", document)


def write_json(file: Path, document: Mapping[str, object]) -> None:
    """Write a whole file or none: what was there stays until the new one is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n")
    part.replace(file)


def print_targets(targets: Sequence[Target]) -> int:
    """Print which promises were kept; the exit code: 0 if all were."""
    for target in targets:
        print(f"{'met   ' if target.met else 'MISSED'} {target.claim}: measured {target.measured:.4g}")
    return 0 if all(target.met for target in targets) else 1
