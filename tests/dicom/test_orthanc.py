"""A series out of a PACS, and its segmentation into it: what is sent again changes nothing there.

Long, for Orthanc, which is a package of the system: that a request gives the same bytes again, whatever the order and
the packing of its files, is in ``test_segmentation.py`` too.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import SegType
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from support.dicom_files import ACQUISITIONS, files_of, series, tarred, zipped
from support.orthanc import Orthanc, orthanc
from support.segmentations import by_pydicom, check_object, check_set
from support.volumes import blobs

pytestmark = pytest.mark.long

ASKED = {"folds": [0], "use_mirroring": False}
VOXELS = np.rint(blobs((20, 24, 18), 5)[0].T).astype(np.int16)
IMAGES = series(VOXELS, ACQUISITIONS["oblique"].affine())
FILES = files_of(IMAGES)
STUDY = f"studies/{IMAGES[0].StudyInstanceUID}"
CLASSES = {SegType.BINARY: "1.2.840.10008.5.1.4.1.1.66.4", SegType.LABELMAP: "1.2.840.10008.5.1.4.1.1.66.7"}


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    """One that has the series."""
    with orthanc(tmp_path / "orthanc") as server:
        assert server.store(FILES.values()).status == HTTPStatus.OK
        yield server


@pytest.fixture(scope="module")
def ask(pipeline: Callable[[str], Pipeline]) -> Callable[..., bytes]:
    """Sends a series to a model that was trained in LPS; returns its segmentation."""
    model = pipeline("five_folds")
    bundle = ModelBundle(model.bundle.folder)
    bundle.lead.description = bundle.lead.description.model_copy(update={"input_orientation": "LPS"})
    served = Pipeline(bundle, model.engine, Limits(), 600.0)

    def segment(image: bytes, **options: Any) -> bytes:
        response = served.answer(Request({"image": image, "options": json.dumps(ASKED | options).encode()}, {}))
        assert response.status == HTTPStatus.OK, response.body
        return response.body

    return segment


def archive(pacs: Orthanc, level: str) -> bytes:
    """A zip of the first study, or series, that Orthanc has, under the names that it gives."""
    [first, *_] = pacs.ask(level).json()
    return pacs.ask(f"{level}/{first}/archive").body


def stored(pacs: Orthanc) -> set[bytes]:
    return set(pacs.retrieve(STUDY))


@pytest.mark.parametrize("kind", SegType)
def test_a_series_and_its_segmentation_come_back_as_they_were(
    kind: SegType, pacs: Orthanc, ask: Callable[..., bytes], tmp_path: Path
) -> None:
    """Byte for byte as objects, and as frames and data sets in the way in which viewers ask for them."""
    body = ask(archive(pacs, "series"), seg_type=kind)
    assert body == ask(zipped(FILES), seg_type=kind)
    assert pacs.store([body]).status == HTTPStatus.OK
    assert stored(pacs) == {*FILES.values(), body}
    check_object(body, tmp_path)
    check_set([*FILES.values(), body], tmp_path)
    assert pacs.counted() == pacs.counted() | {"CountStudies": 1, "CountSeries": 2, "CountInstances": len(FILES) + 1}

    for ds in IMAGES:
        place = f"{STUDY}/series/{ds.SeriesInstanceUID}/instances/{ds.SOPInstanceUID}"
        [frame] = pacs.retrieve(f"{place}/frames/1", "application/octet-stream")
        assert frame == ds.PixelData
    ours = by_pydicom(body)
    place = f"{STUDY}/series/{ours.SeriesInstanceUID}/instances/{ours.SOPInstanceUID}"
    [said] = pacs.ask(f"dicom-web/{place}/metadata", Accept="application/dicom+json").json()
    assert said["00080016"]["Value"] == [CLASSES[kind]]
    labels = [segment["00620005"]["Value"][0] for segment in said["00620002"]["Value"]]
    assert labels == [segment.SegmentLabel for segment in ours.SegmentSequence]
    assert len(said["52009230"]["Value"]) == ours.NumberOfFrames


@pytest.mark.parametrize("kind", SegType)
def test_a_request_that_is_sent_again_changes_nothing(kind: SegType, pacs: Orthanc, ask: Callable[..., bytes]) -> None:
    """In whatever way it is packed: as files, or as the whole study, in which the first answer is by now."""
    body = ask(zipped(FILES), seg_type=kind)
    assert pacs.store([body]).status == HTTPStatus.OK
    before, objects = pacs.counted(), stored(pacs)
    study = archive(pacs, "studies")
    assert len(zipfile.ZipFile(io.BytesIO(study)).namelist()) == len(FILES) + 1
    for again in (study, tarred(dict(reversed(FILES.items())), packed=True)):
        answer = ask(again, seg_type=kind)
        assert pacs.store([answer]).status == HTTPStatus.OK
        assert pacs.ask("instances", answer).json()["Status"] == "AlreadyStored"
    assert pacs.counted() == before
    assert stored(pacs) == objects


def test_another_question_is_another_object(pacs: Orthanc, ask: Callable[..., bytes]) -> None:
    """Another kind of object, or options that decide labels: none takes another's place."""
    bodies = {
        ask(zipped(FILES)),
        ask(zipped(FILES), seg_type=SegType.LABELMAP),
        ask(zipped(FILES), folds=[1]),
    }
    for body in bodies:
        assert pacs.ask("instances", body).json()["Status"] == "Success"
    assert stored(pacs) == {*FILES.values(), *bodies}
    assert pacs.counted() == pacs.counted() | {"CountSeries": 1 + len(bodies)}
