"""A DICOM series to a live server: a segmentation comes back, and nothing of the patient is left anywhere."""

from __future__ import annotations

import gzip
import io
import json
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest

from support.dicom_attacks import hostile_series
from support.dicom_files import ACQUISITIONS, SECRET, SECRET_DATE, SECRET_ID, series, zip_of
from support.peaks import forget_peak, peak
from support.segmentations import by_dcmqi, by_highdicom, by_pydicom, check_object, voxels
from support.server import LiveServer
from support.volumes import blobs

pytestmark = pytest.mark.serve

PAGE = Path(__file__).parents[2] / "docs" / "dicom.md"
NAME = "oriented"
ASKED = {"folds": [0], "use_mirroring": False}
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
PEAK_GROWTH = 96 * 1024**2
"""Bytes that a worker may take in between; a bomb is 160 MiB."""

UIDS = "1.2.826.0.1.3680043.8.498."
"""What every UID of the series begins with."""


@pytest.fixture(scope="module")
def live(server: LiveServer, archive_of: Callable[[str], Path]) -> Iterator[LiveServer]:
    """The session's server, with a model more, whose archive says how its training images lay."""
    plain = archive_of("five_folds")
    made = plain.with_name(f"{NAME}.mar")
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(made, "w") as copy:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename == "bundle.json":
                bundle = json.loads(content)
                bundle["members"][0]["input_orientation"] = "LPS"
                content = json.dumps(bundle | {"name": NAME}).encode()
            if entry.filename == "MAR-INF/MANIFEST.json":
                content = content.replace(b'"five_folds"', f'"{NAME}"'.encode())
            copy.writestr(entry, content)
    url = f"{server.server.management_url}/models"
    parameters = {"url": made.name, "initial_workers": "1", "synchronous": "true"}
    answer = httpx.post(url, params=parameters, timeout=600, trust_env=False)
    assert answer.is_success, answer.text
    yield server
    httpx.delete(f"{url}/{NAME}", timeout=600, trust_env=False)


def body() -> bytes:
    image, _ = blobs((20, 24, 18), 5)
    return zip_of(series(np.rint(image.T).astype(np.int16), ACQUISITIONS["oblique"].affine()))


def test_a_series_comes_back_as_its_segmentation(live: LiveServer, tmp_path: Path) -> None:
    """By default; the same again the second time; and where the labels lie as NIfTI."""
    answer = live.predict(NAME, body(), options=json.dumps(ASKED))
    assert (answer.status_code, answer.headers["content-type"]) == (HTTPStatus.OK, "application/dicom"), answer.text
    assert answer.headers["x-nnunet-warning"] == "segments_uncoded"
    check_object(answer.content, tmp_path)
    wanted = {"output_format": ["dicom-seg", "nii.gz", "json"]}
    parts = zipfile.ZipFile(io.BytesIO(live.predict(NAME, body(), options=json.dumps(ASKED | wanted)).content))
    assert parts.read("labels.dcm") == answer.content
    image = nib.Nifti1Image.from_bytes(gzip.decompress(parts.read("labels.nii.gz")))
    labels = np.asarray(image.dataobj)
    assert len(np.unique(labels)) >= 3
    for found in (by_highdicom(answer.content), by_dcmqi(answer.content, tmp_path)):
        for number in np.unique(labels[labels > 0]).tolist():
            ours = set(map(tuple, np.argwhere(labels == number).tolist()))
            assert voxels(*found[number], RAS @ image.affine) == ours
    provenance = json.loads(parts.read("report.json"))["provenance"]
    assert provenance["model"]["digest"] in answer.headers["x-nnunet-model"]
    assert (
        provenance["images"][0]
        in by_pydicom(answer.content)
        .SegmentSequence[0]["SegmentationAlgorithmIdentificationSequence"][0]
        .AlgorithmParameters
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_command_of_the_page_works(live: LiveServer, tmp_path: Path) -> None:
    """As it stands, but for the address and the model's name."""
    [command] = re.findall(r"^curl .*$", PAGE.read_text(), re.MULTILINE)
    here = command.replace("http://127.0.0.1:8080/predictions/brain", f"{live.server.inference_url}/predictions/{NAME}")
    assert here != command
    (tmp_path / "series.zip").write_bytes(body())
    done = subprocess.run(shlex.split(here), cwd=tmp_path, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check_object((tmp_path / "segmentation.dcm").read_bytes(), tmp_path)


def test_hostile_series_get_their_answer_and_hurt_nobody(live: LiveServer) -> None:
    """The model's worker is the same one afterwards, took little memory in between, and answers as before."""
    good = live.predict(NAME, body(), options=json.dumps(ASKED))
    assert good.status_code == HTTPStatus.OK, good.text
    [worker] = live.workers(NAME)
    _, resident = forget_peak(worker)
    answers = {}
    for name, image, expected in hostile_series():
        answer = live.predict(NAME, image, options=json.dumps(ASKED))
        problem = answer.json() if "json" in answer.headers["content-type"] else {}
        answers[name] = ((answer.status_code, problem.get("code")), expected)
        assert SECRET not in answer.text
    assert all(got == expected for got, expected in answers.values()), answers
    assert live.workers(NAME) == [worker]
    assert peak(worker) - resident < PEAK_GROWTH
    assert live.predict(NAME, body(), options=json.dumps(ASKED)).content == good.content


def test_nothing_of_the_patient_is_left_anywhere(live: LiveServer) -> None:
    """Neither in other answers, headers, problems, logs and metrics nor in any file of the server."""
    canaries = [text.encode() for text in (SECRET, SECRET_ID, SECRET_DATE, UIDS)]
    images = series(np.zeros((4, 8, 8), np.int16), ACQUISITIONS["axial"].affine())
    good = {"output_format": ["dicom-seg", "nii", "json", "nrrd"]}
    answers = [
        live.predict(NAME, body(), options=json.dumps(ASKED | good)),
        live.predict(NAME, zip_of([*images[:1], *images[2:]])),
        live.predict(NAME, zip_of(images)[:-900]),
        live.predict("five_folds", body()),
        live.predict(NAME, body(), options=json.dumps(ASKED | {"seg_type": SECRET})),
        live.predict(NAME, files={f"dicom_{SECRET}": b"x"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 422, 400, 422, 400, 400]
    parts = zipfile.ZipFile(io.BytesIO(answers[0].content))
    assert SECRET.encode() in parts.read("labels.dcm")
    seen = [parts.read(name) for name in parts.namelist() if name != "labels.dcm"]
    seen += [answer.content for answer in answers[1:]]
    seen += [str(answer.headers).encode() for answer in answers]
    metrics = f"{live.server.metrics_url}/metrics"
    seen.append(httpx.get(metrics, timeout=300, trust_env=False).content)
    assert live.logs(answers[-1].headers["x-nnunet-request-id"])
    folders = (Path(live.server.log_dir), live.state_dir, Path(live.server.temp_dir))
    files = {file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix != ".mar"}
    assert files
    seen += [file.read_bytes() for file in files]
    for text in seen:
        assert not [canary for canary in canaries if canary in text]
