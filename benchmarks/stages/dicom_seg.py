"""A DICOM SEG of 40 structures in 300 slices of 512 x 512: our writer beside highdicom's constructor.

The structures are ellipsoids of the sizes of organs, one over the other. Ours has the label map in memory and the
series as a worker has it, its patient and digest read; highdicom has the series as pydicom objects without pixels.
Both end with the bytes of a file; what highdicom reads of both is compared. Sides take turns, and who is first
alternates. What reading the digest of the series takes is told beside: an answer needs it too.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.sr.codedict import codes

from benchmarks.harness.material import find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import spread
from benchmarks.stages.codecs.images import CT_SHAPE, CT_SPACING_MM
from benchmarks.stages.dicom import QUICK_SHAPE
from nnunet_torchserve import codecs
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import Options, OutputFormat, SegType
from nnunet_torchserve.painting import Painting
from nnunet_torchserve.provenance import Provenance
from nnunet_torchserve.volume import LabelMap
from support import dicom_files

STRUCTURES = 40
MOST_S = {SegType.BINARY: 2.0, SegType.LABELMAP: 1.0}
"""Promised, of the writer alone."""

ROUNDS = 3
SEED = 20261129
_LIMIT = 2**30
_RADII_MM = ((12, 60), (12, 40), (12, 40))
_PROVENANCE = Provenance("benchmark", "1.0", "0" * 64, ("0" * 64,), None, {})


def organs(shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Ellipsoids, (Z, Y, X); the later ones over the earlier."""
    random = np.random.default_rng(SEED)
    labels = np.zeros(shape, np.uint8)
    spacing = np.array(CT_SPACING_MM[::-1])
    for number in range(1, STRUCTURES + 1):
        centre = random.uniform(0, shape)
        radii = np.array([random.uniform(*span) for span in _RADII_MM]) / spacing * min(1, shape[1] / CT_SHAPE[1])
        low = np.maximum(np.floor(centre - radii), 0).astype(int)
        high = np.minimum(np.ceil(centre + radii) + 1, shape).astype(int)
        box = tuple(slice(first, last) for first, last in zip(low, high, strict=True))
        places = zip(np.ogrid[box], centre, radii, strict=True)
        inside: Any = sum(((place - middle) / radius) ** 2 for place, middle, radius in places)
        labels[box][inside < 1] = number
    return labels


