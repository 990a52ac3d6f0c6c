"""Cascades, ensembles and postprocessing: in one request, the answer that nnU-Net's commands give one after another."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)

from nnunet_torchserve.pipeline import Pipeline
from nnunet_torchserve.request import Request
from nnunet_torchserve.responses import Response
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import ModelWarning, ToolError, UsageError
from support import stock, volumes
from support.odd_models import OddModel
from support.packaged import pipeline_of

if TYPE_CHECKING:
    from nnunet_torchserve.engine.prediction import Engine

LOWRES = OddModel(named="3d_lowres", spacing=3.0)
CASCADE = OddModel(named="3d_cascade_fullres", previous_stage="3d_lowres")
SPACING = (1.3, 1.5, 1.8)
"""mm: of no member's grid, so that every stage resamples images, labels and logits."""
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3},
    "more_dataset": {"regions_class_order": [1, 2, 3]},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:The values in the label map", "ignore:.torch.jit:FutureWarning", "ignore:Detected old nnU-Net plans"
)


def seeded(model: OddModel, folder: Path, seed: int = 0) -> Path:
    """A folder of the model; another seed is another network."""

    def shift(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in weights.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05 * seed)

    return model.but(change_weights=shift).write(folder / f"seed_{seed}")


def ask(pipeline: Pipeline, body: bytes, previous: bytes | None = None, **options: object) -> Response:
    parts: dict[str, object] = {"image": body, "options": json.dumps({"output_format": "npz"} | options).encode()}
    if previous is not None:
        parts["previous_stage"] = previous
    return pipeline.answer(Request(parts, {}))


def arrays(response: Response) -> dict[str, npt.NDArray[Any]]:
    assert response.status is HTTPStatus.OK, response.body
    with np.load(io.BytesIO(response.body)) as answer:
        return dict(answer)


def image(shape: tuple[int, int, int] = (24, 26, 20), *, cropped: bool = True) -> bytes:
    """Blobs with an empty rim, which nnU-Net crops, and a hole."""
    array, _ = volumes.blobs(shape, seed=3)
    if cropped:
        inside = np.zeros(shape, bool)
        inside[3:-4, 2:-3, 1:-2] = True
        array = np.where(inside, array + 1, 0)
        array[10:13, 10:13, 8:11] = 0
    return volumes.nifti_gz(array.astype(np.float32), volumes.oblique(SPACING, angle=0.0))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"masked": True},
        {"folds": (0, 1), "mirroring": (0, 2)},
        {"transposed": (2, 1, 0)},
        REGIONS,
    ],
    ids=["plain", "masked", "folds and mirroring", "transposed", "regions"],
)
def test_a_cascade_is_stocks_two_commands(change: dict[str, Any], tmp_path: Path) -> None:
    first, last = seeded(LOWRES.but(**change), tmp_path), seeded(CASCADE.but(**change), tmp_path)
    pipeline = pipeline_of(last, tmp_path, previous_stages=(first,))
    body = image()
    expected = stock.cascade(first, last, [volumes.write(tmp_path, "case.nii.gz", body)])
    assert len(np.unique(expected.labels)) > 1
    served = arrays(ask(pipeline, body, save_probabilities=True))
    np.testing.assert_array_equal(served["labels"], expected.labels)
    np.testing.assert_array_equal(served["probabilities"], expected.probabilities)
    np.testing.assert_array_equal(arrays(ask(pipeline, body))["labels"], expected.labels)


def test_stocks_own_preprocessor_gets_the_first_stage_too(tmp_path: Path) -> None:
    first, last = seeded(LOWRES, tmp_path), seeded(CASCADE.but(masked=True), tmp_path)
    pipeline = pipeline_of(last, tmp_path, previous_stages=(first,))
    expected = stock.cascade(first, last, [volumes.write(tmp_path, "case.nii.gz", image())])
    served = arrays(ask(pipeline, image(), preprocess="stock", save_probabilities=True))
    np.testing.assert_array_equal(served["probabilities"], expected.probabilities)


def test_a_clients_own_first_stage_is_taken(tmp_path: Path) -> None:
    """Any labels on the image's grid; without a first stage in the archive they must be there."""
    last = seeded(CASCADE, tmp_path)
    with pytest.warns(ModelWarning, match="previous_stage"):
        pipeline = pipeline_of(last, tmp_path)
    body = image()
    file = volumes.write(tmp_path, "case.nii.gz", body)
    labels = np.random.default_rng(0).integers(0, 4, (20, 26, 24)).astype(np.uint8)
    predictor = stock.loaded(last)
    array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(file)])
    expected = predictor.predict_single_npy_array(array, properties, labels.astype(np.float32)[None], None, False)
    affine = nib.Nifti1Image.from_bytes(gzip.decompress(body)).affine
    sent = volumes.nifti_gz(labels.T, affine)
    np.testing.assert_array_equal(arrays(ask(pipeline, body, sent))["labels"], expected)

    missing = ask(pipeline, body)
    assert (int(missing.status), json.loads(missing.body)["code"]) == (422, "wrong_channels")
    moved = affine.copy()
    moved[0, 3] += 5
    for wrong, code in (
        (volumes.nifti_gz(labels.T[:-1], affine), "channels_disagree"),
        (volumes.nifti_gz(labels.T, moved), "channels_disagree"),
        (volumes.nifti_gz(labels.T + np.float32(0.5), affine), "wrong_range"),
        (volumes.nifti_gz(labels.T * np.uint8(3), affine), "wrong_range"),
    ):
        refused = ask(pipeline, body, wrong)
        assert (int(refused.status), json.loads(refused.body)["code"]) == (422, code), refused.body
        assert json.loads(refused.body)["detail"].startswith("previous_stage")
    unknown = ask(pipeline, body, b"DICM" * 99)
    assert json.loads(unknown.body)["code"] == "unknown_format"
    assert json.loads(unknown.body)["detail"].startswith("previous_stage: ")


