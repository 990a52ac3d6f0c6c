"""Volumes in and label maps out: our codecs, from and to memory, beside nnU-Net's reader, nibabel and NumPy with files.

Two images: a real T1 head at 1 mm, and a made volume of 300 x 512 x 512 int16 that compresses like a CT (``ct_like``
says how it is made). SimpleITK and NumPy write them in each format, as their users would.

Decoding is from an encoded image to float32 voxels. Ours has the bytes in memory, as a worker has; a peer opens a file
that was just written, in memory (tmpfs) where there is room, so that no disk is measured. Encoding is from a label map
to a file's bytes, ours in memory, a peer's in such a file. All give the same voxels, which is checked. The sides take
turns, and who goes first alternates too; what counts is the lower quartile of the ratios of the rounds.

Memory is measured in fresh processes that hold nothing but the body: how much the resident set grows at most, in
volumes: the bytes of the image as float32. The same for the worker's whole path from a body to the shared memory
that the engine maps, step by step, where the image's grid is the network's, and where it is not. ``copies`` lists
every copy of the voxels on that path with what was measured, and why it is made.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 (the name that the field uses)

from benchmarks.harness.material import describe_image, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread
from benchmarks.stages.codecs.images import (
    CT_SHAPE,
    QUICK_CT_SHAPE,
    Case,
    Kind,
    Labels,
    ct_like,
    head,
    image_file,
    write_image,
)
from benchmarks.stages.codecs.memory import copies, memory_of_decoding, memory_of_the_path
from benchmarks.stages.codecs.sides import OURS, STOCK, decoders, encoders, opened
from nnunet_torchserve.options import OutputFormat

REPEATS, QUICK_REPEATS = 7, 2

TIMED = (Kind.NIFTI_GZ, Kind.NIFTI, Kind.NRRD, Kind.MHA, Kind.MHA_PLAIN, Kind.NPY, Kind.NPZ)
ANSWERS = (OutputFormat.NIFTI_GZ, OutputFormat.NRRD, OutputFormat.MHA, OutputFormat.NPZ, OutputFormat.JSON)

LEAST_RATIO = 1.0
"""Promised against nnU-Net's own writer, and for the large volume against its reader; a head takes either of them
some hundredths of a second. The other peers are reported only: nibabel and NumPy do the same work as ours where nothing
is compressed, and NumPy writes our npz."""

MOST_VOLUMES = 2.1
"""On the path, beside the body: the volume and one more, which at first is the decoder's, and in the end the shared
one; the rest is for what does not grow with the volume."""

_ROOM_BYTES = 4 * 1024**3
_TMPFS = Path("/dev/shm")  # noqa: S108 (only where it has room, with a random name)


def decode(case: Case, name: str, folder: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Every format of one image."""
    voxels = case.image.GetNumberOfPixels()
    plain_bytes = voxels * case.image.GetSizeOfPixelComponent()
    found = {}
    for kind in TIMED:
        file = image_file(folder, name, kind)
        sides = decoders(kind, file, file.read_bytes())
        ours = sides[OURS]()
        assert ours.dtype == np.float32
        assert ours.size == voxels
        different = {side: int(np.count_nonzero(work() != ours)) for side, work in sides.items() if side != OURS}
        del ours
        found[kind.value] = {
            "title": kind.in_words,
            "file_bytes": file.stat().st_size,
            "compression": round(plain_bytes / file.stat().st_size, 3),
            **timed(sides, repeats, quick=quick),
            "different_voxels": different,
        }
        report(f"decode {name}", kind.in_words, found[kind.value])
    return found


def encode(case: Case, name: str, folder: Path, repeats: int, *, quick: bool) -> dict[str, Any]:
    """Every label map and format of one image."""
    source = opened(Kind.NIFTI_GZ, image_file(folder, name, Kind.NIFTI_GZ).read_bytes())
    found: dict[str, Any] = {}
    for title, labels in case.labels.items():
        for output in ANSWERS:
            file = folder / f"answer.{output}"
            sides = encoders(case, labels, output, source, file)
            body = sides[OURS]()
            assert isinstance(body, bytes)
            file.write_bytes(body)
            different = different_labels(output, file, labels)
            sizes = {OURS: len(body)}
            for side, work in sides.items():  # the first of each is not counted
                if side != OURS:
                    file.unlink(missing_ok=True)
                    work()
                    sizes |= {side: file.stat().st_size} if file.exists() else {}
            found.setdefault(title, {})[output.value] = {
                "bytes": sizes,
                **timed(sides, repeats, quick=quick),
                "different_voxels": different,
            }
            file.unlink(missing_ok=True)
            report(f"encode {name}, {title}", output.value, found[title][output.value])
    return found


