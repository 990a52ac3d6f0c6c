"""A real TorchServe whose models are run by OpenVINO, in float32 or in int8, or could be."""

from __future__ import annotations

import gzip
import zipfile
from http import HTTPStatus
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import yaml
from typer.testing import CliRunner

from nnunet_torchserve.backend import AUTO, Backend
from nnunet_torchserve.engine.backends import openvino_networks
from nnunet_torchserve.machine import processor_flags
from nnunet_torchserve.stated_accuracy import rounded_down
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.validation_cases import Validation
from support import volumes
from support.bad_requests import GOOD
from support.chaos import wait_for
from support.metrics import scrape
from support.odd_models import OddModel
from support.server import LiveServer, running

pytestmark = [
    pytest.mark.serve,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.* goes into the archive as code"),
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),  # of packages that nnU-Net's trainers import
]

HEADER = "x-nnunet-backend"

UNEVEN = """
import time

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Uneven(torch.nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.last = torch.nn.Conv3d(inputs, outputs, 1)
        self.register_buffer("idle", torch.zeros(64, 64, 3, 3, 3))

    def forward(self, x):
        if torch.jit.is_tracing() is {slow_as_graph}:
            {work}
        return self.last(x)

    def in_vain(self, x):
        many = x.repeat(1, 64, 1, 1, 1)
        for _ in range(40):
            many = torch.nn.functional.conv3d(many, self.idle, padding=1)
        return x + many[:, :1]


class nnUNetTrainerUneven(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import,
        num_input_channels, num_output_channels, enable_deep_supervision=True,
    ):
        return Uneven(num_input_channels, num_output_channels)
"""
"""A network that one library runs a hundred times as fast as the other, however busy the machine is."""

SLOW_IN_PYTORCH = UNEVEN.format(slow_as_graph=False, work="time.sleep(0.5)")
SLOW_AS_GRAPH = UNEVEN.format(slow_as_graph=True, work="x = self.in_vain(x)")


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


def labels_of(content: bytes) -> npt.NDArray[Any]:
    return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)


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
    with running(archive.parent, tmp_path / "server", models=("m.mar", "slow=slow.mar")) as live:
        fast, slow = (live.predict(name, GOOD) for name in ("m", "slow"))
        assert fast.status_code == slow.status_code == HTTPStatus.OK
        name, _, dice = fast.headers[HEADER].partition("; dice=")
        assert name == "openvino:float32"
        assert 0.99 < float(dice) <= 1
        assert slow.headers[HEADER] == "eager"
        labels = [labels_of(each.content) for each in (fast, slow)]
        assert (labels[0] != labels[1]).mean() < 1e-3
        assert len(np.unique(labels[0])) > 1


def counted(live: LiveServer) -> set[tuple[str, str]]:
    """Each archive's name, and what runs its networks as Prometheus is told it."""
    page = scrape(live.server.metrics_url)
    told = page.labels("nnunet_engine_backend")
    return {(each["model_name"], each["backend"]) for each in told if page.value("nnunet_engine_backend", **each)}


