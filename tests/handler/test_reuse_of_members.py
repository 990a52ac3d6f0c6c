"""What a model of several members takes over from an earlier request: each member's volume, and its first stage."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_torchserve.bundle import ModelBundle
from nnunet_torchserve.cases import Settings
from nnunet_torchserve.engine.local import LocalEngine
from nnunet_torchserve.engine.prediction import Prediction
from nnunet_torchserve.engine.remote import RemoteEngine
from nnunet_torchserve.limits import Limits
from nnunet_torchserve.options import parse_options
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.recipe import Cascade, Ensemble, Single
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import Response
from nnunet_torchserve.reuse import keys_of
from nnunet_torchserve.settings import HandlerSettings
from nnunet_torchserve.telemetry import SERVER_TIMING
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from support.bad_requests import GOOD
from support.chaos import engine_processes
from support.odd_models import OddModel

CPU = torch.device("cpu")
FULLRES = OddModel()
LOWRES = OddModel(named="3d_lowres", spacing=3.0)
CASCADE = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres")
RECIPE = Ensemble(
    of=(
        Single(member="3d_fullres"),
        Cascade(first=Single(member="3d_lowres"), member="3d_cascade_fullres"),
    )
)
PLAIN, COARSE = {"use_mirroring": False}, {"use_mirroring": False, "tile_step_size": 0.9}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """An ensemble of one configuration and a cascade."""
    folder = tmp_path_factory.mktemp("members")
    models = [model.write(folder / str(number)) for number, model in enumerate((FULLRES, CASCADE, LOWRES))]
    request = ArchiveRequest(models[0], folder, name="m", others=(models[1],), previous_stages=(models[2],))
    [archive] = make_archives(request)
    zipfile.ZipFile(archive).extractall(folder / "unpacked")
    return ModelBundle(folder / "unpacked")


def ask(worker: Pipeline, **options: object) -> Response:
    response = worker.answer(Request({"body": GOOD}, {"X-Nnunet-Options": json.dumps(PLAIN | options)}))
    assert response.status is HTTPStatus.OK, response.body
    return response


def stages(response: Response) -> set[str]:
    return set(re.findall(r"(\w+);(?:dur|desc)", response.headers[SERVER_TIMING]))


def test_each_members_volume_is_kept_and_a_first_stage_is_not_predicted_again(
    bundle: ModelBundle, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All members in one reservation and on one connection: nobody takes the engine for dead between two of them."""
    engine, alone = RemoteEngine(bundle, CPU, cache_bytes=1024**3), LocalEngine(bundle, CPU)
    worker = Pipeline(bundle, engine, Limits(), 600.0, settings=HandlerSettings(cache_bytes=1024**3))
    plain = Pipeline(bundle, alone, Limits(), 600.0)
    with caplog.at_level("INFO"):
        fresh, again, coarse = ask(worker), ask(worker), ask(worker, **COARSE)
    assert [fresh.body, coarse.body] == [ask(plain).body, ask(plain, **COARSE).body]
    assert again.body == fresh.body
    told = [stages(each) & {"reused", "preprocess"} for each in (fresh, again, coarse)]
    assert told == [{"preprocess"}, {"reused"}, {"reused", "preprocess"}]  # the last stage sees other labels then
    passes = [json.loads(line)["passes"] for line in re.findall(r"request (\{.*\})", caplog.text)]
    assert passes[1] < passes[0]
    assert "the engine is gone" not in caplog.text
    assert len(engine_processes(runtime)) == 1
    engine.disconnect()


def test_the_engine_knows_how_many_passes_a_case_needs_afterwards(
    bundle: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a first stage runs, whose last stage has begun with it."""
    asked: dict[str, int] = {}
    predict = LocalEngine.predict

    def noted(self: LocalEngine, data: torch.Tensor, settings: Settings, *more: Any) -> Prediction:
        asked[settings.member] = more[-1]
        return predict(self, data, settings, *more)

    monkeypatch.setattr(LocalEngine, "predict", noted)
    ask(Pipeline(bundle, LocalEngine(bundle, CPU), Limits(), 600.0))
    assert list(asked) == ["3d_fullres", "3d_lowres", "3d_cascade_fullres"]
    assert asked["3d_fullres"] > asked["3d_lowres"] > asked["3d_cascade_fullres"] == 0


def test_a_last_stages_key_has_the_clients_labels_and_no_options_of_a_first_stage_that_is_not_predicted() -> None:
    def keys(options: Mapping[str, object], previous: bytes | None) -> dict[str, str]:
        asked = parse_options(json.dumps(options).encode())
        return dict(keys_of([(b"image",)], asked, RECIPE.of[1], answers=False, previous=previous).volumes)

    own = keys(PLAIN, b"labels")["3d_cascade_fullres"]
    assert own == keys(COARSE, b"labels")["3d_cascade_fullres"]
    assert len({own, keys(PLAIN, b"others")["3d_cascade_fullres"], keys(PLAIN, None)["3d_cascade_fullres"]}) == 3
    members = keys_of([(b"image",)], parse_options(None), RECIPE, answers=False).volumes
    assert len(set(members.values())) == 3
