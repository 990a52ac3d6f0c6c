"""What requests save by what others left: the same image again with the cache, and equal requests at once.

Two live servers of one model: one keeps preprocessed volumes and computes equal requests once, the other does neither,
as servers do unless they are told to. The cache: an image that the server has not seen (the head with other noise in
one voxel), then the same again, in every round. Equal requests: as many clients as workers send one image at the same
time, to the servers in turns. All answers to an image must be equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from benchmarks.harness.label_maps import different_voxels
from benchmarks.harness.material import describe_image, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Answer, Client, serving, stage_medians
from benchmarks.harness.spread import spread, two_or_more
from nnunet_torchserve_tools.serving_settings import ServingSettings

WORKERS = 4
MOST_OF_THE_FIRST = 0.05
"""The promise for decode + preprocess of an image that is known."""

_CACHE_BYTES = 1024**3
_BEFORE_THE_NETWORK = ("decode", "preprocess")


def variant(image: Path, number: int, scratch: Path) -> Path:
    """The image with one voxel changed, in its file format."""
    loaded = nib.load(image)
    voxels = np.asanyarray(loaded.dataobj).copy()
    voxels[0, 0, 0] = number + 1
    file = scratch / f"variant-{number}.nii.gz"
    nib.save(nib.Nifti1Image(voxels, loaded.affine, loaded.header), file)
    return file


def before_the_network_s(answer: Answer) -> float:
    """Seconds of decode and preprocess."""
    return sum(answer.stages_ms.get(stage, 0.0) for stage in _BEFORE_THE_NETWORK) / 1000


def measure_cache(client: Client, image: Path, rounds: int, scratch: Path, *, quick: bool) -> dict[str, Any]:
    """A new image, and the same again, in every round."""
    first: list[Answer] = []
    again: list[Answer] = []
    different = 0
    for number in range(-1, rounds):  # the first round is not counted
        file = variant(image, number, scratch)
        if not quick:
            wait_for_quiet()
        answers = [client.segment(file, scratch / f"{turn}.nii.gz") for turn in range(2)]
        different += different_voxels(scratch / "0.nii.gz", scratch / "1.nii.gz")
        if number >= 0:
            first.append(answers[0])
            again.append(answers[1])
    shares = [before_the_network_s(b) / before_the_network_s(a) for a, b in zip(first, again, strict=True)]
    return {
        "image": describe_image(image),
        "first_seconds": spread([answer.seconds for answer in first]),
        "again_seconds": spread([answer.seconds for answer in again]),
        "first_stage_medians_ms": stage_medians(first),
        "again_stage_medians_ms": stage_medians(again),
        "before_the_network_of_the_first": spread(shares),
        "seconds_of_the_first": spread([b.seconds / a.seconds for a, b in zip(first, again, strict=True)]),
        "different_voxels": different,
    }


def all_at_once(client: Client, body: bytes) -> tuple[float, set[bytes]]:
    """Seconds until the last of as many equal requests as workers is answered, and their answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = list(pool.map(lambda _: client.post(body).raise_for_status().content, range(WORKERS)))
    return time.perf_counter() - began, set(answers)


def measure_flight(
    clients: Sequence[Client], image: Path, rounds: int, scratch: Path, *, quick: bool
) -> dict[str, Any]:
    """Equal requests at once with single flight and without, in turns; the same number of each goes first."""
    seconds: list[list[float]] = [[], []]
    different = 0
    for number in range(-1, rounds):
        body = variant(image, 1000 + number, scratch).read_bytes()
        answers: set[bytes] = set()
        for side in (0, 1) if number % 2 else (1, 0):
            if not quick:
                wait_for_quiet()
            took, found = all_at_once(clients[side], body)
            answers |= found
            if number >= 0:
                seconds[side].append(took)
        different += len(answers) - 1
    shared, alone = seconds
    return {
        "image": describe_image(image),
        "requests_at_once": WORKERS,
        "computed_once_seconds": spread(shared),
        "computed_each_seconds": spread(alone),
        "times_sooner": spread([a / s for a, s in zip(alone, shared, strict=True)]),
        "different_answers": different,
    }


def main() -> int:
    """Measure, write ``results/reuse.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=two_or_more, default=9)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine; write no results")
    arguments = parser.parse_args()
    on = ServingSettings(cache_bytes=_CACHE_BYTES, single_flight=True)
    with tempfile.TemporaryDirectory(prefix="bench-reuse-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        with (
            serving(material, scratch / "on", workers=WORKERS, settings=on) as reusing,
            serving(material, scratch / "off", workers=WORKERS) as plain,
        ):
            images = {"2 mm": material.coarse, "1 mm": material.fine}
            cache = {
                name: measure_cache(reusing, image, arguments.rounds, scratch, quick=arguments.quick)
                for name, image in images.items()
            }
            flight = measure_flight((reusing, plain), material.coarse, arguments.rounds, scratch, quick=arguments.quick)
    share = cache["1 mm"]["before_the_network_of_the_first"]["median"]
    wrong = sum(each["different_voxels"] for each in cache.values()) + flight["different_answers"]
    claim = f"1 mm again: decode + preprocess below {MOST_OF_THE_FIRST:.0%} of the first's (fraction)"
    targets = [
        Target(claim, share, share < MOST_OF_THE_FIRST),
        Target("the same answers: voxels or files that differ", wrong, wrong == 0),
    ]
    if arguments.quick:
        print(cache, flight, targets)
        return 0
    return write_results("reuse", material, {"cache": cache, "single_flight": flight}, targets)


if __name__ == "__main__":
    sys.exit(main())
