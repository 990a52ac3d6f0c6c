"""What the client itself takes: memory of a long folder beside a short one, and the time to import it.

The same small image under many names: what differs is how many there are. The peak of a process is the kernel's own
account of its resident memory (VmHWM), looked at to its end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.client.commands import ENDING, predict_command, run
from benchmarks.harness.material import crop_at_random, find_material, small_shape
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import serving
from benchmarks.harness.spread import spread, two_or_more

MOST_GROWTH = 1.02
MOST_IMPORT_S = 0.3

_IMPORT = """
import time
started = time.perf_counter()
from nnunet_torchserve_client import {names}
print(time.perf_counter() - started)
"""


def import_seconds(names: str) -> float:
    """Seconds that a fresh Python takes to import these names of the client."""
    script = _IMPORT.format(names=names)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    """Measure, write ``results/footprint.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=20)
    parser.add_argument("--many", type=int, default=200)
    parser.add_argument("--rounds", type=two_or_more, default=5)
    parser.add_argument("--imports", type=two_or_more, default=15)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    counts = {"few": arguments.few, "many": arguments.many}
    peaks: dict[str, list[int]] = {name: [] for name in counts}
    with tempfile.TemporaryDirectory(prefix="bench-footprint-") as name:
        scratch = Path(name)
        material = find_material(scratch)
        small = scratch / f"small{ENDING}"
        shape = small_shape(material, 1.0)
        nib.save(crop_at_random(nib.load(material.coarse), shape, np.random.default_rng(0)), small)
        for which, count in counts.items():
            (scratch / which).mkdir()
            for number in range(count):
                os.link(small, scratch / which / f"case_{number:03}_0000{ENDING}")
        if not arguments.quick:
            wait_for_quiet()
        imports = {
            names: [import_seconds(names) for _ in range(arguments.imports)] for names in ("Client", "RemotePredictor")
        }
        with serving(material, scratch) as client:
            for number in range(arguments.rounds):
                for which in list(counts) if number % 2 == 0 else list(counts)[::-1]:
                    output = scratch / f"{which} {number}"
                    command = predict_command(client.live.server.inference_url, scratch / which, output)
                    peaks[which].append(run([command], output).peak_bytes)
                print(f"  {number + 1}/{arguments.rounds}: {peaks['few'][-1] >> 20} and {peaks['many'][-1] >> 20} MiB")
    growth = statistics.median(peaks["many"]) / statistics.median(peaks["few"])
    import_s = statistics.median(imports["RemotePredictor"])
    measured = {
        "cases": counts,
        "peak_bytes": {which: {"rounds": found, **spread(found)} for which, found in peaks.items()},
        "growth": growth,
        "growth_of_rounds": spread([many / few for few, many in zip(peaks["few"], peaks["many"], strict=True)]),
        "import_seconds": {names: {"runs": found, **spread(found)} for names, found in imports.items()},
    }
    targets = [
        Target(
            f"peak memory at {arguments.many} cases at most {MOST_GROWTH:g} times that at {arguments.few}",
            growth,
            growth <= MOST_GROWTH,
        ),
        Target(f"importing RemotePredictor takes less than {MOST_IMPORT_S:g} s", import_s, import_s < MOST_IMPORT_S),
    ]
    return write_results("footprint", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
