"""What other backends than eager gain on this machine's processor, and how far from eager's their answers are.

Parts, each written to the result file when it is done, with its own date, commit and processor:

* ``patches``: one patch of nnU-Net's standard network (32 to 320 features) and of ResEnc-M, untrained, by eager and by
  every backend in turns, for three sizes; with the share of what the processor reaches in a large matrix product.
* ``cold_start``: seconds until a graph is compiled, and the same from OpenVINO's own cache.
* ``accuracy``: archives of the trained models for each backend; their answers beside eager's and the labels.
* ``request``: a whole warm request at 1 mm by a live server for each backend, and by stock's predictor, loaded.
* ``request_40``: the same for a model of 40 classes, where less of the time is the network's.
* ``mixture``: 64 requests of mixed sizes by eight clients, beside stock's predictor one after another.

All of a machine's threads, as an engine has them. ``--parts`` chooses, ``--resume`` leaves out what the file has. What
this machine cannot run is noted with the reason. Repetitions are bound by time: about 20 minutes in all on two cores,
and some more when the model of 40 classes must be trained first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `serve` sets it; read when torch is loaded

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.engine.backends import models
from benchmarks.engine.backends.archives import Archives, Trained, accuracy_of
from benchmarks.engine.backends.cold_start import measure_cold_start
from benchmarks.engine.backends.networks import NETWORKS, Untrained, measure_patch
from benchmarks.engine.backends.peak import peaks, shares
from benchmarks.engine.backends.requests import Servers, measure_mixture, measure_request, servers_of
from benchmarks.engine.backends.targets import targets_of
from benchmarks.engine.backends.turns import Turns
from benchmarks.harness import provenance
from benchmarks.harness.material import Material, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import print_targets, save_results
from benchmarks.models import many_classes
from nnunet_torchserve.backend import Backend, parse_backend
from nnunet_torchserve_tools.errors import ToolError

OTHERS = tuple(backend for backend in Backend if backend.startswith("openvino"))
SIZES = (64, 96, 128)
_MOST_ROUNDS = 9
_PATCH_BUDGET_S, _REQUEST_BUDGET_S = 20.0, 45.0
_MIXED_REQUESTS, _MIXED_PARTS = 64, 4
_TRIALS = ROOT / ".nnunet-torchserve"


class Part(StrEnum):
    """What is measured."""

    PATCHES = "patches"
    COLD_START = "cold_start"
    ACCURACY = "accuracy"
    REQUEST = "request"
    REQUEST_40 = "request_40"
    MIXTURE = "mixture"


@dataclass(slots=True)
class Run:
    """One run of the benchmark.

    Attributes:
        material: what is segmented.
        scratch: for everything that is made.
        backends: beside eager.
        sizes: of patches, voxels along each axis.
        quick: a trial on small things.
        parts: what the file has, and what is added.
        resume: leave out what is there.
        archives: of all models and backends.
    """

    material: Material
    scratch: Path
    backends: Sequence[Backend]
    sizes: Sequence[int]
    quick: bool
    parts: dict[str, Any]
    resume: bool
    archives: Archives

    @property
    def quiet(self) -> Callable[[], None]:
        """Returns when the machine idles."""
        return (lambda: None) if self.quick else wait_for_quiet

    def put(self, part: Part, found: Mapping[str, Any]) -> None:
        """Keep a part, and write the file."""
        self.parts[part] = {"date": provenance.now(), **provenance.commit(), **provenance.cpu(), **found}
        measured = {"threads": torch.get_num_threads(), "parts": self.parts}
        folder = _TRIALS if self.quick else RESULTS
        save_results("backends", self.material, measured, targets_of(self.parts), folder)

    def turns(self, budget_s: float) -> Turns:
        """Rounds in so much time."""
        return Turns(2 if self.quick else _MOST_ROUNDS, 0.0 if self.quick else budget_s, self.quiet)

    def patches(self) -> None:
        """Each network and size, each written at once."""
        found: dict[str, Any] = {"networks": {}}
        found |= self.parts.get(Part.PATCHES, {}) if self.resume else {}
        if "peaks" not in found:
            self.quiet()
            found["peaks"] = peaks()
            for measured in found["networks"].values():
                measured["share_of_peak"] = shares(measured, found["peaks"])
            self.put(Part.PATCHES, found)
        for kind in NETWORKS:
            for size in self.sizes:
                network = Untrained(kind, size)
                if str(network) in found["networks"]:
                    continue
                with tempfile.TemporaryDirectory(dir=self.scratch) as place:
                    measured = measure_patch(network, self.backends, self.turns(_PATCH_BUDGET_S), Path(place))
                found["networks"][str(network)] = measured | {"share_of_peak": shares(measured, found["peaks"])}
                self.put(Part.PATCHES, found)
                print(f"  {network}: {_told(measured['times_sooner'])}", flush=True)

    def cold_start(self) -> None:
        """The model of requests, and the largest standard network."""
        largest = Untrained("standard", max(self.sizes))
        with tempfile.TemporaryDirectory(dir=self.scratch) as place:
            folder = Path(place)
            of = {"requests' model": models.tissue(self.material).folder, str(largest): largest.write(folder / "model")}
            backends = [each for each in self.backends if each is not Backend.OPENVINO_INT8]
            found = {
                name: measure_cold_start(model, backends, folder / str(n)) for n, (name, model) in enumerate(of.items())
            }
        self.put(Part.COLD_START, {"models": found})

    def accuracy(self) -> None:
        """Each model by each backend."""
        found: dict[str, Any] = {}
        for model in [self._tissue()] if self.quick else models.all_of(self.material):
            found[model.title] = {}
            for backend in self.backends:
                try:
                    found[model.title][str(backend)] = accuracy_of(self.archives.report(model, backend))
                except ToolError as error:
                    found[model.title][str(backend)] = {"not_run": str(error)}
                self.put(Part.ACCURACY, {"models": found, "made_in_seconds": self.archives.made_s})
                told = found[model.title][str(backend)]
                print(f"  {model.title}, {backend}: {told.get('different_voxels', told)}", flush=True)

    def requests(self, wanted: Sequence[Part]) -> None:
        """One at a time, and many at once, by the same servers."""
        model = self._tissue()
        image = model.images[0] if self.quick else self.material.fine
        with self._servers(model, "tissue", model.images[0]) as servers:
            if Part.REQUEST in wanted:
                self._request(Part.REQUEST, servers, image)
            if Part.MIXTURE in wanted:
                count, parts = (4, 2) if self.quick else (_MIXED_REQUESTS, _MIXED_PARTS)
                found = measure_mixture(servers, self.material, count, parts, self.quiet, self.scratch / "mixture")
                self.put(Part.MIXTURE, found)
                print(f"  {count} mixed requests, times stock: {found['times_stock']}", flush=True)

    def request_40(self) -> None:
        """One at a time, of 40 classes."""
        model = models.forty_classes(self.scratch)
        image = many_classes.write_template(self.scratch, 1.0)
        with self._servers(model, "many", model.images[0]) as servers:
            self._request(Part.REQUEST_40, servers, model.images[0] if self.quick else image)

    def _tissue(self) -> Trained:
        model = models.tissue(self.material)
        return models.small(model, self.scratch / "small") if self.quick else model

    def _servers(self, model: Trained, name: str, check: Path) -> AbstractContextManager[Servers]:
        return servers_of(model, self.backends, self.archives, self.scratch / name, check)

    def _request(self, part: Part, servers: Servers, image: Path) -> None:
        found = measure_request(servers, image, self.turns(_REQUEST_BUDGET_S), self.scratch / part)
        self.put(part, found)
        print(f"  {part}, times sooner than eager: {_told(found['times_sooner'])}", flush=True)

    def all(self, wanted: Sequence[Part]) -> None:
        """The parts that are asked for, in their order; patches go on where they ended."""
        missing = [part for part in wanted if not (self.resume and part in self.parts)]
        if Part.PATCHES in wanted:
            self.patches()
        if Part.COLD_START in missing:
            self.cold_start()
        if Part.ACCURACY in missing:
            self.accuracy()
        if {Part.REQUEST, Part.MIXTURE} & set(missing):
            self.requests(missing)
        if Part.REQUEST_40 in missing:
            self.request_40()


def _told(ratios: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in ratios.items())


def main() -> int:
    """Measure, write ``results/backends.json`` after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", type=Part, choices=list(Part), default=list(Part), metavar="PART")
    parser.add_argument("--backends", nargs="+", type=parse_backend, default=OTHERS, help=", ".join(OTHERS))
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="voxels along each axis of a patch")
    parser.add_argument("--resume", action="store_true", help="leave out what the result file has already")
    parser.add_argument(
        "--quick", action="store_true", help=f"a trial: small things, no waits; writes to {_TRIALS.name}/"
    )
    chosen = parser.parse_args()
    file = (_TRIALS if chosen.quick else RESULTS) / "backends.json"
    before = json.loads(file.read_text()).get("parts", {}) if file.exists() else {}
    with tempfile.TemporaryDirectory(prefix="bench-backends-") as folder:
        scratch = Path(folder)
        run = Run(
            find_material(scratch),
            scratch,
            tuple(chosen.backends),
            tuple(chosen.sizes),
            chosen.quick,
            before,
            chosen.resume,
            Archives(scratch / "archives"),
        )
        run.all(chosen.parts)
    return print_targets(targets_of(run.parts))


if __name__ == "__main__":
    sys.exit(main())
