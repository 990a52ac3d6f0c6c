"""What an interactive case waits while a folder of large batch cases is predicted.

The small case has eight patches. A folder's cases are 1 mm images, one fold with every mirroring; its client keeps as
many of them in flight as there are workers, as a client does that finds out how many a server takes, and comes again
when it is refused. So a small case meets them in every stage: their decoding and preprocessing, which compete for the
processors, their passes and their export.

The small case alone, beside the folder as it should be sent (``priority: batch``), and beside one that is sent as if
somebody waited for each of its cases: there the small ones wait in TorchServe's queue.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.harness.material import FOLD, USUAL_OPTIONS, describe_image, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import percentile_95, two_or_more
from benchmarks.load.fairness import SMALL_PATCHES, Images, Small, ask, own_connection, patches_of, summary
from nnunet_torchserve.engine.admission import OVERTAKEN_AT_MOST
from nnunet_torchserve.engine.scheduler import OLDEST_EVERY
from nnunet_torchserve.options import Priority
from support.chaos import engines, wait_for

MOST_TIMES_ALONE = 2.0
FOLDER_OPTIONS = {"folds": [FOLD], "use_mirroring": True}
DISTINCT_IMAGES = 4
"""Of a folder, which are sent in turn."""

_STARTED_WITHIN_S = 300
_LONGEST_PAUSE_S = 2.0


@dataclass(slots=True)
class Folder:
    """Clients that send one large case after another.

    Attributes:
        client: of the server.
        images: to be sent in turn.
        priority: of each case.
        answered, refused: requests so far.
    """

    client: Client
    images: Sequence[bytes]
    priority: Priority
    answered: int = 0
    refused: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _sent: int = 0

    @contextmanager
    def running(self, clients: int) -> Iterator[None]:
        """So many clients, from when the first case is predicted; their last cases end with the server."""
        threads = [threading.Thread(target=self._send, daemon=True) for _ in range(clients)]
        for thread in threads:
            thread.start()
        [engine] = engines(self.client.runtime)
        wait_for(lambda: engine.cases > 0, _STARTED_WITHIN_S)
        try:
            yield
        finally:
            self._stop.set()

    def _send(self) -> None:
        with own_connection(self.client, None) as own, suppress(httpx.TransportError):
            while not self._stop.is_set():
                with self._lock:
                    self._sent += 1
                    image = self.images[self._sent % len(self.images)]
                answer = own.post(image, FOLDER_OPTIONS | {"priority": self.priority})
                with self._lock:
                    self.answered += answer.status_code == httpx.codes.OK
                    self.refused += answer.status_code in (
                        httpx.codes.TOO_MANY_REQUESTS,
                        httpx.codes.SERVICE_UNAVAILABLE,
                    )
                if answer.status_code != httpx.codes.OK:
                    self._stop.wait(min(_LONGEST_PAUSE_S, float(answer.headers.get("Retry-After", 1))))


def main() -> int:
    """Measure, write ``results/priority.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=two_or_more, default=40, help="small ones, alone and beside the folder")
    parser.add_argument("--workers", type=two_or_more, default=4)
    parser.add_argument("--every-s", type=float, default=4, help="between two small ones beside the folder")
    parser.add_argument("--patience-s", type=float, default=75, help="a small case that waits longer is given up")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    count, workers, patience = arguments.requests, arguments.workers, arguments.patience_s
    beside: dict[Priority, list[Small]] = {}
    folders: dict[Priority, Folder] = {}
    with tempfile.TemporaryDirectory(prefix="bench-priority-") as name:
        scratch = Path(name)
        material = find_material(scratch)
        images = Images(material, scratch)
        large = [images.large() for _ in range(DISTINCT_IMAGES)]
        described = {"small": describe_image(images.small()), "large": describe_image(large[0])}
        bodies = [image.read_bytes() for image in large]
        for priority, requests in ((Priority.BATCH, count), (Priority.INTERACTIVE, 1)):
            with serving(material, scratch / priority, workers=workers) as client:
                if not arguments.quick:
                    wait_for_quiet()
                for _ in range(2 * workers):  # what each worker's first request takes longer is not meant
                    ask(client, images, patience)
                if priority is Priority.BATCH:
                    alone = [ask(client, images, patience) for _ in range(count)]
                    patches = patches_of(client, 2 * workers + count)
                folders[priority] = Folder(client, bodies, priority)
                with folders[priority].running(workers):
                    since = time.perf_counter()
                    beside[priority] = []
                    for number in range(requests):
                        time.sleep(max(0.0, since + number * arguments.every_s - time.perf_counter()))
                        beside[priority].append(ask(client, images, patience, since))

    alone_s = statistics.median(small.seconds for small in alone)
    cases = {
        "alone": alone,
        "beside a folder of batch cases": beside[Priority.BATCH],
        "beside a folder of interactive cases": beside[Priority.INTERACTIVE],
    }
    found = {name: summary(smalls, alone_s) for name, smalls in cases.items()}
    for name, smalls in cases.items():
        slowest = max(smalls, key=lambda small: small.seconds)
        print(
            f"  {name}: {statistics.median(small.seconds for small in smalls):.2f} s, "
            f"{'' if slowest.answered else 'over '}{slowest.seconds:.2f} s at most"
        )
    measured = {
        "options": {"small": USUAL_OPTIONS, "large": FOLDER_OPTIONS},
        "images": described,
        "small_patches": patches,
        "workers": workers,
        "seconds_between_small_ones": arguments.every_s,
        "oldest_case_goes_first_every_batches": OLDEST_EVERY,
        "overtaken_at_most": OVERTAKEN_AT_MOST,
        "patience_seconds": patience,
        "folders": {
            str(priority): {"answered": folder.answered, "refused": folder.refused}
            for priority, folder in folders.items()
        },
        "cases": found,
    }
    times = percentile_95([small.seconds for small in beside[Priority.BATCH]]) / alone_s
    targets = [
        Target(f"the small case has {SMALL_PATCHES} patches", max(patches), patches == [SMALL_PATCHES]),
        Target(
            f"an interactive case beside a folder of batch cases: its p95 at most {MOST_TIMES_ALONE:g} times alone",
            times,
            times <= MOST_TIMES_ALONE,
        ),
        Target(
            "cases of the folder were answered meanwhile",
            folders[Priority.BATCH].answered,
            folders[Priority.BATCH].answered > 0,
        ),
    ]
    return write_results("priority", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
