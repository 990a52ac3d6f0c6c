"""A DICOM series of 300 slices of 512 x 512: our reading, from a zip in memory, beside SimpleITK's from files.

The volume is made like a CT (``stages.codecs.images.ct_like``) and written by pydicom, uncompressed and in JPEG 2000,
one object a slice. Ours has the zip's bytes in memory, as a worker has, and checks what SimpleITK does not; SimpleITK's
series reader has the files, in memory (tmpfs) where there is room. Both end with float32 voxels, which are compared.
Sides take turns, and who is first alternates. Memory is measured in a fresh process that holds nothing but the body.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

from benchmarks.harness.child import last_line_of
from benchmarks.harness.material import find_material
from benchmarks.harness.memory import with_extra_memory
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread
from benchmarks.stages.codecs.__main__ import fast_folder
from benchmarks.stages.codecs.images import CT_SHAPE, CT_SPACING_MM, ct_like
from nnunet_torchserve import codecs
from nnunet_torchserve.limits import Limits
from support import dicom_files

QUICK_SHAPE = (40, 256, 256)
MOST_TIMES, MOST_VOLUMES = 1.5, 1.5
"""Promised: of SimpleITK's time, and of float32 volumes beside the body."""

ROUNDS = {"uncompressed": 3, "JPEG 2000": 2}
SYNTAXES = {"uncompressed": "1.2.840.10008.1.2.1", "JPEG 2000": "1.2.840.10008.1.2.4.90"}
_AFFINE = np.diag([*CT_SPACING_MM, 1.0])


def write_series(folder: Path, kind: str, voxels: npt.NDArray[np.int16]) -> Path:
    """A file for each slice in ``folder/files``; the zip of them, which is returned."""
    datasets = dicom_files.series(voxels, _AFFINE)
    if kind == "uncompressed":
        bodies = [dicom_files.file_of(ds) for ds in datasets]
    else:

        def encode(frame: npt.NDArray[np.int16]) -> bytes:
            return bytes(imagecodecs.jpeg2k_encode(frame, level=0, reversible=True, codecformat="j2k"))

        with ThreadPoolExecutor() as pool:
            frames = pool.map(encode, voxels)
            bodies = [
                dicom_files.compressed(ds, [frame], SYNTAXES[kind]) for ds, frame in zip(datasets, frames, strict=True)
            ]
    files = {f"{number:04}.dcm": body for number, body in enumerate(bodies)}
    (folder / "files").mkdir(parents=True)
    for name, body in files.items():
        (folder / "files" / name).write_bytes(body)
    (folder / "series.zip").write_bytes(dicom_files.zipped(files))
    return folder / "series.zip"


def by_simpleitk(folder: Path) -> npt.NDArray[np.float32]:
    """As its documentation reads a series."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder / "files")))
    return np.asarray(sitk.GetArrayFromImage(reader.Execute()), np.float32)


def by_us(body: bytes) -> npt.NDArray[np.float32]:
    """As a worker reads it."""
    voxels: npt.NDArray[np.float32] = codecs.open_image(body, Limits(), "SimpleITKIO").read()[0]
    return voxels


def measure(folder: Path, kind: str, rounds: int, *, quick: bool) -> dict[str, Any]:
    """Seconds of both sides, in turns, and our memory."""
    body = (folder / "series.zip").read_bytes()
    sides: dict[str, Callable[[], npt.NDArray[np.float32]]] = {
        "ours": lambda: by_us(body),
        "SimpleITK": lambda: by_simpleitk(folder),
    }
    seconds: list[dict[str, float]] = []
    different = 0
    for number in range(rounds):
        if not quick:
            wait_for_quiet()
        found: dict[str, npt.NDArray[np.float32]] = {}
        taken: dict[str, float] = {}
        for side in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            found[side] = sides[side]()
            taken[side] = round(time.perf_counter() - began, 4)
        different += int(np.count_nonzero(found["ours"] != found["SimpleITK"]))
        seconds.append(taken)
        del found
    memory = json.loads(last_line_of("benchmarks.stages.dicom", "--memory-of", str(folder / "series.zip")))
    result = {
        "file_bytes": len(body),
        "rounds_seconds": seconds,
        "seconds": {side: spread([each[side] for each in seconds]) for side in sides},
        "times_simpleitk": spread([each["ours"] / each["SimpleITK"] for each in seconds]),
        "peak_volumes": round(memory["extra_bytes"] / memory["volume_bytes"], 3),
        "different_voxels": different,
    }
    times, ours = result["times_simpleitk"]["median"], result["seconds"]["ours"]["median"]
    print(f"  {kind}: {ours:.2f} s, {times:.2f} times SimpleITK's, {result['peak_volumes']} volumes")
    return result


def memory_of(file: Path) -> int:
    """In this process: print what reading adds to a body, in bytes."""
    body = file.read_bytes()
    codecs.open_image(body, Limits(), "SimpleITKIO")  # what is loaded late is loaded
    voxels, extra = with_extra_memory(lambda: by_us(body))
    print(json.dumps({"extra_bytes": extra, "volume_bytes": voxels.nbytes}))
    return 0


def targets_of(measured: dict[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for kind, found in measured.items():
        times, volumes = found["times_simpleitk"]["median"], found["peak_volumes"]
        targets += [
            Target(f"{kind}: time in parts of SimpleITK's, at most {MOST_TIMES}", times, times <= MOST_TIMES),
            Target(
                f"{kind}: float32 volumes beside the body, at most {MOST_VOLUMES}", volumes, volumes <= MOST_VOLUMES
            ),
            Target(f"{kind}: voxels that differ", found["different_voxels"], not found["different_voxels"]),
        ]
    return targets


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/dicom.json``."""
    if list(arguments[:1]) == ["--memory-of"]:
        return memory_of(Path(arguments[1]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a trial: a small series, two rounds; may miss targets")
    quick = parser.parse_args(arguments).quick
    where, place = fast_folder()
    measured: dict[str, Any] = {}
    shape = QUICK_SHAPE if quick else CT_SHAPE
    with tempfile.TemporaryDirectory(prefix="bench-dicom-", dir=where) as name:
        material = find_material(Path(name))
        voxels = sitk.GetArrayFromImage(ct_like(shape).image)
        for kind, rounds in ROUNDS.items():
            folder = Path(name) / kind.replace(" ", "-")
            write_series(folder, kind, voxels)
            measured[kind] = measure(folder, kind, 2 if quick else rounds, quick=quick)
    document = {"files_on": place, "shape": list(shape), "series": measured}
    return write_results("dicom", material, document, targets_of(measured))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
