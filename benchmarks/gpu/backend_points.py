"""Patches a second of one network by each way of running it, with the backends of the engine themselves."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ROOT
from benchmarks.gpu.gpu_engine import alone, back_to_back, spread
from benchmarks.models.untrained_networks import FOLD, Network, staged
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.engine.backends.compile_cache import compile_cache
from nnunet_torchserve.engine.backends.compiled_networks import CompiledNetworks
from nnunet_torchserve.engine.backends.cuda_graph import CapturedPasses, Pass
from nnunet_torchserve.engine.backends.eager import EagerNetworks, build_network

SEED = 20261129
_FEWEST, _MOST = 5, 40
_MOST_PATCHES = 8


class How(StrEnum):
    """A way to run a network."""

    EAGER = "eager"
    EAGER_GRAPH = "eager, CUDA graph"
    COMPILED = "compiled"
    """The backend: on CUDA with CUDA graphs."""

    COMPILED_ALONE = "compiled, no CUDA graph"


@dataclass(frozen=True, slots=True)
class Point:
    """A batch of a network in one number format of autocast, in each of some ways."""

    network: Network
    dtype: str
    batch: int
    ways: tuple[How, ...]

    def describe(self) -> dict[str, object]:
        """For the result file."""
        return {"network": self.network.kind, "patch": self.network.size, "autocast": self.dtype, "batch": self.batch}


class Bench:
    """The networks that were loaded, and what eager makes of some patches."""

    def __init__(self, device: torch.device, scratch: Path, seconds: float, peaks: dict[str, float]) -> None:
        """Start with none.

        Args:
            device: where networks run.
            scratch: for archives.
            seconds: that a way is timed for.
            peaks: TFLOP/s of a matrix product in each number format.
        """
        self.device = device
        self._scratch, self._seconds, self._peaks = scratch, seconds, peaks
        self._bundles: dict[Network, ModelBundle] = {}
        self._eager: dict[Network, EagerNetworks] = {}
        self._flops: dict[Network, int] = {}
        self._expected: dict[Network, torch.Tensor] = {}

    def bundle(self, network: Network, *, golden: bool = False) -> ModelBundle:
        """The network's archive; it is made at the first call, which says whether it has a golden patch."""
        if network not in self._bundles:
            place = self._scratch / f"{network.kind}_{network.size}"
            self._bundles[network] = staged(network.write(place, classes=4), place / "stage", golden=golden)
        return self._bundles[network]

    def measure(self, point: Point, note: Callable[[dict[str, Any]], None]) -> None:
        """Time each way of a point.

        Args:
            point: what to run.
            note: gets a row of the result for each way.
        """
        networks = self._loaded(point.network)
        with torch.inference_mode():
            self._measure(point, networks, note)

    def _measure(self, point: Point, networks: EagerNetworks, note: Callable[[dict[str, Any]], None]) -> None:
        patches = torch.randn(
            (_MOST_PATCHES, networks.input_channels, *networks.patch_size),
            generator=torch.Generator().manual_seed(SEED),
        )[: point.batch].to(self.device)
        compiled: CompiledNetworks | None = None
        for how in point.ways:
            if how is How.EAGER_GRAPH and self.device.type != "cuda":
                continue
            began = time.perf_counter()
            if how in {How.COMPILED, How.COMPILED_ALONE} and compiled is None:
                cache = compile_cache(self.bundle(point.network).digest, self.device)
                compiled = CompiledNetworks(networks, point.batch, cache)
            run = self._run(how, networks, compiled, patches)
            logits = run(patches)
            self._synchronize()
            prepared_s = time.perf_counter() - began
            row = point.describe() | {"how": str(how), "prepared_s": round(prepared_s, 2)}
            note(row | self._compared(point, logits) | self._timed(point, partial(run, patches)))

    def _loaded(self, network: Network) -> EagerNetworks:
        if network not in self._eager:
            lead = self.bundle(network).lead
            self._eager[network] = networks = EagerNetworks(lead, self.device)
            with torch.no_grad(), FlopCounterMode(display=False) as counted:
                with torch.device("meta"):
                    module = build_network(lead, networks.input_channels, networks.classes)
                module.eval()(torch.empty((1, networks.input_channels, *networks.patch_size), device="meta"))
            self._flops[network] = int(counted.get_total_flops())
        return self._eager[network]

    def _run(self, how: How, eager: EagerNetworks, compiled: CompiledNetworks | None, patches: torch.Tensor) -> Pass:
        if how is How.EAGER:
            return partial(eager.forward, FOLD)
        if how is How.EAGER_GRAPH:
            return partial(CapturedPasses({FOLD: partial(eager.forward, FOLD)}, patches.clone()), FOLD)
        assert compiled is not None
        return partial(compiled.forward if how is How.COMPILED else compiled.uncaptured, FOLD)

    def _compared(self, point: Point, logits: torch.Tensor) -> dict[str, float]:
        """How far the logits are from those of the first way that ran the network: eager, in float16 on CUDA."""
        if point.network not in self._expected:
            assert point.ways[0] is How.EAGER, point
            self._expected[point.network] = logits.clone()
        expected = self._expected[point.network]
        count = min(len(logits), len(expected))
        theirs, ours = expected[:count].float(), logits[:count].float()
        return {
            "labels_different": float((theirs.argmax(1) != ours.argmax(1)).float().mean()),
            "largest_difference_of_largest_logit": float((theirs - ours).abs().max() / theirs.abs().max()),
        }

    def _timed(self, point: Point, call: Callable[[], object]) -> dict[str, Any]:
        count = min(max(int(self._seconds / alone(call, self.device)), _FEWEST), _MOST)
        intervals = back_to_back(call, self.device, count)
        rate = point.batch / statistics.median(intervals)
        peak = self._peaks[point.dtype] * 1e12
        return {
            "patches_per_s": round(rate, 2),
            "ms_per_batch": spread([1000 * each for each in intervals]),
            "fraction_of_peak": round(rate * self._flops[point.network] / peak, 4),
            "repeats": count,
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def compile_again(bundle: ModelBundle, device: torch.device, batch: int) -> dict[str, float]:
    """Seconds until a new process has compiled networks, from the cache that this one has filled; imports left out."""
    command = [sys.executable, "-m", __name__, str(bundle.folder), str(device), str(batch)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        msg = f"a second process does not compile: {ran.stderr[-500:]}"
        raise RuntimeError(msg)
    eager_s, compiled_s = map(float, ran.stdout.split()[-2:])
    return {"load_s": eager_s, "compile_from_cache_s": compiled_s}


def main() -> int:
    """What :func:`compile_again` starts."""
    folder, device_name, batch = sys.argv[1:]
    device, bundle = torch.device(device_name), ModelBundle(Path(folder))
    torch.backends.cudnn.benchmark = True
    began = time.perf_counter()
    networks = EagerNetworks(bundle.lead, device)
    loaded = time.perf_counter()
    CompiledNetworks(networks, int(batch), compile_cache(bundle.digest, device))
    print(round(loaded - began, 2), round(time.perf_counter() - loaded, 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
