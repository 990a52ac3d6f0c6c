"""How many cases a busy server gets done: eight clients against stock's predictor, loaded, one case after another.

Both go from image files to segmentation files. The same requests of mixed sizes go, a part at a time and in turns, to
stock, to the server by one client (every request alone) and by eight, and to a second server with batches of four
patches by eight; so all of them see the same machine. Whatever else the server does, an answer must be the one that
the request gets alone, and in batches of one it must be stock's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.label_maps import digest_of, labels_of
from benchmarks.harness.material import FOLD, USUAL_OPTIONS, Material, find_material
from benchmarks.harness.mixture import Size, cut, sizes_of
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Client, serving
from benchmarks.harness.spread import spread, two_or_more
from nnunet_torchserve_tools.serving_settings import ServingSettings
from support import stock
from support.chaos import engines

LEAST_RATIO = 1.3
CLIENTS = 8
WORKERS = 4
BATCH = 4
WITH_PROBABILITIES = {**USUAL_OPTIONS, "save_probabilities": True}


class Side(StrEnum):
    """Who answers."""

    STOCK = "stock, loaded"
    ALONE = "server, 1 client"
    EIGHT = "server, 8 clients"
    BATCHED = "server with batches of 4, 8 clients"


class Requests:
    """The images, and every side's answers to them."""

    def __init__(self, material: Material, count: int, scratch: Path) -> None:
        """Cut ``count`` images, no two alike."""
        folder = scratch / "images"
        folder.mkdir()
        self.sizes = sizes_of(count)
        self.files = [folder / f"{number:03}.nii.gz" for number in range(count)]
        cut(material, self.files)
        self.answers = {side: dict[int, bytes]() for side in Side}
        self.lost = dict.fromkeys(Side, 0)

    def ask_server(self, client: Client, side: Side, part: Sequence[int], clients: int) -> float:
        """Send the requests of a part by so many clients; the seconds until the last answer is written."""
        output = self.files[0].parent / "answer"
        output.mkdir(exist_ok=True)

        def ask(number: int) -> None:
            response = client.post(self.files[number].read_bytes())
            (output / self.files[number].name).write_bytes(response.content)
            if response.status_code == HTTPStatus.OK:
                self.answers[side][number] = response.content
            else:
                self.lost[side] += 1
                print(f"  request {number} was answered {response.status_code}: {response.text[:200]}")

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(ask, part))
        return time.perf_counter() - started

    def ask_stock(self, predictor: Any, part: Sequence[int]) -> float:
        """Predict the requests of a part one after another; the seconds until the last file is written."""
        reader = predictor.plans_manager.image_reader_writer_class()
        output = self.files[0].parent / "stock.nii.gz"
        seconds = 0.0
        for number in part:
            started = time.perf_counter()
            data, properties = reader.read_images([str(self.files[number])])
            reader.write_seg(predictor.predict_single_npy_array(data, properties), str(output), properties)
            seconds += time.perf_counter() - started
            self.answers[Side.STOCK][number] = output.read_bytes()
        return seconds

    def different(self, side: Side, other: Side) -> dict[str, int]:
        """Answers whose labels differ, and by how many voxels in all; an answer that one side lacks differs."""
        answers = voxels = 0
        for number in range(len(self.files)):
            if number not in self.answers[side] or number not in self.answers[other]:
                answers += 1
                continue
            mine, theirs = (labels_of(self.answers[each][number]) for each in (side, other))
            answers += digest_of(mine) != digest_of(theirs)
            voxels += int(np.count_nonzero(mine != theirs))
        return {"answers": answers, "voxels": voxels}


@contextmanager
def two_servers(material: Material, scratch: Path) -> Iterator[tuple[Client, Client]]:
    """One with batches of one and one with batches of four; the one that is not asked idles."""
    batched = ServingSettings(max_patch_batch=BATCH)
    with (
        serving(material, scratch / "one", workers=WORKERS) as one,
        serving(material, scratch / "four", workers=WORKERS, settings=batched) as four,
    ):
        yield one, four