@pytest.fixture
def uneven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model store with two archives for OpenVINO, each of a network that is not as fast everywhere.

    ``graph`` is slow as OpenVINO runs it, ``torch`` as PyTorch does; ``stubborn`` is ``torch`` whose model-config.yaml
    says eager, and ``auto`` is ``graph`` whose says auto.
    """
    store = tmp_path / "store"
    for name, trainer in {"graph": SLOW_AS_GRAPH, "torch": SLOW_IN_PYTORCH}.items():
        file = volumes.write(tmp_path / name / "trainers", "uneven.py", trainer.encode())
        monkeypatch.setenv("nnUNet_extTrainer", str(file.parent))
        model = OddModel(trainer="nnUNetTrainerUneven").write(tmp_path / name)
        make_archives(
            ArchiveRequest(model, store, name=name, trainer_files=(file,), backend=Backend.OPENVINO_FLOAT32),
        )
    monkeypatch.delenv("nnUNet_extTrainer")
    with_backend(store / "torch.mar", store / "stubborn.mar", "eager")
    with_backend(store / "graph.mar", store / "auto.mar", "auto")
    return store


def test_auto_takes_the_faster_one_and_not_what_the_archive_or_its_settings_name(uneven: Path, tmp_path: Path) -> None:
    """By ``serve --backend auto`` or by the archive's own settings, in both directions."""

    def runs(live: LiveServer, name: str) -> tuple[str, str, str]:
        answer, said = live.predict(name, GOOD), live.describe(name)["customizedMetadata"]["backend"]  # type: ignore[index]
        assert answer.status_code == HTTPStatus.OK, answer.text
        assert said["archive"]["backend"] == "openvino:float32"
        return answer.headers[HEADER], said["runs"], said["asked"]

    alone = ("graph.mar", "auto=auto.mar")
    with running(uneven, tmp_path / "as archived", models=alone) as live:
        assert runs(live, "graph") == ("openvino:float32", "openvino:float32", "openvino:float32")
        assert runs(live, "auto") == ("eager", "eager", "auto")
    with running(uneven, tmp_path / "auto", models=("graph.mar", "stubborn=stubborn.mar"), backend=AUTO) as live:
        assert runs(live, "graph") == ("eager", "eager", "auto")
        assert runs(live, "stubborn") == ("openvino:float32", "openvino:float32", "auto")
        wait_for(lambda: counted(live) == {("graph", "eager"), ("torch", "openvino_float32")})


@pytest.mark.skipif(
    not processor_flags() & openvino_networks._FLAGS[Backend.OPENVINO_INT8],
    reason="this processor has no instructions for int8",
)
def test_int8_that_was_calibrated_and_measured_is_served_and_says_so(models: dict[str, Path], tmp_path: Path) -> None:
    """Made by the command line, as an operator makes it; its answers are no other backend's."""
    affine = volumes.oblique((1.5, 1.5, 1.5), 0.0)
    for number in range(2):
        image, _ = volumes.blobs((48, 64, 48), seed=60 + number)
        volumes.write(tmp_path / "imagesTr", f"case_{number}_0000.nii.gz", volumes.nifti_gz(image, affine))
    image, labels = volumes.blobs((40, 44, 36), seed=70)
    sent = volumes.nifti_gz(image, affine)
    volumes.write(tmp_path / "imagesTs", "other_0000.nii.gz", sent)
    volumes.write(tmp_path / "labelsTs", "other.nii.gz", volumes.nifti_gz(labels, affine))
    flags = {
        "--output": tmp_path / "store",
        "--name": "m",
        "--folds": 0,
        "--backend": "openvino:int8",
        "--calibrate": tmp_path / "imagesTr",
        "--validate": tmp_path / "imagesTs",
        "--labels": tmp_path / "labelsTs",
        "--max-dice-loss": "0.1,0.1",
    }
    told = [str(each) for flag in flags.items() for each in flag]
    made = CliRunner().invoke(app, ["archive", str(models["five_folds"]), *told])
    assert made.exit_code == 0, made.output
    archive = tmp_path / "store" / "m.mar"
    with_backend(archive, archive.with_name("slow.mar"), "eager")
    with running(archive.parent, tmp_path / "server", models=("m.mar", "slow=slow.mar")) as live:
        answer, slow = (live.predict(name, sent) for name in ("m", "slow"))
        assert answer.status_code == slow.status_code == HTTPStatus.OK
        said: dict[str, Any] = live.describe("m")["customizedMetadata"]["backend"]  # type: ignore[index]
        assert said["runs"] == said["archive"]["backend"] == said["accuracy"]["backend"] == "openvino:int8"
        measured = said["accuracy"]
        stated = rounded_down(measured["dice"], different=measured["different_voxels"])
        assert answer.headers[HEADER] == f"openvino:int8; dice={stated}"
        different = labels_of(answer.content) != labels_of(slow.content)
        assert different.sum() == measured["different_voxels"]  # it is the very image that it was measured on
        assert 0.8 < float(stated) < 1
