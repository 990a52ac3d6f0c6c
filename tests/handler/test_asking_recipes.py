"""What a cascade or an ensemble is asked with: labels of a first stage of any kind, and options that are odd."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from functools import cache
from http import HTTPStatus

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest

from nnunet_torchserve.backend import Backend
from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import BACKEND
from support.accuracy import report, structure
from support.chaos import SPACING, Case
from support.odd_models import OddModel
from support.packaged import pipeline_of

LONG = pytest.mark.long
"""Of what is answered, a few are enough in a hurry; what is refused costs next to nothing."""

QUICK = ("float labels", "another byte order", "gzip")
ANSWERED = (200, "")
IMAGE = Case((24, 26, 20), 3)


Recipes = Callable[[str], Pipeline]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    """A cascade, and an ensemble of which it is a part."""
    home = tmp_path_factory.mktemp("recipes")
    lowres = OddModel(named="3d_lowres", spacing=3.0).write(home)
    last = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres").write(home)

    @cache
    def load(name: str) -> Pipeline:
        if name == "cascade":
            return pipeline_of(last, home / name, previous_stages=(lowres,))
        return pipeline_of(OddModel(2).write(home), home / name, others=(last,), previous_stages=(lowres,))

    return load


def ask(pipeline: Pipeline, previous: bytes | None = None, **options: object) -> tuple[int, str, str]:
    """Status, the problem's code and its detail, which are empty where there is none."""
    parts = {"image": IMAGE.body, "options": json.dumps(options).encode()}
    response = pipeline.answer(Request(parts if previous is None else parts | {"previous_stage": previous}, {}))
    if response.status is HTTPStatus.OK:
        return 200, "", ""
    problem = json.loads(response.body)
    return int(response.status), problem["code"], problem["detail"]


def nifti(array: npt.NDArray[np.generic], affine: npt.NDArray[np.float64] | None = None) -> bytes:
    """(x, y, z[, t]) voxels where the image lies, or elsewhere."""
    place = np.diag([*SPACING, 1.0]) if affine is None else affine
    return bytes(nib.Nifti1Image(array, place, dtype=array.dtype).to_bytes())


