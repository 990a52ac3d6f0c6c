"""What the benchmarks share: the case material, a live server and its client, and one shape of result file.

Most benchmarks compare a request, from an image file to a segmentation file, with stock nnU-Net on the same file. All
run on the CPU, one after the other, so that what is not measured is idle; with fold 0 and without mirroring unless
they say otherwise.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from unittest import mock

import httpx
import nibabel as nib
import numpy as np
import numpy.typing as npt
import psutil
from scipy.ndimage import zoom

from nnunet_torchserve.environment import RUNTIME_DIR_VARIABLE
from nnunet_torchserve.options import HEADER, FoldName
from nnunet_torchserve.telemetry import SERVER_TIMING
from nnunet_torchserve_tools import launcher
from nnunet_torchserve_tools.archive import ArchiveRequest, ServingSettings, make_archives

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from support.chaos import ChaosServer, family, wait_for
from support.server import LiveServer

Result = TypeVar("Result")

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MATERIAL_VARIABLE = "NNUNET_TORCHSERVE_MATERIAL"
FOLD = 0
TRAINER, PLANS, CONFIGURATION = "nnUNetTrainer", "nnUNetPlans", "3d_fullres"
OPTIONS = {"folds": [FOLD], "use_mirroring": False}

MODEL = "benchmark"
"""The name that every served model gets."""

_TRAINED = f"{TRAINER}__{PLANS}__{CONFIGURATION}"
_VERSIONS = ("nnunet-torchserve", "nnunetv2", "torch", "torchserve", "numpy", "scipy", "SimpleITK", "httpx")
_REQUEST_TIMEOUT_S = 600
_QUIET_PERCENT = 10
_QUIET_SAMPLE_S = 0.5
_QUIET_PATIENCE_S = 300
_DRAWS = 10_000
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Material:
    """A trained model and one head at two resolutions.

    Attributes:
        source: what was used, for the result file.
        model_folder: nnU-Net's ``TRAINER__PLANS__CONFIGURATION`` folder.
        fine, coarse: T1 images (.nii.gz) at 1 mm and 2 mm.
    """

    source: str
    model_folder: Path
    fine: Path
    coarse: Path


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what was measured."""

    claim: str
    measured: float
    met: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One request.

    Attributes:
        seconds: from before the image file is read until the answer is written.
        stages_ms: the server's own account (Server-Timing), milliseconds.
    """

    seconds: float
    stages_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Client:
    """Sends image files over kept connections, as many as there are threads that use it.

    Attributes:
        live: the server.
        http: to its inference address.
        runtime: where its engines have their directories.
    """

    live: LiveServer
    http: httpx.Client
    runtime: Path

    @property
    def processes(self) -> ChaosServer:
        """The server's processes, and what may be done to them."""
        return ChaosServer(self.live, self.runtime)

    def segment(self, image: Path, answer: Path, options: Mapping[str, object] = OPTIONS) -> Answer:
        """Send ``image`` as the raw body and write what comes back to ``answer``.

        Raises:
            RuntimeError: the server did not answer 200.
        """
        started = time.perf_counter()
        response = self.post(image.read_bytes(), options)
        answer.write_bytes(response.content)
        seconds = time.perf_counter() - started
        if response.status_code != httpx.codes.OK:
            msg = f"the server answered {response.status_code}: {response.text[:500]}"
            raise RuntimeError(msg)
        return Answer(seconds, _stages(response.headers[SERVER_TIMING]))

    def status(self, body: bytes) -> int:
        """The HTTP status of the answer to ``body``."""
        return self.post(body).status_code

    def workers(self) -> list[psutil.Process]:
        """The processes that serve the model, without one that TorchServe still names although it is gone."""
        found = []
        for pid in self.processes.workers(MODEL):
            with suppress(psutil.NoSuchProcess, ValueError):
                found.append(psutil.Process(pid))
        return found

    def post(self, body: bytes, options: Mapping[str, object] = OPTIONS) -> httpx.Response:
        """The answer to ``body``, whatever it is."""
        return self.http.post(f"/predictions/{MODEL}", content=body, headers={HEADER: json.dumps(options)})


