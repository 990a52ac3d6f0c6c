"""How long the networks wait between two forward passes while there is work for them.

The engine runs as it is, in a process of its own, with its sockets, its admission and its main thread; only
stopwatches are put around the forward pass, the accumulation, and the laying out of a new case's weights. Threads of
this process are its workers: each has a connection and hands in case after case, so that several are in flight.

The gap of a pass is the time before it, and between it and its accumulation, in which a patch could run and neither a
forward pass nor an accumulation did. Taking in a new case and handing over a finished one count as gaps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import torch

from benchmarks import ROOT
from benchmarks.harness.material import CONFIGURATION, FOLD, Material, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import percentile_95, spread, two_or_more
from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Price, Settings
from nnunet_torchserve.engine import process
from nnunet_torchserve.engine.accumulator import CaseAccumulator, Float32Accumulator, HalfAccumulator
from nnunet_torchserve.engine.backends.eager import EagerNetworks
from nnunet_torchserve.engine.core import CaseInFlight, EngineCore
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve.tiling import count_windows
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.untrained import standard_unet

MOST_OF_A_FORWARD = 0.05
WORKERS = 4
CLASSES_LARGE = 117
"""Of TotalSegmentator."""

GRID = (94, 116, 98)
"""(z, y, x) of a case: a head at 2 mm."""

_LEAVES_WITHIN_S = 60


class Kind(StrEnum):
    """What a stopwatch saw."""

    ARRIVED = "arrived"
    LEFT = "left"
    FORWARD = "forward"
    ADD = "add"
    LAY_OUT = "lay_out"


@dataclass(frozen=True, slots=True)
class Event:
    """One reading; seconds of ``time.monotonic``.

    Attributes:
        kind: a case arrived (``began`` is when its submission was read) or left, or one of the three kinds of work.
        began, ended: when.
        case_id: of the case that arrived or left.
    """

    kind: Kind
    began: float
    ended: float
    case_id: int = -1


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass and what followed it; seconds.

    Attributes:
        forward: the network.
        add: weighting and accumulation.
        gap: see the module.
        gap_without_lay_out: the same without the laying out of new cases' weights.
    """

    forward: float
    add: float
    gap: float
    gap_without_lay_out: float


def passes_of(events: Iterable[Event]) -> list[Pass]:
    """The passes in their order, but for the last one, whose end nothing marks."""
    passes: list[Pass] = []
    in_flight: dict[int, float] = {}
    free_since: float | None = None
    forward_s = add_s = gap_s = laid_out_s = next_laid_out_s = 0.0
    for event in events:
        seconds = event.ended - event.began
        if event.kind is Kind.ARRIVED:
            in_flight[event.case_id] = event.began
        elif event.kind is Kind.LEFT:
            del in_flight[event.case_id]
        elif event.kind is Kind.LAY_OUT:
            next_laid_out_s += seconds
        elif event.kind is Kind.ADD:
            assert free_since is not None
            gap_s += event.began - free_since
            add_s += seconds
            free_since = event.ended
        elif in_flight:  # or else it is the golden patch's
            if free_since is not None:
                passes.append(Pass(forward_s, add_s, gap_s, max(0.0, gap_s - laid_out_s)))
            runnable_since = min(in_flight.values())
            gap_s = 0.0 if free_since is None else event.began - max(free_since, runnable_since)
            forward_s, add_s, laid_out_s, next_laid_out_s = seconds, 0.0, next_laid_out_s, 0.0
            free_since = event.ended
    return passes


def run_engine(folder: Path, model_dir: Path, settings: str, readings: Path) -> int:
    """Be the engine, with stopwatches; write their readings when the last worker has left."""
    events: list[tuple[str, float, float, int]] = []

    def timed(kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            began = monotonic()
            try:
                return function(*arguments, **named)
            finally:
                events.append((kind, began, monotonic(), -1))

        return call

    admit, drop = EngineCore.admit, EngineCore.drop

    def noted_admit(core: EngineCore, case: CaseInFlight) -> None:
        admit(core, case)
        events.append((Kind.ARRIVED, case.arrived, monotonic(), case.case_id))

    def noted_drop(core: EngineCore, case_id: int) -> bool:
        was_there = drop(core, case_id)
        if was_there:
            events.append((Kind.LEFT, monotonic(), monotonic(), case_id))
        return was_there

    replaced: list[tuple[Any, str, Any]] = [
        (process, "_detach", lambda _folder: None),  # it stays this process
        (EagerNetworks, "forward", timed(Kind.FORWARD, EagerNetworks.forward)),
        (HalfAccumulator, "add", timed(Kind.ADD, HalfAccumulator.add)),
        (Float32Accumulator, "add", timed(Kind.ADD, Float32Accumulator.add)),
        (CaseAccumulator, "__init__", timed(Kind.LAY_OUT, CaseAccumulator.__init__)),
        (EngineCore, "admit", noted_admit),
        (EngineCore, "drop", noted_drop),
    ]
    with ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        status = process.main(folder, model_dir, settings)
    readings.write_text(json.dumps(events))
    return status


@contextmanager
def timed_engine(bundle: ModelBundle, workers: int, scratch: Path) -> Iterator[tuple[list[RemoteEngine], Path]]:
    """Workers' connections to a new engine, and where its readings are once the context is left."""
    readings = scratch / "readings.json"
    started: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
        if not started:
            python, minus_m, _module, *arguments = command
            own = [python, minus_m, "benchmarks.engine.gap", "--be-the-engine", *arguments, str(readings)]
            started.append(subprocess.Popen(own, cwd=ROOT, env=env))

    with mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: str(scratch / "engines")}):
        connections: list[RemoteEngine] = []
        try:
            with mock.patch.object(subprocess, "run", start):  # they start the engine as ever, but through this
                connections += [RemoteEngine(bundle, torch.device("cpu")) for _ in range(workers)]
            yield connections, readings
        finally:
            for connection in connections:
                connection.disconnect()
            for engine in started:
                engine.wait(_LEAVES_WITHIN_S)


