"""A whole request of a body as a DICOM series, against one of the same body as NIfTI.

The head of 1 mm is sent twice in turns: as a gzipped NIfTI file that lies as the model's training images do, and as a
zip of one MR object a slice in a scanner's order, which the server must turn. Each has the answer that is usual for
its format: a NIfTI label map, and a DICOM segmentation that carries patient and study of the series. With mirroring
the case is about a minute of network on two cores; ``--quick`` goes without. The labels are compared once, by position
in the patient: the series' answer as NIfTI, turned, and that of the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np

from benchmarks.harness.material import FOLD, USUAL_OPTIONS, describe_image, find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.served import Answer, Client, serving, stage_medians
from benchmarks.harness.spread import spread, two_or_more
from support import dicom_files

MOST_TIMES = 1.15
"""Promised: of the seconds of the NIfTI file, on a case of a minute."""

_SCANNER = "LPS"
"""What the axes of the made series run towards: columns, rows, slices."""

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def orientation_of(image: nib.Nifti1Image) -> str:
    """Nibabel's letters."""
    return "".join(nib.aff2axcodes(image.affine))


def turned(image: nib.Nifti1Image, letters: str) -> nib.Nifti1Image:
    """``image`` with axes that run towards ``letters``; no voxel is interpolated."""
    wanted = nib.orientations.axcodes2ornt(letters)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))


def write_bodies(source: Path, folder: Path) -> tuple[Path, Path]:
    """The NIfTI file and the zip of the series, of the same int16 numbers."""
    image = nib.load(source)
    voxels = np.rint(np.asarray(image.dataobj)).astype(np.int16)
    image = nib.Nifti1Image(voxels, image.affine)
    nib.save(image, folder / "head.nii.gz")
    scanned = turned(image, _SCANNER)
    datasets = dicom_files.series(
        np.ascontiguousarray(np.asarray(scanned.dataobj).T), _RAS_TO_LPS @ scanned.affine, "MR", rescale=None
    )
    (folder / "head.zip").write_bytes(dicom_files.zip_of(datasets))
    return folder / "head.nii.gz", folder / "head.zip"


def different_labels(client: Client, nifti: Path, series: Path, scratch: Path) -> int:
    """Voxels of the body whose labels differ, after one request of each."""
    options = USUAL_OPTIONS | {"output_format": "nii.gz"}
    of_nifti, of_series = scratch / "of_nifti.nii.gz", scratch / "of_series.nii.gz"
    client.segment(nifti, of_nifti, options)
    client.segment(series, of_series, options)
    ours = nib.load(of_nifti)
    theirs = turned(nib.load(of_series), orientation_of(ours))
    if not np.allclose(ours.affine, theirs.affine, atol=1e-3):
        msg = f"the two answers lie in different places: {ours.affine.tolist()} and {theirs.affine.tolist()}"
        raise RuntimeError(msg)
    return int(np.count_nonzero(np.asarray(ours.dataobj) != np.asarray(theirs.dataobj)))


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/dicom_series.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=two_or_more, default=4)
    parser.add_argument("--quick", action="store_true", help="a trial: no mirroring, no waits; may miss the target")
    chosen = parser.parse_args(arguments)
    options = USUAL_OPTIONS if chosen.quick else {"folds": [FOLD]}
    with tempfile.TemporaryDirectory(prefix="bench-series-") as name:
        scratch = Path(name)
        material = find_material(scratch)
        nifti, series = write_bodies(material.fine, scratch)
        sides = {"NIfTI": (nifti, scratch / "labels.nii.gz"), "DICOM": (series, scratch / "labels.dcm")}
        answers: dict[str, list[Answer]] = {side: [] for side in sides}
        orientation = orientation_of(nib.load(nifti))
        with serving(material, scratch, input_orientation=orientation) as client:
            different = different_labels(client, nifti, series, scratch)  # all is loaded and warm after it
            for number in range(chosen.pairs):
                for side in list(sides)[:: -1 if number % 2 else 1]:
                    if not chosen.quick:
                        wait_for_quiet()
                    answers[side].append(client.segment(*sides[side], options))
                print("  " + ", ".join(f"{side} {answers[side][-1].seconds:.2f} s" for side in sides))
        times = [dicom.seconds / plain.seconds for dicom, plain in zip(answers["DICOM"], answers["NIfTI"], strict=True)]
        measured = {
            "image": describe_image(nifti),
            "series": {"file_bytes": series.stat().st_size, "turned": [_SCANNER, orientation]},
            "options_of_a_request": options,
            "answers": {side: [asdict(each) for each in given] for side, given in answers.items()},
            "seconds": {side: spread([each.seconds for each in given]) for side, given in answers.items()},
            "stage_medians_ms": {side: stage_medians(given) for side, given in answers.items()},
            "times_nifti": spread(times),
            "different_voxels": different,
        }
    ratio = float(np.median(times))
    targets = [
        Target(f"time in parts of the NIfTI file's, at most {MOST_TIMES}", ratio, ratio <= MOST_TIMES),
        Target("the same labels by position in the patient: voxels that differ", different, different == 0),
    ]
    return write_results("dicom_series", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