def find_material(scratch: Path) -> Material:
    """The material folder that the environment names, else the demo model and nilearn's template."""
    if folder := os.environ.get(MATERIAL_VARIABLE):
        dataset = "Dataset501_BrainTissue"
        images = Path(folder) / "images" / dataset
        return Material(
            source=f"material folder: {dataset} {CONFIGURATION}, test_000 (2 mm) and test_002 (1 mm)",
            model_folder=Path(folder) / "models" / dataset / _TRAINED,
            fine=images / "test_002_0000.nii.gz",
            coarse=images / "test_000_0000.nii.gz",
        )
    from train_model import load_template

    template = load_template("t1")
    fine, coarse = scratch / "template_1mm.nii.gz", scratch / "template_2mm.nii.gz"
    nib.save(template, fine)
    nib.save(resampled(template, 2.0), coarse)
    return Material(
        source="demo model, and the ICBM152 template of the installed nilearn (1 mm), resampled to 2 mm",
        model_folder=ROOT / "demo" / "model" / "Dataset811_BrainTissueDemo" / _TRAINED,
        fine=fine,
        coarse=coarse,
    )


def resampled(image: nib.Nifti1Image, spacing: float) -> nib.Nifti1Image:
    """``image`` (x, y, z) as int16 with cubic voxels of ``spacing`` mm, interpolated linearly."""
    old = image.header.get_zooms()[:3]
    voxels = zoom(np.asarray(image.dataobj, np.float32), [size / spacing for size in old], order=1)
    return nib.Nifti1Image(voxels.astype(np.int16), image.affine @ np.diag([*(spacing / size for size in old), 1.0]))


@contextmanager
def serving(
    model: Material | Path,
    scratch: Path,
    *,
    folds: tuple[FoldName, ...] | None = (FOLD,),
    workers: int | None = None,
    settings: ServingSettings | None = None,
    config: Path | None = None,
) -> Iterator[Client]:
    """A live server of a model, made from the working tree, whose engines share nothing with other servers.

    Args:
        model: what to serve, or its trained model folder.
        scratch: for the archive and the server's state; another one for each server that runs at the same time.
        folds: ``None`` takes all.
        workers: ``None`` takes the launcher's own number.
        settings: what the archive says of serving.
        config: another config.properties to start from.
    """
    folder = model.model_folder if isinstance(model, Material) else model
    store, state_dir, runtime = scratch / "model_store", scratch / "server", scratch / "engines"
    make_archives(ArchiveRequest(folder, store, folds=folds, name=MODEL, serving=settings or ServingSettings()))
    request = launcher.ServeRequest(
        store,
        state_dir=state_dir,
        ports=launcher.free_ports(),
        device=launcher.DeviceKind.CPU,
        workers=workers,
        config=config,
    )
    with mock.patch.dict(os.environ, {RUNTIME_DIR_VARIABLE: str(runtime)}):
        server = launcher.start(request)
        try:
            with httpx.Client(base_url=server.inference_url, timeout=_REQUEST_TIMEOUT_S, trust_env=False) as http:
                yield Client(LiveServer(server, state_dir), http, runtime)
        finally:
            launcher.stop(state_dir)
            wait_for(lambda: not family(runtime))  # an engine leaves some seconds after its last worker


def wait_for_quiet() -> None:
    """Return when the processors idle, so that a timing is not shared with other work; in the end even if not."""
    deadline = time.monotonic() + _QUIET_PATIENCE_S
    while psutil.cpu_percent(_QUIET_SAMPLE_S) > _QUIET_PERCENT and time.monotonic() < deadline:
        pass


def different_voxels(one: Path, other: Path) -> int:
    """Voxels in which two label maps differ.

    Raises:
        ValueError: they have different shapes.
    """
    first, second = (np.asarray(nib.load(file).dataobj) for file in (one, other))
    if first.shape != second.shape:
        msg = f"label maps of {first.shape} and {second.shape} cannot be compared"
        raise ValueError(msg)
    return int(np.count_nonzero(first != second))


def labels_of(answer: bytes) -> npt.NDArray[np.generic]:
    """The voxels (x, y, z) of a .nii.gz label map."""
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(answer)).dataobj)


def digest_of(labels: npt.NDArray[np.generic]) -> str:
    """The sha256 of a label map's voxels, as bytes in the order (x, y, z)."""
    return hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest()


