"""What a model says of itself to whoever may predict: nnU-Net's own files, whole, and without any image."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from batchgenerators.utilities.file_and_folder_operations import save_json

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.bundle import SCHEMA_VERSION, ModelBundle
from nnunet_torchserve.errors import Draining
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.served import SERVED_FILE, read_served, served_model, write_served
from nnunet_torchserve.telemetry import Counts
from support import stock
from support.bad_requests import GOOD

Load = Callable[[str], Pipeline]
DESCRIBE = {"X-Nnunet-Options": '{"describe": true}'}


def described(pipeline: Pipeline, parts: Mapping[str, object] | None = None) -> dict[str, Any]:
    response = pipeline.answer(Request(parts or {}, DESCRIBE))
    assert (int(response.status), response.content_type) == (200, "application/json"), response.body
    description: dict[str, Any] = json.loads(response.body)
    return description


@pytest.mark.parametrize("model", ["five_folds", "regions", "flat"])
def test_nnunets_files_come_whole_as_stock_writes_them_beside_predictions(
    model: str, pipeline: Load, models: dict[str, Path], tmp_path: Path
) -> None:
    stocks = stock.loaded(models[model], folds=[0])
    description = described(pipeline(model))
    for ours, theirs in (("dataset_json", stocks.dataset_json), ("plans_json", stocks.plans_manager.plans)):
        save_json(theirs, tmp_path / "stock.json", sort_keys=False)
        save_json(description[ours], tmp_path / "ours.json", sort_keys=False)
        assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "stock.json").read_bytes()
    assert description["plans"] == stocks.plans_manager.plans_name
    assert description["dataset"] == stocks.plans_manager.dataset_name
    assert description["trainer"] == stocks.trainer_name
    assert description["checkpoint"] == "checkpoint_final.pth"


@pytest.mark.parametrize("model", ["five_folds", "regions", "flat"])
def test_members_and_recipe_are_told_and_the_model_is_what_its_one_member_is(
    model: str, pipeline: Load, models: dict[str, Path]
) -> None:
    description = described(pipeline(model))
    configuration = models[model].name.rsplit("__", maxsplit=1)[-1]
    assert description["recipe"] == {"kind": "single", "member": configuration}
    [(name, member)] = description["members"].items()
    assert name == configuration
    assert member.keys() >= {"dataset", "trainer", "plans", "configuration", "folds", "checkpoint", "patch_size"}
    told = {key: value for key, value in member.items() if key in description}
    assert told == {key: description[key] for key in told}
    assert member.keys() - told.keys() == {"checkpoint_digests", "weights_digests", "weights_bytes"}
    assert [member["dataset"], "__".join(member[key] for key in ("trainer", "plans", "configuration"))] == [
        models[model].parent.name,
        models[model].name,
    ]
    assert member["folds"] == list(range(len(list(models[model].glob("fold_*")))))
    assert member["checkpoint"] == "checkpoint_final.pth"


def test_weights_are_told_by_their_digests_and_channels_by_their_values(
    pipeline: Load, models: dict[str, Path], unpacked: Callable[[str], Path]
) -> None:
    description = described(pipeline("five_folds"))
    [member] = description["members"].values()
    folder = unpacked("five_folds") / "members" / "3d_fullres"
    files = {
        "checkpoint": [models["five_folds"] / f"fold_{fold}" / "checkpoint_final.pth" for fold in range(5)],
        "weights": [folder / f"fold_{fold}.safetensors" for fold in range(5)],
    }
    for what, of_folds in files.items():
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in of_folds]
        assert member[f"{what}_digests"] == {str(fold): f"sha256:{digest}" for fold, digest in enumerate(digests)}
    assert member["weights_bytes"] == sum(file.stat().st_size for file in folder.glob("fold_*.safetensors"))
    seen = json.loads((models["five_folds"] / "plans.json").read_text())["foreground_intensity_properties_per_channel"]
    assert description["channel_values"] == {"0": [seen["0"]["percentile_00_5"], seen["0"]["percentile_99_5"]]}


def test_a_model_whose_folder_is_gone_is_described_all_the_same(
    pipeline: Load, unpacked: Callable[[str], Path], tmp_path: Path
) -> None:
    """A worker may outlive it for a moment, when the model is unregistered."""
    folder = shutil.copytree(unpacked("flat"), tmp_path / "flat")
    bundle = ModelBundle(folder)
    served = replace(pipeline("flat"), bundle=bundle)
    before = described(served)
    shutil.rmtree(folder)
    [(name, member)] = before["members"].items()
    assert described(served) == before | {"members": {name: member | {"weights_bytes": None}}}


LOWRES, FULLRES, FLAT = (
    {
        "name": name,
        "dataset": "Dataset900_X",
        "trainer": "nnUNetTrainer",
        "plans": "nnUNetPlans",
        "configuration": name,
        "folds": [{"fold": fold}],
        "source": {"checkpoint": "checkpoint_best.pth"},
    }
    for fold, name in enumerate(("3d_lowres", "3d_cascade_fullres", "2d"))
)
CASCADE = {"kind": "cascade", "first": {"kind": "single", "member": "3d_lowres"}, "member": "3d_cascade_fullres"}
ONE_FLAT = {"kind": "single", "member": "2d"}


@pytest.mark.parametrize(
    ("recipe", "members", "looks_like"),
    [
        (ONE_FLAT, [FLAT], FLAT),
        (CASCADE, [LOWRES, FULLRES], FULLRES),
        ({"kind": "ensemble", "of": [CASCADE, ONE_FLAT]}, [LOWRES, FULLRES, FLAT], FULLRES),
        ({"kind": "ensemble", "of": [ONE_FLAT, CASCADE]}, [FLAT, LOWRES, FULLRES], FLAT),
    ],
)
def test_a_model_is_listed_as_the_last_stage_of_its_first_member(
    recipe: dict[str, object], members: list[dict[str, Any]], looks_like: dict[str, Any]
) -> None:
    content = {"schema_version": SCHEMA_VERSION, "members": members, "recipe": recipe}
    model = served_model("brain", "1.0", json.dumps(content).encode())
    written = asdict(model)
    assert {model: 1}[model] == 1, "serve counts workers by model"
    assert {key: written[key] for key in ("dataset", "trainer", "plans", "configuration")} == {
        key: looks_like[key] for key in ("dataset", "trainer", "plans", "configuration")
    }
    assert written["folds"] == tuple(fold["fold"] for fold in looks_like["folds"])
    assert written["checkpoint"] == "checkpoint_best.pth"
    assert written["recipe"] == recipe
    assert written["folder_trainer"] == "nnUNetTrainer", "nobody knows the folder: the checkpoints' word"


@pytest.mark.parametrize(
    ("folder", "trainer"),
    [
        ("Dataset900_X/nnUNetTrainerMine__nnUNetPlans__2d", "nnUNetTrainerMine"),
        ("Dataset900_X/nnUNetTrainerMine__nnUNetPlans__3d_fullres", "nnUNetTrainer"),  # renamed to something
        ("Dataset900_X/nnUNetTrainerMine__Other__2d", "nnUNetTrainer"),
        ("Dataset900_X/my model__nnUNetPlans__2d", "nnUNetTrainer"),
        ("Dataset900_X/__nnUNetPlans__2d", "nnUNetTrainer"),
        ("models/flat", "nnUNetTrainer"),
    ],
)
def test_the_trainer_of_a_folder_is_told_beside_that_of_its_checkpoints(folder: str, trainer: str) -> None:
    flat = FLAT | {"source": {"checkpoint": "checkpoint_final.pth", "folder": folder}}
    content = {"schema_version": SCHEMA_VERSION, "members": [flat], "recipe": ONE_FLAT}
    model = served_model("brain", "1.0", json.dumps(content).encode())
    assert (model.trainer, model.folder_trainer) == ("nnUNetTrainer", trainer)


def test_an_image_that_comes_along_is_not_looked_at(pipeline: Load) -> None:
    model = pipeline("flat")
    expected = described(model)
    for parts in ({"body": b""}, {"body": b"no image"}, {"body": {"parsed": "by TorchServe"}}, {"mask": b"x"}):
        assert described(model, parts) == expected
    response = model.answer(Request({"options": b'{"describe": true, "timeout_s": 5}', "image": GOOD}, {}))
    assert json.loads(response.body) == expected


def test_a_description_is_given_while_draining_and_costs_nothing(
    pipeline: Load, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        msg = "come again"
        raise Draining(msg, 1)

    counts = Counts()
    engine: Any = SimpleNamespace(backend=Backend.EAGER)  # it knows that already, and can be asked for nothing else
    drained = replace(pipeline("flat"), refuse=refuse, counts=counts, engine=engine)
    with caplog.at_level(logging.INFO):
        assert described(drained)["name"] == "flat"
    assert counts.take() == {}
    assert drained.answer(Request({"body": GOOD}, {})).status == 503
    assert counts.take() != {}
    assert "Blobs" not in caplog.text


@pytest.mark.parametrize(
    "others", [{"folds": 0}, {"stream": True}, {"output_format": "json"}, {"save_probabilities": True}]
)
def test_an_option_that_needs_a_case_is_refused_beside_it(others: dict[str, object], pipeline: Load) -> None:
    text = json.dumps({"describe": True} | others)
    response = pipeline("flat").answer(Request({"body": GOOD}, {"X-Nnunet-Options": text}))
    problem = json.loads(response.body)
    assert (int(response.status), problem["code"]) == (400, "bad_option")
    assert next(iter(others)) in problem["detail"]


def test_what_serve_wrote_down_is_told(pipeline: Load, unpacked: Callable[[str], Path], tmp_path: Path) -> None:
    model = pipeline("regions")
    assert described(model)["served"] is None
    written = served_model("brain", "2.0", (unpacked("regions") / "bundle.json").read_bytes())
    write_served(tmp_path, [written])
    [entry] = described(replace(model, served=lambda: read_served(tmp_path)))["served"]
    description = described(model)
    assert (entry.pop("name"), entry.pop("version")) == ("brain", "2.0")
    assert entry == {key: description[key] for key in asdict(written) if key not in ("name", "version")}
    assert None not in entry.values()


@pytest.mark.parametrize("content", [None, "", "["])
def test_a_list_that_cannot_be_read_is_none(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / SERVED_FILE).write_text(content)
    assert read_served(tmp_path) is None
    assert read_served(None) is None


@pytest.mark.parametrize("schema", [1, 3])
def test_an_archive_of_another_schema_is_listed_as_far_as_it_says(schema: int) -> None:
    """It brings its own serving core."""
    content = {"schema_version": schema, "dataset": "Dataset900_X", "members": {"a": {}}, "recipe": ["a"]}
    model = served_model("brain", "1.0", json.dumps(content).encode())
    assert (model.dataset, model.folds, model.checkpoint) == ("Dataset900_X", (), None)
    assert model.digest.startswith("sha256:")
