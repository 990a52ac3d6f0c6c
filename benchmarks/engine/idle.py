"""What an idle model costs: the memory that unloading its networks gives back, and the seconds that loading them takes.

Two engines serve the same five folds of nnU-Net's usual U-Net, untrained: one keeps its networks, the other unloads
them as soon as it has nothing to do. Each gets the same small case in turns, one patch for each fold. The second has to
load first, with nothing to hide that behind: in a server the image is decoded and preprocessed meanwhile. What the
load consists of is measured apart, in this process; and what an engine that was not there at all would cost.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import psutil
import torch

from benchmarks.harness.material import Material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread, two_or_more
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.golden import check_golden, load_networks, read_golden
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.engine.tally import Level, TallyReader
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve.open_weights import OpenWeights
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.chaos import engine_processes, family, wait_for
from support.untrained import standard_unet

USUAL_PATCH = 64
"""Half of nnU-Net's usual patch along each axis: the weights are the same, and the passes fast enough for a CPU."""

LEAST_GIVEN_BACK = 0.9
"""Of the weights' size."""

FOLDS = 5
CPU = torch.device("cpu")

_UNLOAD_AFTER_S = 2.0
"""Longer than an engine waits before it gives back what its last pass took."""

_SETTLE_S = 1.5
"""As long for the one that keeps its networks."""

_MIB = 2**20


class Engine:
    """An engine process of its own."""

    def __init__(self, bundle: ModelBundle, runtime: Path, unload_after_s: float | None) -> None:
        """Start it; ``start_s`` is how long that took."""
        before = engine_processes(runtime)
        self._tallies: list[TallyReader] = []
        began = time.monotonic()
        self.remote = RemoteEngine(bundle, CPU, unload_after_s=unload_after_s, on_tally=self._watch)
        self.start_s = time.monotonic() - began
        [self.process] = [each for each in engine_processes(runtime) if each not in before]

    def _watch(self, descriptor: int, process: int) -> None:
        self._tallies.append(TallyReader(descriptor, os.dup(process)))

    @property
    def loaded(self) -> bool:
        """Whether it has its networks in memory."""
        return self._tallies[-1].level(Level.NETWORKS_LOADED) == 1

    @property
    def resident_mib(self) -> float:
        """MiB of the machine's memory."""
        return round(psutil.Process(self.process.pid).memory_info().rss / _MIB, 1)

    def close(self) -> None:
        """Leave it."""
        self.remote.disconnect()
        for tally in self._tallies:
            tally.close()


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_requests(bundle: ModelBundle, runtime: Path, repetitions: int, quiet: Callable[[], None]) -> dict[str, Any]:
    """The same case on both engines in turns: seconds, the memory of both while idle, and whether answers differ."""
    settings = Settings(bundle.lead.name, bundle.lead.folds, (), 0.5, use_gaussian=True)
    case = torch.randn((1, *bundle.lead.patch_size), generator=torch.Generator().manual_seed(0))
    quiet()
    kept = Engine(bundle, runtime, None)
    quiet()
    idle = Engine(bundle, runtime, _UNLOAD_AFTER_S)
    expected = kept.remote.predict(case, settings).logits
    seconds: dict[str, list[float]] = {"loaded": [], "unloaded": []}
    before_first_pass: dict[str, list[float]] = {"loaded": [], "unloaded": []}
    resident: dict[str, list[float]] = {"loaded": [], "unloaded": []}
    equal = True
    for number in range(repetitions):
        for engine in (kept, idle) if number % 2 else (idle, kept):
            wait_for(lambda: not idle.loaded)
            time.sleep(_SETTLE_S)
            quiet()
            name = "loaded" if engine is kept else "unloaded"
            resident["loaded"].append(kept.resident_mib)
            resident["unloaded"].append(idle.resident_mib)
            began = time.perf_counter()
            answer = engine.remote.predict(case, settings)
            seconds[name].append(time.perf_counter() - began)
            before_first_pass[name].append(answer.queue_s)
            equal = equal and torch.equal(answer.logits, expected)
    found = {
        "answers_equal": equal,
        "request_seconds": seconds,
        "before_the_first_pass_seconds": before_first_pass,
        "request_spread_seconds": {name: spread(values) for name, values in seconds.items()},
        "engine_resident_mib": resident,
        "engine_resident_spread_mib": {name: spread(values) for name, values in resident.items()},
        "engine_start_seconds": [kept.start_s, idle.start_s],
    }
    for engine in (kept, idle):
        engine.close()
    wait_for(lambda: not family(runtime))
    return found


