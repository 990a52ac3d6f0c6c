"""What a small case waits while large ones run.

A small case has eight patches. Large ones are 1 mm images with every fold and mirroring: about a minute of passes
each. They count once the engine sums their logits, which is after their preprocessing. Three servers are asked: the
small case's own policy (shortest remaining first) with a worker left for it; the same with first come, first served;
and the first policy with as many large cases as workers, where it waits in TorchServe's queue.

The wait is also taken when the large cases are old, because the oldest case goes first every few batches.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np

from benchmarks.harness.material import (
    USUAL_OPTIONS,
    Material,
    crop_at_random,
    describe_image,
    find_material,
    small_shape,
)
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import percentile_95, spread, two_or_more
from nnunet_torchserve.engine.scheduler import OLDEST_EVERY, Policy
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support.chaos import engines, wait_for

MOST_TIMES_ALONE = 2.0
SEED = 20261123
SMALL_PATCHES = 8
LARGE_OPTIONS = {"use_mirroring": True}
"""All folds of the archive."""

_LARGE_SHARE = 0.98
_STARTED_WITHIN_S = 300
_END_WITHIN_S = 60


@dataclass(frozen=True, slots=True)
class Small:
    """One small request.

    Attributes:
        seconds: from before the file is read until the answer is written, or until it was given up.
        answered: whether an answer came; otherwise ``seconds`` is a lower bound.
        large_age_s: how long ago the large cases were all past their preprocessing; ``None`` where there are none.
        stages_ms: the server's own account; empty without an answer.
    """

    seconds: float
    answered: bool
    large_age_s: float | None
    stages_ms: dict[str, float]


class Images:
    """Distinct images, cut as they are needed."""

    def __init__(self, material: Material, scratch: Path) -> None:
        self._generator = np.random.default_rng(SEED)
        self._coarse, self._fine = nib.load(material.coarse), nib.load(material.fine)
        self._small = small_shape(material, 1.25)
        self._large = tuple(int(n * _LARGE_SHARE) for n in self._fine.shape)
        self._scratch, self._count = scratch, 0

    def small(self) -> Path:
        """A case of eight patches."""
        return self._cut(self._coarse, self._small)

    def large(self) -> Path:
        """A case at 1 mm."""
        return self._cut(self._fine, self._large)

    def _cut(self, image: nib.Nifti1Image, shape: Sequence[int]) -> Path:
        file = self._scratch / f"{self._count}.nii.gz"
        self._count += 1
        nib.save(crop_at_random(image, shape, self._generator), file)
        return file


class LargeCases:
    """Large cases in flight; they end with their server."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._threads: list[threading.Thread] = []

    def start(self, client: Client, count: int) -> float:
        """Send so many; returns when all are past their preprocessing, and the time then (``perf_counter``)."""
        for image in [self._images.large() for _ in range(count)]:
            self._threads.append(threading.Thread(target=_send_large, args=(client, image), daemon=True))
            self._threads[-1].start()
        [engine] = engines(client.runtime)
        wait_for(lambda: engine.cases == count, _STARTED_WITHIN_S)
        return time.perf_counter()

    def join(self) -> None:
        """Wait until nobody waits for an answer any more."""
        for thread in self._threads:
            thread.join(_END_WITHIN_S)


def _send_large(client: Client, image: Path) -> None:
    with suppress(httpx.TransportError), own_connection(client, None) as own:
        own.post(image.read_bytes(), LARGE_OPTIONS)


@contextmanager
def own_connection(client: Client, timeout_s: float | None) -> Iterator[Client]:
    """The same client on a connection of its own."""
    with httpx.Client(base_url=client.http.base_url, timeout=timeout_s, trust_env=False) as http:
        yield replace(client, http=http)


def ask(client: Client, images: Images, patience_s: float, large_since: float | None = None) -> Small:
    """Send one small case that nobody has sent before."""
    image = images.small()
    started = time.perf_counter()
    age = None if large_since is None else started - large_since
    with own_connection(client, patience_s) as own:
        try:
            answer = own.segment(image, image.with_suffix(".answer"))
        except httpx.ReadTimeout:
            return Small(time.perf_counter() - started, answered=False, large_age_s=age, stages_ms={})
    return Small(answer.seconds, answered=True, large_age_s=age, stages_ms=answer.stages_ms)


