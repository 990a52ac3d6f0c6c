"""Every kind of model that nnU-Net makes: archived, served, and answered as stock answers it; or refused by name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from nnunetv2.postprocessing.remove_connected_components import (
    apply_postprocessing,
    remove_all_but_largest_component_from_segmentation,
)

from nnunet_torchserve.request import Request
from nnunet_torchserve_tools.archive import make_archives
from nnunet_torchserve_tools.archive_request import ArchiveRequest
from nnunet_torchserve_tools.errors import ToolError
from support import matrix, stock
from support.matrix import CASCADE, ENSEMBLE, Image, Made, Row
from support.odd_models import LABELS, Json, OddModel, old_format
from support.packaged import pipeline_of
from support.server import running

pytestmark = pytest.mark.filterwarnings(
    "ignore:Detected old nnU-Net plans",
    "ignore:Network class",  # of old plans, which has moved
    "ignore:The values in the label map",
    "ignore:.torch.jit:FutureWarning",  # of packages that nnU-Net's trainers import
    "ignore::nnunet_torchserve_tools.errors.ModelWarning",  # of regions, whose values say less than their names
)


def parameters() -> list[Any]:
    """Every value but Primus stands in a row that is not long."""
    return [
        pytest.param(row, marks=() if row in matrix.thin() else pytest.mark.long, id=f"{number}: {row}")
        for number, row in enumerate((*matrix.rows(), matrix.WHOLE_PRIMUS))
    ]


def archive_fields(row: Row, made: Made, folder: Path) -> dict[str, Any]:
    """How ``archive`` is told."""
    fields: dict[str, Any] = {"folds": made.folds, "checkpoint": made.checkpoint}
    if row.configuration == CASCADE:
        fields["previous_stages"] = made.folders[:1]
    if row.configuration == ENSEMBLE:
        fields["others"] = made.folders[1:]
    if steps := matrix.steps_of(row):
        document = {
            "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"] * len(steps),
            "postprocessing_kwargs": [{"labels_or_regions": labels} for labels in steps],
        }
        (folder / "postprocessing.json").write_text(json.dumps(document))
        fields["postprocessing"] = folder / "postprocessing.json"
    return fields


def by_stock(row: Row, made: Made, image: Image) -> stock.StockAnswer:
    """nnU-Net's commands, one after another."""
    how = matrix.options_of(row) | {"folds": made.folds, "checkpoint": made.checkpoint}
    wanted = row.answer == "probabilities"
    match row.configuration:
        case matrix.CASCADE:
            first, last = made.folders
            answer = stock.cascade(first, last, image.files, probabilities=wanted, **how)
        case matrix.ENSEMBLE:
            answer = stock.ensemble(made.folders, image.files, **how)
        case _:
            answer = stock.predict(made.folders[0], image.files, probabilities=wanted, **how)
    steps = matrix.steps_of(row)
    functions = [remove_all_but_largest_component_from_segmentation] * len(steps)
    labels = apply_postprocessing(answer.labels, functions, [{"labels_or_regions": step} for step in steps])
    return stock.StockAnswer(labels, answer.probabilities)


def request_of(row: Row, image: Image) -> dict[str, bytes]:
    """The fields of a multipart request."""
    parts = {
        f"image_{k:04d}" if len(image.files) > 1 else "image": file.read_bytes() for k, file in enumerate(image.files)
    }
    options = matrix.options_of(row) | image.options | {"output_format": "npz"}
    options |= {"save_probabilities": row.answer == "probabilities"}
    return parts | {"options": json.dumps(options).encode()}


def assert_same(row: Row, image: Image, body: bytes, expected: stock.StockAnswer) -> None:
    """Labels voxel for voxel, and probabilities bit for bit."""
    with np.load(io.BytesIO(body)) as answer:
        served: dict[str, npt.NDArray[Any]] = dict(answer)
    labels = image.stored(expected.labels)
    assert len(np.unique(labels)) > 1, "a constant answer would prove nothing"
    assert row.labels != "more than 255" or labels.max() > 255
    np.testing.assert_array_equal(served["labels"].reshape(labels.shape), labels)
    if row.answer == "probabilities":
        assert expected.probabilities is not None
        probabilities = np.stack([image.stored(channel) for channel in expected.probabilities])
        np.testing.assert_array_equal(served["probabilities"].reshape(probabilities.shape), probabilities)


