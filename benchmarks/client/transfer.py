"""A large body there and back: the client library against curl, on the same warm server.

The image is mostly empty, so that the network has little to do with it: what is large is the file, and the label map.
Neither is compressed. Both sides read the image from a file and write the answer to one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.harness.material import USUAL_OPTIONS, find_material, small_shape
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import MODEL, serving
from benchmarks.harness.spread import interval_of_median, spread, two_or_more
from nnunet_torchserve.options import HEADER
from nnunet_torchserve_client import Case, Client

MOST_RATIO = 1.05
_MB = 10**6
_OPTIONS = {**USUAL_OPTIONS, "output_format": "nii"}


def write_image(coarse: Path, shape: tuple[int, ...], file: Path, megabytes: int) -> None:
    """A volume of 8-bit voxels that is so large, with a part of a head of ``shape`` (x, y, z) in its middle."""
    image = nib.load(coarse)
    side = round((megabytes * _MB) ** (1 / 3))
    head = np.asarray(image.dataobj, np.float32)
    part = head[
        tuple(slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(head.shape, shape, strict=True))
    ]
    voxels = np.zeros((side, side, side), np.uint8)
    middle = tuple(slice((side - n) // 2, (side - n) // 2 + n) for n in part.shape)
    voxels[middle] = np.clip(255 * part / part.max(), 0, 255)
    nib.save(nib.Nifti1Image(voxels, image.affine), file)


def curl_seconds(url: str, image: Path, answer: Path) -> float:
    """One request with curl."""
    command = ["curl", "-sS", "--fail-with-body", "-X", "POST", "-T", str(image), "-o", str(answer)]
    command += ["-H", f"{HEADER}: {json.dumps(_OPTIONS)}", f"{url}/predictions/{MODEL}"]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def main() -> int:
    """Measure, write ``results/transfer.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=two_or_more, default=15)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"client": [], "curl": []}
    different = 0
    with tempfile.TemporaryDirectory(prefix="bench-transfer-") as name:
        scratch = Path(name)
        material = find_material(scratch)
        image, answers = scratch / "large.nii", {side: scratch / f"{side}.nii" for side in seconds}
        write_image(material.coarse, small_shape(material, 1.0), image, arguments.megabytes)
        with (
            serving(material, scratch, workers=1, body_limit=2 * image.stat().st_size) as served,
            Client(served.live.server.inference_url, MODEL, use_proxies=False) as client,
        ):
            url = served.live.server.inference_url

            def by_client() -> float:
                started = time.perf_counter()
                answers["client"].write_bytes(client.predict(Case("large", image), _OPTIONS).content)
                return time.perf_counter() - started

            def by_curl() -> float:
                return curl_seconds(url, image, answers["curl"])

            sides: dict[str, Callable[[], float]] = {"client": by_client, "curl": by_curl}
            by_client()
            for number in range(arguments.rounds):
                for side in list(sides) if number % 2 == 0 else list(sides)[::-1]:
                    if not arguments.quick:
                        wait_for_quiet()
                    seconds[side].append(sides[side]())
                different += answers["client"].read_bytes() != answers["curl"].read_bytes()
                ours, theirs = (found[-1] for found in seconds.values())
                print(f"  {number + 1}/{arguments.rounds}: {ours:.2f} s, curl {theirs:.2f} s")
        sizes = {"image": image.stat().st_size, "answer": answers["client"].stat().st_size}
    ratios = [ours / theirs for ours, theirs in zip(seconds["client"], seconds["curl"], strict=True)]
    ratio = statistics.median(ratios)
    measured = {
        "bytes": sizes,
        "seconds": {side: {"rounds": found, **spread(found)} for side, found in seconds.items()},
        "ratio": {**spread(ratios), "median_95_percent": interval_of_median(ratios)},
    }
    targets = [
        Target(
            f"{arguments.megabytes} MB there and back: at most {MOST_RATIO:g} times curl's time",
            ratio,
            ratio <= MOST_RATIO,
        ),
        Target("answers that are not curl's to the byte", different, different == 0),
    ]
    return write_results("transfer", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
