"""DICOM segmentations, read by OHIF's reader: cornerstone's adapters, in a real node (tests/dicom/install_tools.sh)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

_READER = Path(__file__).parents[1] / "dicom" / "ohif" / "read.mjs"
_TOOLS = Path(__file__).parents[2] / ".tools" / "ohif"


class Way(StrEnum):
    """By which the image of a frame is found: OHIF takes the first that succeeds."""

    REFERENCE = "reference"
    POSITION = "position"


@dataclass(frozen=True)
class Segment:
    """A segment, as a viewer has it.

    Attributes:
        label: its name.
        places: centres of its voxels, (n, 3), LPS mm.
    """

    label: str
    places: npt.NDArray[np.float64]


def node() -> str:
    """The program; the test is skipped where it or the reader is missing."""
    found = shutil.which("node")
    if found is None or not (_TOOLS / "ready").exists():
        pytest.skip("node or OHIF's reader is not installed: tests/dicom/install_tools.sh does the latter")
    return found


def run_reader(images: Mapping[str, bytes], body: bytes, way: Way, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the reader says to an object beside the files of its series."""
    program = node()
    work = folder / "ohif"
    shutil.rmtree(work, ignore_errors=True)
    (work / "images").mkdir(parents=True)
    for number, file in enumerate(images.values()):
        (work / "images" / f"{number:04}.dcm").write_bytes(file)
    (work / "segmentation.dcm").write_bytes(body)
    shutil.copy(_READER, work)
    (work / "node_modules").symlink_to(_TOOLS / "node_modules")
    command = [program, "read.mjs", "images", "segmentation.dcm", way]
    return subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)


def by_ohif(images: Mapping[str, bytes], body: bytes, way: Way, folder: Path) -> dict[int, Segment]:
    """Segment number -> what a viewer shows of it.

    Args:
        images: files of the source series.
        body: the segmentation.
        way: by which frames find their images.
        folder: to work in.
    """
    done = run_reader(images, body, way, folder)
    assert done.returncode == 0, done.stderr
    return {
        int(number): Segment(each["label"], np.reshape(each["places"], (-1, 3)).astype(np.float64))
        for number, each in json.loads(done.stdout)["segments"].items()
    }
