"""Whether the worker grows: its memory after each of many requests, good ones and bad ones.

USS is the memory that a process has for itself; it is what ending the process would give back.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from http import HTTPStatus
from pathlib import Path

import nibabel as nib

from benchmarks.harness.material import describe_image, find_material
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import spread, two_or_more

MOST_GROWTH = 0.02
WINDOW = 50
"""Requests at each end of the run whose mean memory is compared."""

EDGE = 64
"""Voxels along each side of the image that is sent."""

BAD_EVERY = 10


def crop(image: nib.Nifti1Image) -> nib.Nifti1Image:
    """The middle of ``image`` (x, y, z), ``EDGE`` voxels wide."""
    starts = [(size - EDGE) // 2 for size in image.shape]
    return image.slicer[tuple(slice(start, start + EDGE) for start in starts)]


def send(client: Client, body: bytes, number: int) -> int:
    """Send request ``number``: every tenth is a gzip stream that ends early.

    Returns:
        The HTTP status.

    Raises:
        RuntimeError: it is not the one that the body deserves.
    """
    bad = number % BAD_EVERY == 0
    status = client.status(body[: len(body) // 2] if bad else body)
    expected = HTTPStatus.BAD_REQUEST if bad else HTTPStatus.OK
    if status != expected:
        msg = f"request {number} was answered {status}, not {expected}"
        raise RuntimeError(msg)
    return status


def main() -> int:
    """Measure, write ``results/memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=two_or_more, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    arguments = parser.parse_args()
    window = min(WINDOW, arguments.requests // 2)
    statuses, workers_uss, server_rss = [], [], []
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        image = scratch / "crop.nii.gz"
        nib.save(crop(nib.load(material.coarse)), image)
        body = image.read_bytes()
        with serving(material, scratch, workers=1) as client:
            workers = client.workers()
            torchserve = client.live.server.process()
            assert torchserve is not None
            for number in range(1, arguments.warm_up + 1):
                send(client, body, number)
            for number in range(1, arguments.requests + 1):
                statuses.append(send(client, body, number))
                workers_uss.append(sum(worker.memory_full_info().uss for worker in workers))
                server_rss.append(torchserve.memory_info().rss)
                if number % 20 == 0:
                    print(f"  {number}/{arguments.requests}: {workers_uss[-1] / 1e6:.1f} MB")
            restarted = client.workers() != workers
        described = describe_image(image)

    first, last = statistics.fmean(workers_uss[:window]), statistics.fmean(workers_uss[-window:])
    growth = last / first - 1
    measured = {
        "image": described,
        "warm_up_requests": arguments.warm_up,
        "statuses": statuses,
        "workers": len(workers),
        "workers_uss_bytes_after_each": workers_uss,
        "workers_uss_bytes": spread(workers_uss),
        "window_requests": window,
        "first_window_mean_bytes": first,
        "last_window_mean_bytes": last,
        "growth": growth,
        "torchserve_rss_bytes_after_each": server_rss,
    }
    claim = f"the workers grow by less than {MOST_GROWTH:.0%} from the first to the last {window} requests (fraction)"
    targets = [
        Target(claim, growth, growth < MOST_GROWTH),
        Target("no worker was restarted: restarts", int(restarted), not restarted),
    ]
    return write_results("memory", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
