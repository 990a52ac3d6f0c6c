"""A real TorchServe whose models are run by OpenVINO, or could be."""

from __future__ import annotations

import gzip
import zipfile
from http import HTTPStatus
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from nnunet_torchserve.backend import Backend
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.validation_cases import Validation
from support import volumes
from support.bad_requests import GOOD
from support.server import running

pytestmark = [pytest.mark.serve, pytest.mark.long]


def with_backend(archive: Path, target: Path, backend: str) -> None:
    """The same archive, whose model-config.yaml an operator has changed."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as changed:
        for name in source.namelist():
            content = source.read(name)
            if name == "model-config.yaml":
                settings = yaml.safe_load(content)
                settings["handler"]["backend"] = backend
                content = yaml.safe_dump(settings).encode()
            changed.writestr(name, content)


def test_an_archive_is_served_by_what_it_was_made_for_unless_an_operator_says_otherwise(
    models: dict[str, Path], tmp_path: Path
) -> None:
    image = volumes.write(tmp_path, "case_0000.nii.gz", volumes.nifti_gz(volumes.blobs((32, 30, 28), 50)[0]))
    request = ArchiveRequest(
        models["five_folds"],
        tmp_path / "store",
        name="m",
        backend=Backend.OPENVINO_FLOAT32,
        validation=Validation((image,)),
    )
    [archive] = make_archives(request)
    with_backend(archive, archive.with_name("slow.mar"), "eager")
    with_backend(archive, archive.with_name("auto.mar"), "auto")
    models_served = ("m.mar", "slow=slow.mar", "auto=auto.mar")
    with running(archive.parent, tmp_path / "server", models=models_served) as live:
        fast, slow, either = (live.predict(name, GOOD) for name in ("m", "slow", "auto"))
        assert fast.status_code == slow.status_code == either.status_code == HTTPStatus.OK
        assert either.headers["x-nnunet-backend"] in {fast.headers["x-nnunet-backend"], "eager"}
        name, _, dice = fast.headers["x-nnunet-backend"].partition("; dice=")
        assert name == "openvino:float32"
        assert 0.99 < float(dice) <= 1
        assert slow.headers["x-nnunet-backend"] == "eager"
        labels = [
            np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(each.content)).dataobj) for each in (fast, slow)
        ]
        assert (labels[0] != labels[1]).mean() < 1e-3
        assert len(np.unique(labels[0])) > 1