class Sides:
    """Who writes what."""

    def __init__(self, labels: npt.NDArray[np.uint8]) -> None:
        affine = np.diag([*CT_SPACING_MM, 1.0])
        images = dicom_files.series(
            np.zeros(labels.shape, np.int16), affine, StudyTime="101112", StudyID="1", AccessionNumber="1"
        )
        self.source = codecs.open_image(dicom_files.zip_of(images), Limits(), "SimpleITKIO")
        self._labels = labels
        self._theirs = []
        for ds in images:
            del ds.PixelData
            self._theirs.append(pydicom.dcmread(io.BytesIO(dicom_files.file_of(ds))))
        names = [f"structure {number}" for number in range(1, STRUCTURES + 1)]
        self._painting = Painting({name: (number,) for number, name in enumerate(names, start=1)})
        algorithm = highdicom.AlgorithmIdentificationSequence("benchmark", codes.DCM.ArtificialIntelligence, "1.0")
        self._descriptions = [
            highdicom.seg.SegmentDescription(number, name, codes.SCT.Tissue, codes.SCT.Tissue, "AUTOMATIC", algorithm)
            for number, name in enumerate(names, start=1)
        ]

    def ours(self, kind: SegType) -> bytes:
        """As a worker writes it."""
        options = Options(output_format=OutputFormat.DICOM_SEG, seg_type=kind)
        form = codecs.answer_form(options, self.source.native_format, self.source.geometry, STRUCTURES, self._painting)
        about = codecs.About([self.source], self._painting, {}, _PROVENANCE, _LIMIT)
        return codecs.encode(LabelMap(self._labels, self.source.geometry), form, about).body

    def highdicom(self, kind: SegType) -> bytes:
        """As its documentation writes it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = highdicom.seg.Segmentation(
                source_images=self._theirs,
                pixel_array=self._labels,
                segmentation_type=kind.upper(),
                segment_descriptions=self._descriptions,
                series_instance_uid=highdicom.UID(),
                series_number=1,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="benchmark",
                manufacturer_model_name="benchmark",
                software_versions="1.0",
                device_serial_number="1",
                transfer_syntax_uid="1.2.840.10008.1.2.5" if kind is SegType.LABELMAP else "1.2.840.10008.1.2.1",
            )
            file = io.BytesIO()
            found.save_as(file)
        return file.getvalue()


def different_voxels(one: bytes, other: bytes) -> int:
    """Voxels of two objects that highdicom reads otherwise, slices in the order of their places."""
    first, second = (highdicom.seg.segread(io.BytesIO(body)).get_volume(combine_segments=True) for body in (one, other))
    if first.spatial_shape != second.spatial_shape or not np.allclose(first.affine, second.affine, atol=1e-4):
        return int(np.prod(first.spatial_shape))
    return int(np.count_nonzero(first.array != second.array))


def measure(sides: Sides, kind: SegType, *, quick: bool) -> dict[str, Any]:
    """Seconds of both sides, in turns."""
    makers: dict[str, Callable[[SegType], bytes]] = {"ours": sides.ours, "highdicom": sides.highdicom}
    seconds: list[dict[str, float]] = []
    written: dict[str, bytes] = {}
    for number in range(2 if quick else ROUNDS):
        if not quick:
            wait_for_quiet()
        taken: dict[str, float] = {}
        for side in list(makers)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            written[side] = makers[side](kind)
            taken[side] = round(time.perf_counter() - began, 4)
        seconds.append(taken)
    result: dict[str, Any] = {
        "frames": int(pydicom.dcmread(io.BytesIO(written["ours"]), stop_before_pixels=True).NumberOfFrames),
        "bytes": {side: len(body) for side, body in written.items()},
        "rounds_seconds": seconds,
        "seconds": {side: spread([each[side] for each in seconds]) for side in makers},
        "parts_of_highdicom": spread([each["ours"] / each["highdicom"] for each in seconds]),
        "different_voxels": different_voxels(written["ours"], written["highdicom"]),
    }
    ours, parts = result["seconds"]["ours"]["median"], result["parts_of_highdicom"]["median"]
    print(f"  {kind}: {ours:.2f} s, {parts:.2f} of highdicom's, {result['frames']} frames")
    return result


def targets_of(measured: dict[str, Any]) -> list[Target]:
    """What is promised, and what was found."""
    targets = []
    for kind, found in measured.items():
        most, ours = MOST_S[SegType(kind)], found["seconds"]["ours"]["median"]
        targets += [
            Target(f"{kind}: seconds, at most {most}", ours, ours <= most),
            Target(f"{kind}: voxels that differ", found["different_voxels"], not found["different_voxels"]),
        ]
    return targets


def main(arguments: Sequence[str]) -> int:
    """Measure, write ``results/dicom_seg.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a trial: a small series, two rounds")
    quick = parser.parse_args(arguments).quick
    shape = QUICK_SHAPE if quick else CT_SHAPE
    sides = Sides(organs(shape))
    assert isinstance(sides.source, codecs.DicomSource)
    began = time.perf_counter()
    _ = sides.source.origin
    digest_s = round(time.perf_counter() - began, 4)
    measured = {str(kind): measure(sides, kind, quick=quick) for kind in SegType}
    document = {"shape": list(shape), "structures": STRUCTURES, "digest_of_the_series_s": digest_s, "kinds": measured}
    with tempfile.TemporaryDirectory(prefix="bench-dicom-seg-") as scratch:
        material = find_material(Path(scratch))
    return write_results("dicom_seg", material, document, targets_of(measured))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