def patches_of(client: Client, answered: int) -> list[int]:
    """The numbers of patches that the server's log has, once it has as many requests."""
    lines: list[dict[str, Any]] = []

    def has_all() -> bool:
        lines[:] = [line for line in client.live.request_lines() if line["id"] != "dry-run"]
        return len(lines) >= answered

    wait_for(has_all)
    return sorted({line["patches"] for line in lines})


def summary(smalls: Sequence[Small], alone_s: float) -> dict[str, object]:
    """The requests, and how they compare with one alone."""
    seconds = [small.seconds for small in smalls]
    found: dict[str, object] = {
        "repetitions": [asdict(small) for small in smalls],
        "p95_seconds": percentile_95(seconds),
        "p95_times_alone": percentile_95(seconds) / alone_s,
        "is_lower_bound": not all(small.answered for small in smalls),
    }
    return found | ({"seconds": spread(seconds)} if len(seconds) > 1 else {})


def main() -> int:
    """Measure, write ``results/fairness.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=two_or_more, default=30, help="small ones, alone and beside large")
    parser.add_argument("--workers", type=two_or_more, default=4)
    parser.add_argument("--aged-s", type=float, default=45, help="age of the large cases when more small ones come")
    parser.add_argument("--patience-s", type=float, default=75, help="a small case that waits longer is given up")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    count, workers, patience = arguments.requests, arguments.workers, arguments.patience_s
    shortest = Policy.SHORTEST_REMAINING
    with tempfile.TemporaryDirectory(prefix="bench-fairness-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        images = Images(material, scratch)
        large = LargeCases(images)
        described = {"small": describe_image(images.small()), "large": describe_image(images.large())}
        with serving(material, scratch / "shortest", folds=None, workers=workers) as client:
            if not arguments.quick:
                wait_for_quiet()
            for _ in range(2 * workers):  # what each worker's first request takes longer is not meant
                ask(client, images, patience)
            alone = [ask(client, images, patience) for _ in range(count)]
            patches = patches_of(client, 2 * workers + count)
            since = large.start(client, workers - 1)
            beside = [ask(client, images, patience, since) for _ in range(count)]
            time.sleep(max(0.0, since + arguments.aged_s - time.perf_counter()))
            aged_running = engines(client.runtime)[0].cases
            aged = [ask(client, images, patience, since) for _ in range(count)]
        large.join()
        others = {}
        for name, policy, beside_large in (("fifo", Policy.FIFO, workers - 1), ("full", shortest, workers)):
            settings = ServingSettings(policy=policy.value)
            with serving(material, scratch / name, folds=None, workers=workers, settings=settings) as client:
                ask(client, images, patience)
                since = large.start(client, beside_large)
                others[name] = [ask(client, images, patience, since)]
            large.join()

    alone_s = statistics.median(small.seconds for small in alone)
    cases = {
        "alone": alone,
        f"beside {workers - 1} large": beside,
        f"beside {workers - 1} large, aged": aged,
        f"beside {workers - 1} large, first come first served": others["fifo"],
        f"beside {workers} large": others["full"],
    }
    found = {name: summary(smalls, alone_s) for name, smalls in cases.items()}
    for name, smalls in cases.items():
        slowest = max(smalls, key=lambda small: small.seconds)
        print(f"  {name}: {'' if slowest.answered else 'over '}{slowest.seconds:.2f} s at most")
    measured = {
        "options": {"small": USUAL_OPTIONS, "large": LARGE_OPTIONS},
        "images": described,
        "small_patches": patches,
        "workers": workers,
        "policy": shortest,
        "oldest_case_goes_first_every_batches": OLDEST_EVERY,
        "aged_large_cases_running": aged_running,
        "patience_seconds": patience,
        "cases": found,
    }
    targets = [Target(f"the small case has {SMALL_PATCHES} patches", max(patches), patches == [SMALL_PATCHES])]
    for name, smalls in list(cases.items())[1:3]:
        times = percentile_95([small.seconds for small in smalls]) / alone_s
        claim = f"a small case {name}: its p95 at most {MOST_TIMES_ALONE:g} times its time alone"
        targets.append(Target(claim, times, times <= MOST_TIMES_ALONE))
    return write_results("fairness", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