def crop_at_random(image: nib.Nifti1Image, shape: Sequence[int], generator: np.random.Generator) -> nib.Nifti1Image:
    """A part of ``image`` (x, y, z) of that many voxels, at most the whole, from anywhere within it."""
    sizes = [min(size, whole) for size, whole in zip(shape, image.shape, strict=True)]
    starts = [int(generator.integers(whole - size + 1)) for size, whole in zip(sizes, image.shape, strict=True)]
    return image.slicer[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def small_shape(material: Material, patches: float) -> tuple[int, ...]:
    """Voxels (x, y, z) of ``material.coarse`` whose grid is ``patches`` times the network's patch along each axis."""
    plans = json.loads((material.model_folder / "plans.json").read_text())
    network = plans["configurations"][CONFIGURATION]
    inverse = plans["transpose_backward"]
    spacing_mm = [float(size) for size in nib.load(material.coarse).header.get_zooms()[:3]]
    extent_mm = [patches * n * size for n, size in zip(network["patch_size"], network["spacing"], strict=True)]
    return tuple(round(extent_mm[inverse[2 - axis]] / spacing_mm[axis]) for axis in range(3))


def describe_image(file: Path) -> dict[str, object]:
    """Shape (x, y, z), spacing (mm), type and size of an image file."""
    image = nib.load(file)
    return {
        "shape": list(image.shape),
        "spacing_mm": [round(float(size), 4) for size in image.header.get_zooms()],
        "voxel_type": str(image.get_data_dtype()),
        "file_type": ".nii.gz" if file.suffix == ".gz" else file.suffix,
        "file_bytes": file.stat().st_size,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    found = {"min": min(values), "q1": first, "median": middle, "q3": third, "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def interval_of_median(values: Sequence[float]) -> list[float]:
    """Where the median is with 95 % certainty: a percentile bootstrap."""
    draws = np.random.default_rng(0).choice(np.asarray(values), (_DRAWS, len(values)))
    return [round(float(each), 4) for each in np.percentile(np.median(draws, axis=1), (2.5, 97.5))]


def percentile_95(values: Sequence[float]) -> float:
    """The 95th percentile, interpolated."""
    return float(np.percentile(values, 95))


def with_extra_memory(work: Callable[[], Result]) -> tuple[Result, int]:
    """What ``work`` gives, and the peak of this process's memory meanwhile, above what it held before; Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set is from here on (man 5 proc)
    before = _status_bytes("VmRSS")
    result = work()
    return result, _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def stage_medians(answers: Sequence[Answer]) -> dict[str, float]:
    """The median of each stage, and of what no stage accounts for: TorchServe, HTTP and the client; milliseconds."""
    medians = {stage: statistics.median(a.stages_ms[stage] for a in answers) for stage in answers[0].stages_ms}
    outside = statistics.median(a.seconds * 1000 - sum(a.stages_ms.values()) for a in answers)
    return {name: round(value, 1) for name, value in (medians | {"outside_stages": outside}).items()}


def two_or_more(text: str) -> int:
    """An argparse type: how often something is measured; twice at least, so that there is a spread."""
    count = int(text)
    if count < 2:
        msg = f"must be 2 or more, got {count}"
        raise argparse.ArgumentTypeError(msg)
    return count


def write_results(name: str, material: Material, measured: Mapping[str, object], targets: Sequence[Target]) -> int:
    """Write ``results/NAME.json`` and print the targets.

    Returns:
        The exit code: 0 if every target was met.
    """
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "material": material.source,
        "options": OPTIONS,
        **measured,
        "targets": [asdict(target) for target in targets],
        "passed": all(target.met for target in targets),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    for target in targets:
        print(f"{'met   ' if target.met else 'MISSED'} {target.claim}: measured {target.measured:.4g}")
    return 0 if document["passed"] else 1


def copy_to(file: Path, folder: Path, name: str) -> Path:
    """Copy ``file`` to ``folder/name``."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(file, folder / name))


def _stages(server_timing: str) -> dict[str, float]:
    return {name: float(duration) for name, duration in re.findall(r"(\w+);dur=([0-9.]+)", server_timing)}


def _machine() -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine or its user."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
        "os": platform.freedesktop_os_release()["PRETTY_NAME"],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in _VERSIONS},
        "load_average_at_end": [round(load, 2) for load in os.getloadavg()],
    }