def different_labels(output: OutputFormat, file: Path, labels: Labels) -> int:
    """Voxels whose label another reader finds to be another in our answer; for a report, voxels miscounted."""
    if output is OutputFormat.JSON:
        counts = np.bincount(labels.ravel())[1:]
        said = [structure["voxels"] for structure in json.loads(file.read_text())["structures"]]
        return int(np.abs(counts - said).sum())
    if output is OutputFormat.NPZ:
        with np.load(file) as arrays:
            return int(np.count_nonzero(arrays["labels"] != labels))
    return int(np.count_nonzero(sitk.GetArrayFromImage(sitk.ReadImage(str(file))) != labels))


def timed(sides: Mapping[str, Callable[[], object]], repeats: int, *, quick: bool) -> dict[str, Any]:
    """Let the sides take turns; seconds of each, and how many times ours a peer takes."""
    rounds: list[dict[str, float]] = []
    names = list(sides)
    for number in range(repeats):
        if not quick:
            wait_for_quiet()
        seconds = {side: seconds_of(sides[side]) for side in (names[::-1] if number % 2 else names)}
        rounds.append({side: round(seconds[side], 4) for side in names})
    peers = [side for side in names if side != OURS]
    return {
        "rounds_seconds": rounds,
        "seconds": {side: spread([each[side] for each in rounds]) for side in names},
        "ratio": {peer: spread([each[peer] / each[OURS] for each in rounds]) for peer in peers},
    }


def seconds_of(work: Callable[[], object]) -> float:
    """Until ``work`` returns; what it gives is freed afterwards."""
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    del result
    return seconds


def report(what: str, form: str, found: Mapping[str, Any]) -> None:
    """Print a line while the benchmark runs."""
    ours = found["seconds"][OURS]["median"]
    ratios = ", ".join(f"{peer} {ratio['median']:.2f} times" for peer, ratio in found["ratio"].items())
    print(f"  {what}, {form}: {ours:.3f} s, {ratios}")


def targets_of(document: Mapping[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for name, formats in document["decode"].items():
        for found in formats.values():
            if name == "ct" and STOCK in found["ratio"]:
                ratio = found["ratio"][STOCK]["q1"]
                claim = (
                    f"decode {name}, {found['title']}: nnU-Net's reader takes at least as long (times ours, quartile)"
                )
                targets.append(Target(claim, ratio, ratio >= LEAST_RATIO))
        different = sum(sum(found["different_voxels"].values()) for found in formats.values())
        targets.append(Target(f"decode {name}: voxels that differ from any peer's", different, different == 0))
    for name, label_maps in document["encode"].items():
        for title, formats in label_maps.items():
            for output, found in formats.items():
                if STOCK in found["ratio"]:
                    ratio = found["ratio"][STOCK]["q1"]
                    claim = f"encode {name}, {title}, {output}: nnU-Net's writer takes at least as long (times ours)"
                    targets.append(Target(claim, ratio, ratio >= LEAST_RATIO))
            different = sum(found["different_voxels"] for found in formats.values())
            targets.append(Target(f"encode {name}, {title}: labels read back otherwise", different, different == 0))
    for found in document["path"].values():
        claim = f"body to engine, {found['title']}: peak beside the body, at most {MOST_VOLUMES} float32 volumes"
        targets.append(Target(claim, found["peak_volumes"], found["peak_volumes"] <= MOST_VOLUMES))
    return targets


def fast_folder() -> tuple[str | None, str]:
    """Where files are kept, and in words."""
    if _TMPFS.is_dir() and shutil.disk_usage(_TMPFS).free > _ROOM_BYTES:
        return str(_TMPFS), "tmpfs"
    return None, "the local disk, in its page cache"


def main() -> int:
    """Measure, write ``results/codecs.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a trial: small images, two rounds, no waiting; may miss targets"
    )
    quick = parser.parse_args().quick
    where, place = fast_folder()
    measured: dict[str, Any] = {"files_on": place, "images": {}, "decode": {}, "encode": {}}
    with tempfile.TemporaryDirectory(prefix="bench-codecs-", dir=where) as name_of_folder:
        folder = Path(name_of_folder)
        material = find_material(folder)
        repeats = QUICK_REPEATS if quick else REPEATS
        for name in ("head", "ct"):
            if name == "head":
                case = head(material.coarse if quick else material.fine)
            else:
                case = ct_like(QUICK_CT_SHAPE if quick else CT_SHAPE)
            for kind in Kind:
                write_image(case, kind, image_file(folder, name, kind))
            measured["images"][name] = {
                "title": case.title,
                **describe_image(image_file(folder, name, Kind.NIFTI_GZ)),
                "volume_bytes": case.image.GetNumberOfPixels() * 4,
            }
            measured["decode"][name] = decode(case, name, folder, repeats, quick=quick)
            measured["encode"][name] = encode(case, name, folder, repeats, quick=quick)
            del case
        measured["images"]["ct"]["made"] = " ".join(str(ct_like.__doc__).split())
        measured["decode_memory"] = memory_of_decoding(folder, "ct")
        measured["path"] = memory_of_the_path(folder, "ct")
    measured["copies"] = copies(measured["path"])
    return write_results("codecs", material, measured, targets_of(measured))


if __name__ == "__main__":
    sys.exit(main())