def compare_bits(client: Client, requests: Requests, count: int) -> dict[str, object]:
    """Labels and probabilities of the same requests, alone and amid others, in one engine's life.

    Returns:
        How many were compared, how many answers differ in any byte, and whether one engine gave them all.
    """
    chosen = [number for number, size in enumerate(requests.sizes) if size is not Size.FINE][:count]
    bodies = [requests.files[number].read_bytes() for number in chosen]

    def ask(body: bytes) -> bytes | None:
        response = client.post(body, WITH_PROBABILITIES)
        return sha256(response.content).digest() if response.status_code == HTTPStatus.OK else None

    lives = [engine.process for engine in engines(client.runtime)]
    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(CLIENTS) as pool:
        amid = list(pool.map(ask, bodies))
    different = sum(one is None or one != other for one, other in zip(alone, amid, strict=True))
    same_life = len(lives) == 1 and lives == [engine.process for engine in engines(client.runtime)]
    return {"compared": len(chosen), "different": different, "one_engine_life": same_life}


def main() -> int:
    """Measure, write ``results/throughput.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=two_or_more, default=4)
    parser.add_argument("--requests-of-a-part", type=two_or_more, default=16)
    parser.add_argument("--requests-compared-by-bits", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    size = arguments.requests_of_a_part
    threads = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the servers inherit it
    seconds: dict[Side, list[float]] = {side: [] for side in Side}
    with tempfile.TemporaryDirectory(prefix="bench-throughput-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        requests = Requests(material, arguments.parts * size, scratch)
        predictor = stock.loaded(material.model_folder, folds=(FOLD,), use_mirroring=False)
        with two_servers(material, scratch) as (one, four):
            sides: dict[Side, Callable[[Sequence[int]], float]] = {
                Side.STOCK: lambda part: requests.ask_stock(predictor, part),
                Side.EIGHT: lambda part: requests.ask_server(one, Side.EIGHT, part, CLIENTS),
                Side.BATCHED: lambda part: requests.ask_server(four, Side.BATCHED, part, CLIENTS),
                Side.ALONE: lambda part: requests.ask_server(one, Side.ALONE, part, 1),
            }
            lives = [engine.process for engine in engines(one.runtime)]
            for ask in sides.values():
                ask(range(2))
            requests.lost = dict.fromkeys(Side, 0)
            for number in range(arguments.parts):
                part = range(number * size, (number + 1) * size)
                for side in list(sides)[:: -1 if number % 2 else 1]:
                    if not arguments.quick:
                        wait_for_quiet()
                    seconds[side].append(sides[side](part))
                print(f"  {number + 1}/{arguments.parts}: " + ", ".join(f"{s} {seconds[s][-1]:.1f} s" for s in Side))
            one_life = lives == [engine.process for engine in engines(one.runtime)]
            bits = compare_bits(four, requests, arguments.requests_compared_by_bits)

    ratios = {
        side: [theirs / mine for theirs, mine in zip(seconds[Side.STOCK], seconds[side], strict=True)]
        for side in (Side.ALONE, Side.EIGHT, Side.BATCHED)
    }
    ratio = sum(seconds[Side.STOCK]) / sum(seconds[Side.EIGHT])
    amid = requests.different(Side.EIGHT, Side.ALONE)
    stocks = requests.different(Side.EIGHT, Side.STOCK)
    measured = {
        "threads": threads,
        "clients": CLIENTS,
        "workers": WORKERS,
        "requests": {each: requests.sizes.count(each) for each in Size},
        "requests_of_a_part": size,
        "part_seconds": seconds,
        "requests_per_second": {side: round(len(requests.files) / sum(each), 4) for side, each in seconds.items()},
        "throughput_ratio_to_stock": {side: sum(seconds[Side.STOCK]) / sum(seconds[side]) for side in ratios},
        "throughput_ratio_to_stock_of_parts": {side: spread(each) for side, each in ratios.items()},
        "lost": requests.lost,
        "different_from_alone": amid,
        "different_from_stock": stocks,
        "batches_of_4_different_from_stock": requests.different(Side.BATCHED, Side.STOCK),
        "batches_of_4_same_bits": bits,
        "one_engine_life": one_life,
    }
    lost = sum(requests.lost.values())
    same_bits = bits["different"] == 0 and bits["one_engine_life"] is True
    targets = [
        Target(
            f"8 clients: at least {LEAST_RATIO:g} times the requests of stock, one by one", ratio, ratio >= LEAST_RATIO
        ),
        Target("requests lost", lost, lost == 0),
        Target("8 clients: answers that are not the request's own alone", amid["answers"], amid["answers"] == 0),
        Target("8 clients: voxels that differ from stock", stocks["voxels"], stocks == {"answers": 0, "voxels": 0}),
        Target(
            "batches of 4: answers of which any bit depends on who else is served",
            int(str(bits["different"])),
            same_bits,
        ),
    ]
    return write_results("throughput", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