def npy(array: npt.NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


SOUND = np.random.default_rng(0).integers(0, 4, IMAGE.shape).astype(np.uint8)
NAN = np.where(SOUND == 1, np.nan, SOUND).astype(np.float32)

TAKEN: dict[str, Callable[[], bytes]] = {
    "float labels": lambda: nifti(SOUND.astype(np.float64)),
    "64-bit labels": lambda: nifti(SOUND.astype(np.int64)),
    "Fortran order": lambda: npy(np.asfortranarray(SOUND.T)),
    "another byte order": lambda: npy(SOUND.T.astype(">u2")),
    "bool, of two labels": lambda: npy(SOUND.T > 1),
    "one label only": lambda: nifti(np.zeros_like(SOUND)),
    "a fourth axis of one": lambda: nifti(SOUND[..., None]),
    "gzip": lambda: gzip.compress(nifti(SOUND)),
}
REFUSED: dict[str, tuple[Callable[[], bytes], set[tuple[int, str]]]] = {
    "another grid": (lambda: nifti(SOUND[:-1]), {(422, "channels_disagree")}),
    "axes the other way round": (lambda: npy(SOUND), {(422, "channels_disagree")}),
    "another place": (lambda: nifti(SOUND, np.diag([2.0, 2, 2, 1])), {(422, "channels_disagree")}),
    "NaN": (lambda: nifti(NAN), {(422, "wrong_range")}),
    "infinite": (lambda: nifti(np.where(SOUND == 1, np.inf, SOUND)), {(422, "wrong_range")}),
    "halves": (lambda: nifti(SOUND + np.float32(0.5)), {(422, "wrong_range")}),
    "negative": (lambda: nifti(SOUND.astype(np.int16) - 1), {(422, "wrong_range")}),
    "unknown labels": (lambda: nifti(SOUND + np.uint8(3)), {(422, "wrong_range")}),
    "labels of 32 bits": (lambda: nifti(SOUND.astype(np.float64) * 2**31), {(422, "wrong_range")}),
    "4-D": (lambda: nifti(np.stack([SOUND, SOUND], -1)), {(422, "wrong_channels")}),
    "one plane": (lambda: nifti(SOUND[:, :, 0]), {(422, "channels_disagree")}),
    "empty": (lambda: b"", {(415, "unknown_format"), (400, "malformed")}),
    "an empty array": (lambda: npy(np.zeros((0, 26, 24), np.uint8)), {(400, "malformed"), (422, "channels_disagree")}),
    "cut off": (lambda: nifti(SOUND)[:-100], {(400, "malformed")}),
    "complex": (lambda: npy(SOUND.T.astype(np.complex64)), {(400, "malformed"), (415, "unknown_format")}),
    "objects": (lambda: npy(np.array([{}], object)), {(400, "malformed"), (415, "unknown_format")}),
    "JSON": (lambda: b'{"labels": []}', {(415, "unknown_format")}),
}


@pytest.mark.parametrize("name", [each if each in QUICK else pytest.param(each, marks=LONG) for each in TAKEN])
def test_labels_of_any_kind_are_taken(name: str, recipes: Recipes) -> None:
    assert ask(recipes("cascade"), TAKEN[name]()) == (200, "", "")


def test_a_dice_of_images_alone_is_not_said_of_an_answer_to_somebodys_labels(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured had its first stage's labels from the archive. As if eager were another backend."""
    cascade = recipes("cascade")
    measured = report({"a": structure(9, 9, 9)}).model_copy(update={"backend": Backend.EAGER})
    monkeypatch.setattr(cascade.bundle, "accuracy", measured)
    image = {"image": IMAGE.body}
    of_both = [cascade.answer(Request(image | more, {})) for more in ({}, {"previous_stage": nifti(SOUND)})]
    assert [answer.headers[BACKEND] for answer in of_both] == ["eager; dice=1.0000", "eager"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_first_stage_is_refused_by_its_name(name: str, recipes: Recipes) -> None:
    make, allowed = REFUSED[name]
    status, code, detail = ask(recipes("cascade"), make())
    assert (status, code) in allowed, detail
    assert detail.startswith("previous_stage")


@LONG
def test_an_ensemble_takes_no_labels(recipes: Recipes) -> None:
    assert ask(recipes("ensemble"), nifti(SOUND))[:2] == (422, "wrong_channels")


ODD: dict[str, tuple[dict[str, object], set[tuple[int, str]]]] = {
    "a fold that it lacks": ({"folds": [3]}, {(422, "unknown_fold")}),
    "fold_all": ({"folds": "all"}, {(422, "unknown_fold")}),
    "no fold": ({"folds": []}, {(400, "bad_option")}),
    "a fold twice": ({"folds": [0, 0]}, {(400, "bad_option")}),
    "postprocess without one": ({"postprocess": True}, {(200, "")}),
    "no postprocess without one": ({"postprocess": False}, {(200, "")}),
    "postprocess as text": ({"postprocess": "auto"}, {(400, "bad_option")}),
    "batch": ({"priority": "batch"}, {(200, "")}),
    "a priority of nobody": ({"priority": "urgent"}, {(400, "bad_option")}),
    "no time": ({"timeout_s": 0}, {(400, "bad_option")}),
    "hardly any time": ({"timeout_s": 1e-3}, {(504, "deadline")}),
    "endless time": ({"timeout_s": 1e308}, {(200, "")}),
    "the finest step": ({"tile_step_size": 0.05, "timeout_s": 1e-3}, {(504, "deadline"), (413, "too_large")}),
    "a step of nothing": ({"tile_step_size": 0}, {(400, "bad_option")}),
    "a channel that there is not": (
        {"save_probabilities": True, "probability_channels": [4]},
        {(400, "bad_option")},
    ),
    "the last channel": (
        {"save_probabilities": True, "probability_channels": [3], "output_format": "npz"},
        {(200, "")},
    ),
    "nearest": ({"export": "nearest"}, {(200, ""), (400, "bad_option")}),
    "nearest probabilities": ({"export": "nearest", "save_probabilities": True}, {(400, "bad_option")}),
    "properties": ({"properties": True}, {(200, "")}),
    "stock": ({"preprocess": "stock"}, {(200, "")}),
    "in float32": ({"accumulate": "float32", "use_gaussian": False}, {(200, "")}),
    "all formats": ({"output_format": ["nii.gz", "nrrd", "mha", "npz", "json"]}, {(200, "")}),
    "a spacing of a file": ({"spacing": [1, 1, 1]}, {(400, "bad_option"), (422, "bad_spacing"), (200, "")}),
    "a series": ({"series_uid": ["1.2", "1.3"]}, {(400, "bad_option")}),
}


@pytest.mark.parametrize("model", ["cascade", pytest.param("ensemble", marks=LONG)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LONG) if ANSWERED in allowed else name for name, (_, allowed) in ODD.items()]
)
def test_every_odd_option_has_its_answer(name: str, model: str, recipes: Recipes) -> None:
    options, allowed = ODD[name]
    status, code, detail = ask(recipes(model), None, **options)
    assert (status, code) in allowed, detail
    assert recipes(model).engine._admission.charged == 0  # type: ignore[attr-defined]
