"""How long a container of the image takes until it is ready, and how large the image is.

Each start is of a container of its own, as nobody, in a read-only root, with two processors, by the image's own command
with one archive in its store. *Cold* ones find none of the image's files in memory, as on a node that has just pulled
it; *warm* ones follow at once. *Again* is the same container, stopped and started, which finds what it wrote.

The image is there already: ``make image-test`` builds it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.material import find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import MODEL
from benchmarks.harness.spread import two_or_more
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.image import BUILT, Container, container, podman

MOST_S = 30.0
MEMORY = "4g"


@dataclass(frozen=True, slots=True)
class Start:
    """One start.

    Attributes:
        ready_s: from ``podman run`` or ``podman start`` to a 200 of ``/ready``.
        processor_s: that all processes in the container had computed by then.
    """

    ready_s: float
    processor_s: float


def main() -> int:
    """Measure, write ``results/cold_start.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", default=BUILT, help="its name; default: what make image-test builds")
    parser.add_argument("--starts", type=two_or_more, default=5, help="of each kind")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    starts: dict[str, list[Start]] = {"cold": [], "warm": [], "again": []}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        material = find_material(Path(folder))
        store = Path(folder, "store")
        [archive] = make_archives(ArchiveRequest(material.model_folder, store, folds=(0,), name=MODEL))
        archive.chmod(0o644)
        store.chmod(0o755)
        for _ in range(arguments.starts):
            for kind in ("cold", "warm"):
                if kind == "cold":
                    forget(arguments.image)
                if not arguments.quick:
                    wait_for_quiet()
                began = time.monotonic()
                options = [f"--volume={store}:/models:ro"]
                with container(arguments.image, options=options, memory=MEMORY) as server:
                    starts[kind].append(ready(server, began))
                    if kind == "warm":
                        podman("stop", "--time=1300", server.name)
                        began = time.monotonic()
                        server.start()
                        starts["again"].append(ready(server, began))
        archive_bytes = archive.stat().st_size
    for kind, found in starts.items():
        print(f"{kind}: {median(found):.1f} s, median of {len(found)}")
    measured = {
        "image_bytes": int(podman("image", "inspect", "--format={{.Size}}", arguments.image)),
        "archive_bytes": archive_bytes,
        "processors": 2,
        "memory": MEMORY,
        "starts": {kind: [asdict(each) for each in found] for kind, found in starts.items()},
    }
    slowest = max(each.ready_s for each in starts["cold"])
    claim = f"a cold start on two processors, the slowest of {arguments.starts}: at most {MOST_S:g} s"
    return write_results("cold_start", material, measured, [Target(claim, slowest, slowest <= MOST_S)])


def forget(image: str) -> None:
    """Have the kernel forget what it has read of the image's files."""
    root = Path(podman("image", "mount", image))
    try:
        os.sync()  # what was just built stays in memory until it is written
        for file in root.rglob("*"):
            if file.is_file() and not file.is_symlink():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
    finally:
        podman("image", "unmount", image)


def ready(server: Container, began: float) -> Start:
    """Wait for it."""
    server.wait_until_ready()
    return Start(round(time.monotonic() - began, 2), round(server.processor_seconds(), 2))


def median(starts: Sequence[Start]) -> float:
    """Seconds until it was ready."""
    return statistics.median(each.ready_s for each in starts)


if __name__ == "__main__":
    if os.getuid() != 0 or shutil.which("podman") is None:
        sys.exit("needs root and podman")
    sys.exit(main())
