"""Models of several members as a client sees them: what it asks for, what it shows, what it does not take them for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from nnunet_torchserve.recipe import Recipe, in_words
from nnunet_torchserve_client import RemotePredictor, errors
from nnunet_torchserve_client.description import recipe_in_words
from nnunet_torchserve_client.events import server_event
from nnunet_torchserve_client.progress import state_of
from nnunet_torchserve_tools import predict
from nnunet_torchserve_tools.errors import UsageError
from nnunet_torchserve_tools.list_models import Listed, Listing, Sources, list_models
from support.peer import DESCRIPTION, Json, Peer

FULLRES = {"kind": "single", "member": "3d_fullres"}
LOWRES = {"kind": "single", "member": "3d_lowres"}
CASCADE = {"kind": "cascade", "first": LOWRES, "member": "3d_cascade_fullres"}
OPEN_CASCADE = {"kind": "cascade", "first": None, "member": "3d_cascade_fullres"}
ENSEMBLE = {"kind": "ensemble", "of": [FULLRES, CASCADE]}

LARGEST: Json = {"steps": [{"labels": [1, 2, 3]}]}
KNOWS_POSTPROCESSING: Json = {"options": {"properties": {"postprocess": {}}}}


def member(configuration: str, **changes: object) -> Json:
    names = ("dataset", "trainer", "plans", "folds", "checkpoint")
    return {**{name: DESCRIPTION[name] for name in names}, "configuration": configuration, **changes}


def described(recipe: Json, *configurations: str) -> Json:
    members = {name: member(name) for name in configurations}
    return {**DESCRIPTION, "configuration": configurations[-1], "recipe": recipe, "members": members}


@pytest.fixture
def server() -> Iterator[Peer]:
    with Peer().listening() as listening:
        yield listening


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a_0000.nii.gz").write_bytes(b"image")
    return folder


# --- Postprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "wanted", "asked"),
    [
        ({"postprocessing": LARGEST, **KNOWS_POSTPROCESSING}, False, False),
        ({"postprocessing": LARGEST, **KNOWS_POSTPROCESSING}, True, True),
        ({"postprocessing": None, **KNOWS_POSTPROCESSING}, False, None),
        ({"postprocessing": None, **KNOWS_POSTPROCESSING}, True, None),
        ({}, False, None),
    ],
)
def test_as_nnunet_nothing_is_postprocessed_unless_that_is_asked_for(
    description: Json,
    wanted: bool,
    asked: bool | None,
    server: Peer,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.description = {**DESCRIPTION, **description}
    with RemotePredictor(server.url, "blobs", postprocess=wanted) as predictor:
        predictor.predict_from_files(str(images), str(tmp_path / "one"))
    flag = ["--postprocess"] if wanted else []
    predict.run(["-i", str(images), "-o", str(tmp_path / "two"), "--model", "blobs", "--server", server.url, *flag])
    assert [received.options.get("postprocess") for received in server.received] == [asked, asked]
    is_in_vain = wanted and asked is None
    assert ("no postprocessing" in capsys.readouterr().err) == is_in_vain
    assert ("no postprocessing" in caplog.text) == is_in_vain


# --- An ensemble is no model of nnU-Net's ----------------------------------------------------------------------------


def test_an_ensemble_is_not_taken_for_its_first_model(
    server: Peer, images: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    """Its description begins as that of its first model does."""
    ensemble = {"kind": "ensemble", "of": [FULLRES, {"kind": "single", "member": "2d"}]}
    alone = {**DESCRIPTION, "name": "alone", "digest": "sha256:2", "recipe": FULLRES}
    mean = described(ensemble, "2d", "3d_fullres")
    call = ["-i", str(images), "-o", str(tmp_path / "out"), "--server", server.url]
    by_names = ["-d", "Dataset901_Blobs", "-c", "3d_fullres"]
    for served in (None, [mean]):
        server.description = {**mean, "served": served}
        for more in (by_names, ["--model", "blobs", "-c", "3d_fullres"]):
            with pytest.raises(UsageError, match="ensemble of 3d_fullres and 2d"):
                predict.run([*call, *more])
    with (
        RemotePredictor(server.url, "blobs") as predictor,
        pytest.raises(errors.WrongModel, match="ensemble of 3d_fullres and 2d, not one folder's model"),
    ):
        predictor.initialize_from_trained_model_folder(models["five_folds"], (0, 1))
    assert not server.received
    predict.run([*call, "--model", "blobs"])
    server.description = {**mean, "served": [mean, alone]}
    predict.run([*call, *by_names])
    assert [path for path in server.paths if path.endswith(("/blobs", "/alone/1.0"))][-1] == "/predictions/alone/1.0"
    assert len(server.received) == 2


@pytest.mark.parametrize(("others", "asked"), [([0, 1], [0, 1]), ([0], None)])
def test_without_f_every_member_predicts_with_all_its_folds(
    others: list[int], asked: list[int] | None, server: Peer, images: Path, tmp_path: Path
) -> None:
    """One list of folds holds for all members, and is refused where one of them lacks one."""
    members = {"3d_fullres": member("3d_fullres"), "3d_lowres": member("3d_lowres", folds=others)}
    recipe = {"kind": "ensemble", "of": [FULLRES, LOWRES]}
    server.description = {**DESCRIPTION, "recipe": recipe, "members": members}
    predict.run(["-i", str(images), "-o", str(tmp_path / "out"), "--model", "blobs", "--server", server.url])
    assert server.received[0].options.get("folds") == asked


# --- What is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (FULLRES, "3d_fullres"),
        (CASCADE, "3d_lowres, then 3d_cascade_fullres"),
        (OPEN_CASCADE, "labels that a request brings, then 3d_cascade_fullres"),
        (ENSEMBLE, "ensemble of 3d_fullres and (3d_lowres, then 3d_cascade_fullres)"),
        ({"kind": "ensemble", "of": [FULLRES, LOWRES, FULLRES]}, "ensemble of 3d_fullres, 3d_lowres and 3d_fullres"),
    ],
)
def test_a_recipe_is_said_in_the_same_words_by_client_and_server(recipe: Json, words: str) -> None:
    assert recipe_in_words(recipe) == words
    assert in_words(TypeAdapter(Recipe).validate_python(recipe)) == words


def test_progress_names_the_member_that_works_if_the_server_does() -> None:
    told: Json = {"event": "progress", "stage": "network", "done": 1, "total": 8}
    for more, words in (({}, "network"), ({"member": "3d_lowres"}, "3d_lowres: network"), ({"member": 3}, "network")):
        event = server_event("a", "http://s", {**told, **more})
        assert event is not None
        assert state_of(event) == words


def lines(description: Json) -> list[str]:
    listed = Listed("brain", "1.0")
    listed.take_description(description)
    return list(Listing([listed]).lines())


def test_a_list_has_the_recipe_and_every_member() -> None:
    shown = lines(described(ENSEMBLE, "3d_fullres", "3d_lowres", "3d_cascade_fullres"))
    made = "nnUNetTrainer__nnUNetPlans__"
    assert shown == [
        "brain 1.0",
        "  Dataset901_Blobs, ensemble of 3d_fullres and (3d_lowres, then 3d_cascade_fullres):",
        f"    3d_fullres: {made}3d_fullres, folds 0, 1, checkpoint_final.pth",
        f"    3d_lowres: {made}3d_lowres, folds 0, 1, checkpoint_final.pth",
        f"    3d_cascade_fullres: {made}3d_cascade_fullres, folds 0, 1, checkpoint_final.pth",
    ]
    single = {**described(FULLRES, "3d_fullres"), "postprocessing": LARGEST}
    assert lines(single) == [
        "brain 1.0",
        f"  Dataset901_Blobs, {made}3d_fullres, folds 0, 1, checkpoint_final.pth",
        "  labels are postprocessed, unless a request says otherwise",
    ]
    assert "labels that a request brings, then" in lines(described(OPEN_CASCADE, "3d_cascade_fullres"))[1]


@pytest.mark.parametrize("is_written_down", [True, False])
def test_a_model_that_is_asked_tells_its_members(is_written_down: bool, server: Peer) -> None:
    description: dict[str, Any] = described(CASCADE, "3d_lowres", "3d_cascade_fullres")
    server.description = description | {"served": [description] if is_written_down else None}
    [listed] = list_models(Sources(server.url, "blobs")).models
    assert list(listed.members or ()) == ["3d_lowres", "3d_cascade_fullres"]
    assert listed.recipe == CASCADE
