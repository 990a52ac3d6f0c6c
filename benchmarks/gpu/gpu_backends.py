"""What the backends gain on a GPU: eager, compiled, and CUDA graphs; whole cases against stock's loaded predictor.

Networks are nnU-Net's standard one and ResEnc-M, untrained, for patches of 64³, 96³ and 128³; what runs them are the
engine's own backends. The most telling points come first, and each is written when it is measured: a run that is
stopped leaves what it has. What the budget does not reach is listed as skipped. Labels that differ are those of an
untrained network, whose logits nearly tie: an upper end.

The cache of what is compiled begins empty, so that ``prepared_s`` of the first compiled way of a point is a cold start;
``from_cache`` is the same in a new process afterwards.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.gpu.backend_points import SEED, Bench, How, Point, compile_again
from benchmarks.gpu.concurrent_cases import SHAPES, measure_cases
from benchmarks.gpu.gpu_engine import machine, matmul_peak
from benchmarks.harness import provenance
from benchmarks.harness.results import write_json
from benchmarks.models.untrained_networks import Network
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE

OUTPUT = RESULTS / "gpu_backends.json"
_SIZE = 8192
_UNCOMPILED = (How.EAGER, How.EAGER_GRAPH)
_COMPILED = (How.COMPILED, How.COMPILED_ALONE)
_GUESS_S = {False: 3.0, True: 40.0}
"""What a point may take, before one has been measured: without compiling, and with it."""

_CASES_GUESS_S, _AFTER_CASES_S = 100.0, 50.0
_CASES_BATCH = 4

Step = tuple[str, Point]


def steps(kinds: Sequence[str], sizes: Sequence[int]) -> Iterator[Step]:
    """What is measured, the most telling first: the kind of step, and its network and batch."""
    largest = Network(kinds[0], max(sizes))
    first = [largest, Network(kinds[0], min(sizes)), Network(kinds[-1], max(sizes))]
    networks = list(dict.fromkeys([*first, *(Network(kind, size) for kind in kinds for size in sizes)]))
    for network in networks[:3]:
        yield "point", Point(network, "float16", 1, _UNCOMPILED)
        yield "point", Point(network, "float16", 4, _UNCOMPILED + _COMPILED)
        if network == networks[:2][-1]:
            yield "from_cache", Point(largest, "float16", 4, ())
            yield "cases", Point(largest, "float16", _CASES_BATCH, ())
    uncompiled = [
        *((network, "float16", batch) for batch in (2, 8) for network in networks[:3]),
        *((network, "float16", batch) for network in networks[3:] for batch in (1, 4)),
        *((network, "bfloat16", batch) for network in networks for batch in (1, 4)),
    ]
    for network, dtype, batch in uncompiled:
        yield "point", Point(network, dtype, batch, _UNCOMPILED)
    compiled = [
        (largest, "float16", 1),
        (largest, "bfloat16", 4),
        *((network, "float16", 4) for network in networks[3:]),
        *((network, "float16", 1) for network in networks[1:3]),
        (largest, "float16", 8),
    ]
    for network, dtype, batch in compiled:
        yield "point", Point(network, dtype, batch, _COMPILED)


class Run:
    """A run of the script: what is left of its budget, and what it found."""

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        """Measure what the numbers are compared with."""
        self._ends: float = time.monotonic() + arguments.budget_s
        self._arguments, self._scratch = arguments, scratch
        self._guess_s = dict(_GUESS_S)
        device: torch.device = arguments.device
        self.document: dict[str, Any] = {
            "benchmark": "gpu_backends",
            "date": provenance.now(),
            **provenance.commit(),
            "machine": machine(device),
            "weights": f"random; patches of noise, seed {SEED}",
            "budget_s": arguments.budget_s,
            "peak": {
                "unit": "TFLOP/s",
                "of": f"matrix product of {arguments.matmul}×{arguments.matmul}, float32 as TF32",
                **(peaks := matmul_peak(device, arguments.matmul)),
            },
            "points": [],
            "from_cache": [],
            "cases": [],
            "skipped": [],
        }
        self._bench = Bench(device, scratch, arguments.seconds, peaks)
        self.write()

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self._ends - time.monotonic()

    def write(self) -> None:
        """Write what there is."""
        write_json(self._arguments.output, self.document)

    def step(self, kind: str, point: Point) -> None:
        """Measure, or say why not."""
        compiles = How.COMPILED in point.ways
        needs_s = _CASES_GUESS_S if kind == "cases" else self._guess_s[compiles]
        said = {"step": kind, **point.describe(), "ways": [str(how) for how in point.ways]}
        if self.left_s < needs_s:
            self.document["skipped"].append(said | {"reason": "budget"})
            self.write()
            return
        began = time.monotonic()
        try:
            getattr(self, f"_{kind}")(point)
        except Exception as error:  # noqa: BLE001 (the other points are worth having)
            traceback.print_exc()
            self.document["skipped"].append(said | {"reason": f"{type(error).__name__}: {error}"[:500]})
        finally:
            self._tidy()
        took = time.monotonic() - began
        if kind == "point":
            self._guess_s[compiles] = max(self._guess_s[compiles] / 2, 1.3 * took)
        print(f"{kind} {point.network} {point.dtype} batch {point.batch}: {took:.1f} s, {self.left_s:.0f} s left")
        self.write()

    def _note(self, row: dict[str, Any]) -> None:
        self.document["points"].append(row)
        self.write()
        print(
            f"  {row['network']} {row['patch']}³ {row['autocast']} batch {row['batch']} {row['how']:24}"
            f"{row['patches_per_s']:9} patches/s, {row['fraction_of_peak']:.1%} of peak,"
            f" {row['labels_different']:.2e} labels different, {row['prepared_s']} s",
            flush=True,
        )

    def _point(self, point: Point) -> None:
        if self._arguments.device.type == "cuda":
            torch.set_autocast_dtype("cuda", getattr(torch, point.dtype))
        self._bench.bundle(point.network, golden=True)
        self._bench.measure(point, self._note)

    def _from_cache(self, point: Point) -> None:
        bundle = self._bench.bundle(point.network)
        found = compile_again(bundle, self._arguments.device, point.batch)
        self.document["from_cache"].append(point.describe() | found)
        print(f"  {found}")

    def _cases(self, point: Point) -> None:
        bundle = self._bench.bundle(point.network)
        [model] = (self._scratch / f"{point.network.kind}_{point.network.size}").glob("Dataset*/*")
        found = measure_cases(
            bundle,
            model,
            self._arguments.device,
            self._scratch / "images",
            batch=point.batch,
            clients=self._arguments.clients,
            cases=self._arguments.cases,
            rounds=self._arguments.rounds,
            shapes=self._arguments.shapes,
            has_time=lambda: self.left_s > _AFTER_CASES_S,
        )
        self.document["cases"].append(point.describe() | found)
        print(f"  {found['times_sooner_than_stock']} times sooner than stock, {found['seconds']}")

    def _tidy(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self._arguments.device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``results/gpu_backends.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--quick", action="store_true", help="tiny networks, for a trial without a GPU")
    parser.add_argument("--budget-s", type=float, default=330, help="what does not fit is listed as skipped")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--cases", type=int, default=8, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    options.seconds, options.matmul, options.shapes = 0.3, _SIZE, SHAPES
    kinds, sizes = ["standard", "ResEnc-M"], [64, 96, 128]
    if options.quick:
        options.seconds, options.matmul, options.shapes = 0.05, 256, ((40, 44, 36), (32, 36, 40))
        kinds, sizes = ["tiny"], [16, 24]
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as name:
        os.environ[RUNTIME_DIR_VARIABLE] = f"{name}/engines"
        run = Run(options, Path(name))
        print(run.document["machine"], run.document["peak"], sep="\n", flush=True)
        for kind, point in steps(kinds, sizes):
            run.step(kind, point)
    return int(not run.document["points"])


if __name__ == "__main__":
    sys.exit(main())