def test_a_first_stage_may_come_in_another_kind_of_file_than_the_image(tmp_path: Path) -> None:
    """What says itself where it lies is believed, and what does not lies where the image lies."""
    with pytest.warns(ModelWarning, match="previous_stage"):
        pipeline = pipeline_of(seeded(CASCADE, tmp_path), tmp_path)
    voxels = np.random.default_rng(1).normal(size=(20, 26, 24)).astype(np.float32)
    labels = np.random.default_rng(0).integers(0, 4, voxels.shape).astype(np.uint8)
    image_file, label_file = (volumes.nifti_gz(each.T, np.diag([-1.3, -1.5, 1.8, 1])) for each in (voxels, labels))
    place = {"spacing": [1.3, 1.5, 1.8]}
    as_answered, plain = io.BytesIO(), io.BytesIO()
    np.savez(
        as_answered,
        labels=labels,
        probabilities=np.zeros((4, *labels.shape), np.float32),
        spacing=np.array(place["spacing"]),
        origin=np.zeros(3),
        direction=np.eye(3),
    )
    np.save(plain, labels)
    array = io.BytesIO()
    np.save(array, voxels)
    expected = arrays(ask(pipeline, image_file, label_file))["labels"]
    assert len(np.unique(expected)) > 1
    for sent in (label_file, as_answered.getvalue(), plain.getvalue()):
        np.testing.assert_array_equal(arrays(ask(pipeline, image_file, sent))["labels"], expected)
        np.testing.assert_array_equal(arrays(ask(pipeline, array.getvalue(), sent, **place))["labels"], expected)


def test_labels_with_a_gap_are_those_that_nnunet_paints(tmp_path: Path) -> None:
    """It paints the numbers of channels, whatever dataset.json says; the archive's own trial sends them too."""
    gap = CASCADE.but(labels={"background": 0, "low": 1, "high": 3})
    with pytest.warns(ModelWarning, match="previous_stage"):
        pipeline = pipeline_of(seeded(gap, tmp_path), tmp_path)
    body = image()
    affine = nib.Nifti1Image.from_bytes(gzip.decompress(body)).affine
    painted = np.random.default_rng(0).integers(0, 3, (24, 26, 20)).astype(np.uint8)
    assert ask(pipeline, body, volumes.nifti_gz(painted, affine)).status is HTTPStatus.OK


def test_a_first_stage_hands_on_exact_labels_however_the_answer_is_made(tmp_path: Path) -> None:
    first, last = seeded(LOWRES, tmp_path), seeded(CASCADE, tmp_path)
    pipeline, body = pipeline_of(last, tmp_path, previous_stages=(first,)), image()
    labels = stock.predict(first, [volumes.write(tmp_path, "case.nii.gz", body)], probabilities=False).labels
    affine = nib.Nifti1Image.from_bytes(gzip.decompress(body)).affine
    given = arrays(ask(pipeline, body, volumes.nifti_gz(labels.T, affine), export="nearest"))["labels"]
    np.testing.assert_array_equal(arrays(ask(pipeline, body, export="nearest"))["labels"], given)


def test_labels_for_a_model_that_is_no_cascade_are_refused(tmp_path: Path) -> None:
    pipeline = pipeline_of(seeded(LOWRES, tmp_path), tmp_path)
    refused = ask(pipeline, image(), image())
    assert (int(refused.status), json.loads(refused.body)["code"]) == (422, "wrong_channels")


