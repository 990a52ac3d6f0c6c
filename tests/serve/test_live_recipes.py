"""A cascade and an ensemble on a live server: asked over HTTP, they answer what nnU-Net's commands give."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from typer.testing import CliRunner

from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.cli import app
from nnunet_torchserve_tools.list_models import Sources, list_models
from nnunet_torchserve_trainers.soft_target_files import SoftTargets
from support import stock, volumes
from support.chaos import PATIENCE_S
from support.distilling import SPACING, one_process, preprocess, write_dataset
from support.odd_models import OddModel
from support.server import LiveServer
from support.training import named_folders

pytestmark = [pytest.mark.serve, pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")]

NAME = "recipe"
FOLDS = (0, 1)
FLAT = OddModel(2, folds=FOLDS)
LOWRES = OddModel(named="3d_lowres", spacing=3.0, folds=FOLDS)
CASCADE = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres", folds=FOLDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configuration -> trained folder."""
    home = tmp_path_factory.mktemp("recipe")
    return {model.configuration: model.write(home) for model in (FLAT, LOWRES, CASCADE)}


@pytest.fixture(scope="module")
def recipe(server: LiveServer, archive_of: Callable[[str], Path], folders: dict[str, Path]) -> Iterator[str]:
    """The name of an ensemble of which one model is a cascade, on the session's server until these tests are done."""
    cascade = {"others": (folders["3d_cascade_fullres"],), "previous_stages": (folders["3d_lowres"],)}
    store = archive_of("flat").parent
    [archive] = make_archives(ArchiveRequest(folders["2d"], store, name=NAME, **cascade))  # type: ignore[arg-type]
    models = f"{server.server.management_url}/models"
    start = {"url": archive.name, "initial_workers": "1", "synchronous": "true"}
    try:
        httpx.post(models, params=start, timeout=PATIENCE_S, trust_env=False).raise_for_status()
    finally:
        archive.unlink()  # or servers of all archives would have it too
    yield NAME
    httpx.delete(f"{models}/{NAME}", timeout=PATIENCE_S, trust_env=False).raise_for_status()


@pytest.fixture(scope="module")
def image() -> bytes:
    array, _ = volumes.blobs((24, 26, 20), seed=3)
    return volumes.nifti_gz(array, volumes.oblique((1.5, 1.4, 1.7)))


def test_an_ensemble_with_a_cascade_is_stocks_commands_one_after_another(
    recipe: str, server: LiveServer, folders: dict[str, Path], image: bytes, tmp_path: Path
) -> None:
    files = [volumes.write(tmp_path, "case_0000.nii.gz", image)]
    one = stock.predict(folders["2d"], files).probabilities
    other = stock.cascade(folders["3d_lowres"], folders["3d_cascade_fullres"], files).probabilities
    assert one is not None
    assert other is not None
    mean = (one + other) / 2
    labels = mean.argmax(0)
    assert len(np.unique(labels)) > 1

    asked = json.dumps({"save_probabilities": True, "output_format": "npz"})
    answer = server.predict(recipe, image, options=asked)
    assert answer.status_code == HTTPStatus.OK, answer.text
    with np.load(io.BytesIO(answer.content)) as served:
        np.testing.assert_array_equal(served["labels"], labels)
        np.testing.assert_array_equal(served["probabilities"], mean)

    answer = server.predict(recipe, image)
    assert answer.status_code == HTTPStatus.OK, answer.text
    file = nib.Nifti1Image.from_bytes(volumes.gunzip(answer.content))
    np.testing.assert_array_equal(np.asarray(file.dataobj).T, labels)


def test_what_the_management_port_says_of_a_recipe_is_what_the_model_says(recipe: str, server: LiveServer) -> None:
    """TorchServe reads and writes the description anew: whole numbers stay whole, texts stay texts."""
    urls, management = server.server.inference_url, server.server.management_url
    by_model, by_torchserve = (
        {each.name: each for each in list_models(sources).models}[recipe]
        for sources in (Sources(urls, management_url=management), Sources(None, management_url=management))
    )
    for name in ("version", "folds", "channels", "labels", "recipe", "members", "digest", "checkpoint"):
        assert in_json(getattr(by_torchserve, name)) == in_json(without_nulls(getattr(by_model, name))), name


@pytest.mark.long
def test_such_a_model_teaches_a_student(
    recipe: str, server: LiveServer, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the mean that it predicts, on the image's own grid, cropped as the student's case is."""
    for name, value in named_folders(tmp_path).items():
        monkeypatch.setenv(name, value)
    one_process(monkeypatch)
    student = OddModel(spacing=SPACING)
    plans = write_dataset(tmp_path, student.plans(), student.dataset())
    preprocess(plans, student.configuration)
    command = ["soft-targets", str(plans), "--configuration", student.configuration, "--model", recipe]
    done = CliRunner().invoke(app, [*command, "--server", server.server.inference_url])
    assert done.exit_code == 0, done.output
    targets = SoftTargets.beside(plans.parent / f"{student.plans_name}_{student.configuration}")
    teacher = targets.teacher()
    assert teacher is not None
    assert "3d_cascade_fullres" in teacher.name
    file = tmp_path / "raw" / "Dataset950_Odd" / "imagesTr" / "case_1_0000.nii.gz"
    one = stock.predict(folders["2d"], [file]).probabilities
    other = stock.cascade(folders["3d_lowres"], folders["3d_cascade_fullres"], [file]).probabilities
    assert one is not None
    assert other is not None
    properties = nnUNetDatasetBlosc2(str(targets.folder.parent)).load_case("case_1")[3]
    box = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
    expected = ((one + other) / 2)[(slice(None), *box)]
    found = targets.load("case_1")[:]
    assert found.shape == expected.shape != one.shape
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-3)


def without_nulls(value: Any) -> Any:
    """What TorchServe leaves of a JSON value."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def in_json(value: Any) -> str:
    """So that 1 and 1.0 are not the same."""
    return json.dumps(value, sort_keys=True)