@pytest.mark.parametrize("row", parameters())
def test_each_kind_of_model_answers_as_stock_does(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.network == "Primus":
        matrix.shrink_primus(monkeypatch)
    made, image = matrix.made(row, tmp_path), matrix.image_of(row, tmp_path)
    first = made.folders[-1 if row.configuration == CASCADE else 0]
    pipeline = pipeline_of(first, tmp_path, **archive_fields(row, made, tmp_path))
    response = pipeline.answer(Request(dict(request_of(row, image)), {}))
    assert response.status is HTTPStatus.OK, response.body
    assert_same(row, image, response.body, by_stock(row, made, image))


@pytest.mark.long  # in this process: above; a live server: tests/serve/
@pytest.mark.serve
def test_a_live_server_answers_as_stock_does(tmp_path: Path) -> None:
    """A row for each reader and each configuration, all on one server."""
    store = tmp_path / "store"
    asked = {}
    for number, row in enumerate(matrix.covering("reader", "configuration")):
        folder = tmp_path / f"row_{number}"
        folder.mkdir()
        made, image = matrix.made(row, folder), matrix.image_of(row, folder)
        first = made.folders[-1 if row.configuration == CASCADE else 0]
        make_archives(ArchiveRequest(first, store, name=folder.name, **archive_fields(row, made, folder)))
        asked[folder.name] = row, made, image
    with running(store, tmp_path / "state") as live:
        for name, (row, made, image) in asked.items():
            response = live.predict(name, files=request_of(row, image))
            assert response.status_code == HTTPStatus.OK, f"{row}: {response.text}"
            assert_same(row, image, response.content, by_stock(row, made, image))


def test_what_stands_in_no_row_is_forbidden_by_a_rule() -> None:
    """AllPairs by itself leaves out pairs without a word where some are forbidden."""
    assert frozenset().union(*map(matrix.pairs_of, matrix.rows())) == matrix.pairs()
    assert not any(matrix.forbidden(row._asdict()) for row in matrix.rows())


@pytest.mark.parametrize("rule", matrix.RULES, ids=lambda rule: rule.reason)
def test_each_rule_forbids_what_would_else_be_in_the_matrix(rule: matrix.Rule) -> None:
    """Two columns that exist, values that they have; and no other rule says the same."""
    others = [other for other in matrix.RULES if other is not rule]
    (one, values), (other, more) = rule.one, rule.other
    assert values <= set(matrix.COLUMNS[one])
    assert more <= set(matrix.COLUMNS[other])
    assert any(
        not any(each.forbids({one: value, other: another}) for each in others) for value in values for another in more
    )


def plans_say(**values: object) -> Callable[[Json], None]:
    """Other values in plans.json, of the configuration or of the plans."""

    def change(plans: Json) -> None:
        [configuration] = plans["configurations"].values()
        for name, value in values.items():
            (configuration if name in configuration else plans)[name] = value

    return change


def unknown_unet(plans: Json) -> None:
    old_format(plans)
    plans_say(UNet_class_name="GenericUNet")(plans)


REFUSED: dict[str, tuple[OddModel, str]] = {
    "a reader of one's own": (
        OddModel(2, change_plans=plans_say(image_reader_writer="MyReader")),
        "MyReader|image_reader_writer",
    ),
    "a preprocessor of one's own": (OddModel(2, change_plans=plans_say(preprocessor_name="MyPreprocessor")), "reproc"),
    "a normalisation of one's own": (OddModel(2, change_plans=plans_say(normalization_schemes=["Mine"])), "Mine"),
    "a label manager of one's own": (OddModel(2, change_plans=plans_say(label_manager="Mine")), "label.manager"),
    "a network of nnU-Net 1": (OddModel(2, change_plans=unknown_unet), "Unknown architecture GenericUNet"),
    "a label beyond ignore": (
        OddModel(2, labels={"background": 0, "low": 1, "ignore": 2, "high": 3, "middle": 4}),
        "ignore label",
    ),
    "regions in no order": (OddModel(2, labels={"background": 0, "whole": [1, 2], "core": 2}), "regions_class_order"),
}


@pytest.mark.parametrize(("odd", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_when_it_is_archived_and_stock_has_no_answer_either(
    odd: OddModel, said: str, tmp_path: Path
) -> None:
    model = odd.but(labels=LABELS, more_dataset={}).write(tmp_path)  # a network of any labels
    (model / "dataset.json").write_text(json.dumps(odd.dataset()))
    image = matrix.image_of(matrix.USUAL, tmp_path)
    with pytest.raises(Exception):  # noqa: B017, PT011 (of any kind)
        stock.predict(model, image.files)
    with pytest.raises(ToolError, match=said):
        pipeline_of(model, tmp_path)