FULLRES = OddModel()


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (FULLRES, [OddModel(2)]),
        (FULLRES, [OddModel(2), LOWRES]),
        (FULLRES.but(**REGIONS), [LOWRES.but(**REGIONS)]),
        (FULLRES, [LOWRES.but(transposed=(2, 1, 0))]),
        (OddModel(2), [LOWRES.but(spacing=7.0)]),
    ],
    ids=["two", "three", "regions", "axes in another order", "a flat and a thick one"],
)
def test_an_ensemble_is_the_mean_of_stocks_probabilities(
    first: OddModel, others: list[OddModel], tmp_path: Path
) -> None:
    folders = [seeded(model, tmp_path, seed) for seed, model in enumerate([first, *others])]
    pipeline = pipeline_of(folders[0], tmp_path, others=tuple(folders[1:]))
    body = image()
    answer = stock.ensemble(folders, [volumes.write(tmp_path, "case.nii.gz", body)])
    expected, mean = answer.labels, answer.probabilities
    assert mean is not None
    assert len(np.unique(expected)) > 1
    served = arrays(ask(pipeline, body, save_probabilities=True))
    np.testing.assert_array_equal(served["probabilities"], mean)
    np.testing.assert_array_equal(served["labels"], expected)
    np.testing.assert_array_equal(arrays(ask(pipeline, body))["labels"], expected)
    [chosen] = arrays(ask(pipeline, body, save_probabilities=True, probability_channels=[1]))["probabilities"]
    np.testing.assert_array_equal(chosen, mean[1])
    untouched = replace(pipeline, engine=cast("Engine", None))  # nobody is to ask it
    refused = ask(untouched, body, export="nearest")
    assert (int(refused.status), json.loads(refused.body)["code"]) == (400, "bad_option")


def test_a_cascade_may_be_a_member_and_so_may_its_first_stage(tmp_path: Path) -> None:
    """The first stage is in the archive once, and predicted once."""
    first, last = seeded(LOWRES, tmp_path), seeded(CASCADE, tmp_path)
    pipeline = pipeline_of(first, tmp_path, others=(last,), previous_stages=(first,))
    assert list(pipeline.bundle.members) == ["3d_lowres", "3d_cascade_fullres"]
    body = image()
    file = volumes.write(tmp_path, "case.nii.gz", body)
    one, two = stock.predict(first, [file]).probabilities, stock.cascade(first, last, [file]).probabilities
    assert one is not None
    assert two is not None
    served = arrays(ask(pipeline, body, save_probabilities=True))
    np.testing.assert_array_equal(served["probabilities"], (one + two) / 2)


OTHER_LABELS = {"background": 0, "one": 1, "two": 2, "four": 3}


@pytest.mark.parametrize("change", [{"labels": OTHER_LABELS}, {"channels": ("CT",)}])
def test_models_that_answer_other_questions_are_no_ensemble(change: dict[str, Any], tmp_path: Path) -> None:
    one, other = seeded(FULLRES, tmp_path), seeded(LOWRES.but(**change), tmp_path)
    with pytest.raises(ToolError, match="no ensemble"):
        make_archives(ArchiveRequest(one, tmp_path / "store", others=(other,)))


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (OddModel(), "configuration"),
        (LOWRES.but(folds=(0, 1)), "folds"),
        (LOWRES.but(trainer="nnUNetTrainerBN"), "trainer"),
    ],
)
def test_a_first_stage_of_another_training_is_refused(first: OddModel, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=f"no first stage of .* has the {reason}"):
        make_archives(
            ArchiveRequest(
                seeded(CASCADE, tmp_path), tmp_path / "store", previous_stages=(seeded(first, tmp_path / "first"),)
            )
        )


def test_a_recipe_has_no_archive_for_each_fold(tmp_path: Path) -> None:
    request = ArchiveRequest(
        seeded(CASCADE, tmp_path), tmp_path / "store", previous_stages=(seeded(LOWRES, tmp_path),), per_fold=True
    )
    with pytest.raises(UsageError, match="per-fold"):
        make_archives(request)


def test_postprocessing_is_stocks_and_can_be_left_out(tmp_path: Path) -> None:
    steps = [[1, 2, 3], 1, 2, 3]
    document = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * len(steps),
        "postprocessing_kwargs": [{"labels_or_regions": labels} for labels in steps],
    }
    (tmp_path / "postprocessing.json").write_text(json.dumps(document))
    pipeline = pipeline_of(seeded(FULLRES, tmp_path), tmp_path, postprocessing=tmp_path / "postprocessing.json")
    body = image()
    plain = arrays(ask(pipeline, body, postprocess=False, save_probabilities=True))
    functions = [remove_all_but_largest_component_from_segmentation] * len(steps)
    expected = apply_postprocessing(plain["labels"], functions, [{"labels_or_regions": labels} for labels in steps])
    assert np.any(expected != plain["labels"])
    response = ask(pipeline, body, save_probabilities=True)
    served = arrays(response)
    np.testing.assert_array_equal(served["labels"], expected)
    np.testing.assert_array_equal(served["probabilities"], plain["probabilities"])
    assert "postprocess;dur=" in response.headers["Server-Timing"]


def test_a_fold_that_one_member_lacks_is_named_with_it(tmp_path: Path) -> None:
    one, other = seeded(FULLRES.but(folds=(0, 1)), tmp_path), seeded(LOWRES, tmp_path)
    with pytest.warns(ModelWarning, match="different folds"):
        pipeline = pipeline_of(one, tmp_path, others=(other,))
    refused = json.loads(ask(pipeline, image(), folds=[1]).body)
    assert refused["code"] == "unknown_fold"
    assert "3d_lowres" in refused["detail"]