def measure(model_folder: Path, cases: int, scratch: Path) -> dict[str, Any]:
    """Saturate the engine of a model with ``cases`` cases; what its passes were like."""
    scratch.mkdir()
    [archive] = make_archives(ArchiveRequest(model_folder, scratch, folds=(FOLD,)))
    zipfile.ZipFile(archive).extractall(scratch / "model")
    bundle = ModelBundle(scratch / "model")
    settings = Settings(bundle.lead.name, folds=(FOLD,), mirroring_axes=(), tile_step_size=0.5, use_gaussian=True)
    patches = count_windows(GRID, bundle.lead.patch_size, settings.tile_step_size)
    price = Price(GRID, patches, patches, bytes=1, preprocess_s=0, export_s=0)
    left = iter(range(cases))
    lock = threading.Lock()

    def work(engine: RemoteEngine) -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            noise = torch.randn((1, *GRID), generator=torch.Generator().manual_seed(number))
            with engine.reserve(price, None):
                engine.predict(noise, settings)

    with timed_engine(bundle, WORKERS, scratch) as (engines, readings):
        engines[0].predict(torch.zeros((1, *GRID)), settings)  # the first case is not counted
        began = monotonic()
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(work, engines))
    events = [Event(Kind(kind), *reading) for kind, *reading in json.loads(readings.read_text())]
    passes = passes_of(event for event in events if event.ended >= began)
    forward = statistics.median(each.forward for each in passes)
    shares = [each.gap / forward for each in passes]
    without = [each.gap_without_lay_out / forward for each in passes]
    return {
        "patch_size": bundle.lead.patch_size,
        "classes": bundle.lead.classes,
        "grid": GRID,
        "cases": cases,
        "patches_of_a_case": patches,
        "passes_ms": [" ".join(f"{1000 * value:.3f}" for value in astuple(each)) for each in passes],
        "columns_of_passes_ms": [each.name for each in fields(Pass)],
        "forward_seconds": spread([each.forward for each in passes]),
        "add_seconds": spread([each.add for each in passes]),
        "gap_seconds": spread([each.gap for each in passes]),
        "gap_p95_of_a_forward_pass": percentile_95(shares),
        "gap_p95_of_a_forward_pass_without_lay_out": percentile_95(without),
        "gaps_share_of_all_time": sum(each.gap for each in passes)
        / sum(each.forward + each.add + each.gap for each in passes),
    }


def main() -> int:
    """Measure, write ``results/gap.json``."""
    if sys.argv[1:2] == ["--be-the-engine"]:
        folder, model_dir, settings, readings = sys.argv[2:]
        return run_engine(Path(folder), Path(model_dir), settings, Path(readings))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=two_or_more, default=24, help="of the small network")
    parser.add_argument("--cases-large", type=two_or_more, default=8, help="of the one with many classes")
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory(prefix="bench-gap-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        models = {
            "small": (material.model_folder, arguments.cases),
            f"{CLASSES_LARGE} classes": (many_classes(material, scratch), arguments.cases_large),
        }
        for name, (model, cases) in models.items():
            if not arguments.quick:
                wait_for_quiet()
            found[name] = measure(model, cases, scratch / name.replace(" ", "-"))
            print(f"  {name}: forward {found[name]['forward_seconds']}, gap {found[name]['gap_seconds']}")

    targets = []
    for name, each in found.items():
        share = each["gap_p95_of_a_forward_pass"]
        claim = f"{name}: gap between passes, p95 at most {MOST_OF_A_FORWARD:.0%} of a forward pass (fraction)"
        targets.append(Target(claim, share, share <= MOST_OF_A_FORWARD))
    measured = {
        "threads": torch.get_num_threads(),
        "workers": WORKERS,
        "weights": f"the small network's are trained; those of {CLASSES_LARGE} classes are random, which does not "
        "change the time of a pass",
        "networks": found,
    }
    return write_results("gap", material, measured, targets)


def many_classes(material: Material, scratch: Path) -> Path:
    """An untrained model of the small network's patch, spacing and features, with many classes."""
    plans = json.loads((material.model_folder / "plans.json").read_text())["configurations"][CONFIGURATION]
    return standard_unet(
        scratch / "untrained",
        features=plans["architecture"]["arch_kwargs"]["features_per_stage"],
        patch_size=plans["patch_size"],
        spacing=plans["spacing"][0],
        classes=CLASSES_LARGE,
    )


if __name__ == "__main__":
    sys.exit(main())
