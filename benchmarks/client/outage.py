"""A server that is killed and started again in the middle of a folder: what the folder command makes of it.

kill -9 of TorchServe's JVM, a third into the folder; then ``serve`` again, at the same addresses. The command is told
nothing. The folder must be that of an undisturbed call, file for file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

from benchmarks.client.commands import ENDING, predict_command, run
from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import find_material
from benchmarks.harness.mixture import Size, cut, sizes_of
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Client, serving
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve_tools import launcher
from support.chaos import has_ended, wait_for


def kill_and_start_again(client: Client, store: Path, workers: int) -> float:
    """Kill the JVM, start the server again; the seconds until it was ready."""
    server = client.live.server
    jvm = server.process()
    assert jvm is not None
    started = time.perf_counter()
    jvm.kill()
    wait_for(lambda: has_ended(jvm))
    ports = [int(url.rpartition(":")[2]) for url in (server.inference_url, server.management_url, server.metrics_url)]
    free = launcher.free_ports()
    asked = launcher.AskedPorts(ports[0], ports[1], ports[2], free.grpc_inference, free.grpc_management)
    request = launcher.ServeRequest(
        store, state_dir=client.live.state_dir, ports=asked, device=launcher.DeviceKind.CPU, workers=workers
    )
    with mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: str(client.runtime)}):
        launcher.start(request)
    return time.perf_counter() - started


def main() -> int:
    """Measure, write ``results/outage.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    away_s: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-outage-") as name:
        scratch = Path(name)
        material = find_material(scratch)
        images, quiet, disturbed = (scratch / each for each in ("images", "undisturbed", "disturbed"))
        images.mkdir()
        cut(material, [images / f"case_{number:03}_0000{ENDING}" for number in range(arguments.cases)])
        with serving(material, scratch, workers=arguments.workers) as client:
            url = client.live.server.inference_url
            undisturbed = run([predict_command(url, images, quiet)], quiet)

            def disturb() -> None:
                wait_for(lambda: len(list(disturbed.glob(f"*{ENDING}"))) >= arguments.cases // 3)
                away_s.append(kill_and_start_again(client, scratch / "model_store", arguments.workers))

            killer = threading.Thread(target=disturb, daemon=True)
            killer.start()
            survived = run([predict_command(url, images, disturbed)], disturbed)
            killer.join()
            there = [file for file in sorted(quiet.glob(f"*{ENDING}")) if (disturbed / file.name).exists()]
            different = sum(different_voxels(file, disturbed / file.name) for file in there)
            failed = (disturbed / "failed.json").exists()
    measured = {
        "cases": {str(size): sizes_of(arguments.cases).count(size) for size in Size},
        "workers": arguments.workers,
        "undisturbed_seconds": undisturbed.seconds,
        "disturbed_seconds": survived.seconds,
        "server_away_seconds": away_s,
    }
    targets = [
        Target("servers that were killed", len(away_s), len(away_s) == 1),
        Target(f"label maps of {arguments.cases}", len(there), len(there) == arguments.cases and not failed),
        Target("voxels that differ from those of an undisturbed call", different, different == 0),
    ]
    return write_results("outage", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