def measure_parts(bundle: ModelBundle, repetitions: int, quiet: Callable[[], None]) -> dict[str, Any]:
    """Seconds of the parts of a load, in this process."""
    networks, golden = load_networks(bundle, CPU), read_golden(bundle)
    weights = OpenWeights(bundle.members.values(), bundle.description.files)
    folds = [(name, fold) for name, member in bundle.members.items() for fold in member.folds]
    parts: dict[str, list[float]] = {"read and checksum": [], "load, reading included": [], "golden patch": []}
    for _ in range(repetitions):
        quiet()
        networks.unload()
        parts["read and checksum"].append(seconds_of(lambda: [weights.read(*fold) for fold in folds]))
        parts["load, reading included"].append(seconds_of(lambda: networks.load(weights)))
        parts["golden patch"].append(seconds_of(lambda: check_golden(networks, golden)))
    return {name: spread(values) for name, values in parts.items()}


def main() -> int:
    """Measure, write ``results/idle.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=two_or_more, default=7)
    parser.add_argument("--patch", type=int, default=USUAL_PATCH, help="voxels along each axis, a multiple of 32")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    quiet = (lambda: None) if arguments.quick else wait_for_quiet
    with tempfile.TemporaryDirectory(prefix="bench-idle-") as folder:
        scratch, runtime = Path(folder), Path(folder) / "engines"
        model = standard_unet(scratch, patch_size=(arguments.patch,) * 3, folds=FOLDS)
        material = Material(f"untrained: nnU-Net's usual U-Net, {FOLDS} folds", model, model, model)
        [archive] = make_archives(ArchiveRequest(model, scratch / "store"))
        zipfile.ZipFile(archive).extractall(scratch / "model")
        bundle = ModelBundle(scratch / "model")
        weights_mib = sum(file.stat().st_size for file in bundle.folder.glob("members/*/fold_*.safetensors")) / _MIB
        with mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: str(runtime)}):
            requests = measure_requests(bundle, runtime, arguments.repetitions, quiet)
        parts = measure_parts(bundle, arguments.repetitions, quiet)
    median = {name: values["median"] for name, values in requests["request_spread_seconds"].items()}
    resident = {name: values["median"] for name, values in requests["engine_resident_spread_mib"].items()}
    loading_s, given_back = median["unloaded"] - median["loaded"], resident["loaded"] - resident["unloaded"]
    for name, seconds in median.items():
        print(f"  {name}: a request takes {seconds:.2f} s, the idle engine {resident[name]:.0f} MiB")
    for name, values in parts.items():
        print(f"    {values['median']:7.2f} s for {name}")
    measured = {
        "options": {"folds": list(range(FOLDS)), "use_mirroring": False},
        "patch": arguments.patch,
        "weights_mib": round(weights_mib, 1),
        "given_back_mib": round(given_back, 1),
        "loading_adds_seconds": round(loading_s, 3),
        **requests,
        "parts_of_a_load_seconds": parts,
    }
    share, start_s = given_back / weights_mib, min(requests["engine_start_seconds"])
    claims = f"unloading gives back at least {LEAST_GIVEN_BACK:g} of the weights' memory"
    targets = [
        Target(claims, share, share >= LEAST_GIVEN_BACK),
        Target(
            "answers after a load are those before, to the bit",
            float(requests["answers_equal"]),
            requests["answers_equal"],
        ),
        Target("loading again takes less than an engine's start; seconds", loading_s, loading_s < start_s),
    ]
    return write_results("idle", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
