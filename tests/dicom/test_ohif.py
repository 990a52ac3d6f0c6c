"""OHIF shows our segmentations where they lie: its reader has each voxel at its place in the patient.

Long, for node and 100 MB of packages: ``test_segmentation.py`` reads the same objects by highdicom and dcmqi.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nnunet_torchserve.codecs import DicomSource
from nnunet_torchserve.options import SegType
from nnunet_torchserve.painting import read_painting
from support import volumes
from support.dicom_files import ACQUISITIONS, enhanced, file_of, files_of, series, zipped
from support.ohif import Segment, Way, by_ohif, run_reader
from support.segmentations import voxels_at, voxels_of
from support.written_segmentations import label_map, segmentation_of, source_of

pytestmark = pytest.mark.long

INSTALL = Path(__file__).with_name("install_tools.sh")

SHAPE = (5, 6, 8)
"""z, y, x; 48 pixels are whole bytes of bits: see :func:`test_binary_frames_that_are_no_whole_bytes`."""

SPACING = (0.7, 0.9, 2.5)
NAMES = {1: "liver", 2: "spleen", 3: "not there"}


LABELS = label_map(SHAPE)


def check(found: Mapping[int, Segment], source: DicomSource, masks: Mapping[int, npt.NDArray[np.bool_]]) -> None:
    """Each segment has the voxels of its mask (z, y, x), by their places in the patient, and nothing else has any."""
    assert set(masks) <= set(found)
    for number, segment in found.items():
        mask = masks.get(number, np.zeros(SHAPE, bool))
        ours = voxels_of(mask)
        assert len(segment.places) == len(ours)
        assert voxels_at(segment.places, source.geometry.affine) == ours


def masks_of(labels: npt.NDArray[Any]) -> dict[int, npt.NDArray[np.bool_]]:
    return {number: labels == number for number in np.unique(labels[labels > 0]).tolist()}


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("kind", SegType)
@pytest.mark.parametrize("name", ACQUISITIONS)
def test_every_voxel_is_where_it_lies_in_the_patient(name: str, kind: SegType, way: Way, tmp_path: Path) -> None:
    acquisition = ACQUISITIONS[name]
    voxels = np.zeros(SHAPE, np.int16)
    files = files_of(series(voxels, acquisition.affine(SPACING), backwards=acquisition.backwards))
    source = source_of(zipped(files))
    found = by_ohif(files, segmentation_of(source, LABELS, kind), way, tmp_path)
    check(found, source, masks_of(LABELS))
    assert {number: found[number].label for number in NAMES} == NAMES


@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("kind", SegType)
def test_frames_of_an_enhanced_object_are_found(kind: SegType, way: Way, tmp_path: Path) -> None:
    affine = ACQUISITIONS["oblique"].affine(SPACING)
    file = file_of(enhanced(np.zeros(SHAPE, np.int16), affine, order=[3, 1, 0, 4, 2]))
    source = source_of(file)
    check(by_ohif({"a": file}, segmentation_of(source, LABELS, kind), way, tmp_path), source, masks_of(LABELS))


def axial(shape: tuple[int, int, int] = SHAPE) -> dict[str, bytes]:
    """Files of a series."""
    return files_of(series(np.zeros(shape, np.int16), ACQUISITIONS["axial"].affine(SPACING)))


def test_regions_overlap(tmp_path: Path) -> None:
    order, names = (1, 2, 3), {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    painting = read_painting(names, order, has_regions=True)
    labels = LABELS.copy()
    labels[2, 3, 4] = 3
    source = source_of(zipped(axial()))
    found = by_ohif(axial(), segmentation_of(source, labels, painting=painting), Way.REFERENCE, tmp_path)
    check(found, source, {number: np.isin(labels, range(number, 4)) for number in (1, 2, 3)})


@pytest.mark.parametrize("kind", SegType)
def test_an_empty_mask_is_shown_as_such(kind: SegType, tmp_path: Path) -> None:
    source = source_of(zipped(axial()))
    body = segmentation_of(source, np.zeros(SHAPE, np.uint8), kind)
    found = by_ohif(axial(), body, Way.REFERENCE, tmp_path)
    check(found, source, {})
    assert set(NAMES) <= set(found)


@pytest.mark.parametrize("version", ["v18.20.4", "nothing of the kind"])
def test_the_reader_is_not_installed_for_a_node_that_is_too_old(version: str, tmp_path: Path) -> None:
    script = volumes.write(tmp_path / "tests" / "dicom", INSTALL.name, INSTALL.read_bytes())
    for program, said in {"node": version, "npm": "would install"}.items():
        volumes.write(tmp_path / "bin", program, f"#!/bin/sh\necho {said}\n".encode()).chmod(0o755)
    search = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(["bash", script], env={"PATH": search}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "node 20 or later is not installed" in done.stderr
    assert not (tmp_path / ".tools").exists()


# --- what this reader cannot do, as docs/dicom.md says; a version that can is a reason to change the page -------------


def test_binary_frames_that_are_no_whole_bytes(tmp_path: Path) -> None:
    """PS3.5, 8.1.1: bits of frames follow each other. The reader expects whole bytes; label maps have them."""
    shape = (5, 6, 7)
    labels = LABELS[..., :7]
    files = axial(shape)
    source = source_of(zipped(files))
    done = run_reader(files, segmentation_of(source, labels), Way.REFERENCE, tmp_path)
    assert done.returncode != 0
    assert "Unexpected 1-bit SEG PixelData length" in done.stderr
    found = by_ohif(files, segmentation_of(source, labels, SegType.LABELMAP), Way.REFERENCE, tmp_path)
    assert len(found[1].places) == np.count_nonzero(labels == 1)


def test_two_binary_frames_that_are_no_whole_bytes_are_shifted(tmp_path: Path) -> None:
    """9 bytes of bits, padded to 10, are what it takes two frames of 36 pixels for."""
    shape = (2, 6, 6)
    labels = np.zeros(shape, np.uint8)
    labels[:, 1:3, 1:4] = 1
    files = axial(shape)
    source = source_of(zipped(files))
    found = by_ohif(files, segmentation_of(source, labels), Way.REFERENCE, tmp_path)
    shown = voxels_at(found[1].places, source.geometry.affine)
    ours = voxels_of(labels)
    assert {voxel for voxel in shown if voxel[2] == 0} == {voxel for voxel in ours if voxel[2] == 0}
    assert shown != ours


@pytest.mark.parametrize("kind", SegType)
def test_numbers_beyond_a_byte(kind: SegType, tmp_path: Path) -> None:
    """Segment 300 is shown as 44."""
    names = {"background": 0} | {f"structure {number}": number for number in range(1, 301)}
    labels = LABELS.astype(np.uint16)
    labels[labels == 2] = 300
    source = source_of(zipped(axial()))
    painting = read_painting(names, None, has_regions=False)
    found = by_ohif(axial(), segmentation_of(source, labels, kind, painting=painting), Way.REFERENCE, tmp_path)
    assert len(found[300].places) == 0
    assert len(found[44].places) == np.count_nonzero(labels == 300)
