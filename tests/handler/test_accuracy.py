"""What an archive says of a backend's accuracy: worked out of counts, and refused where they contradict each other."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from nnunet_torchserve.accuracy import REPORT_VERSION, AccuracyReport, deciding_files, read_accuracy
from nnunet_torchserve.backend import Backend, StoredBackend, usable_backend
from nnunet_torchserve.errors import BundleError
from nnunet_torchserve.machine import processor_name
from nnunet_torchserve.measured_here import backend_here, report_in_force
from nnunet_torchserve.stated_accuracy import said_of
from nnunet_torchserve.structure_accuracy import Reference
from support.accuracy import FILES, OPENVINO, not_in_labels, report, structure, to_labels

BF16 = Backend.OPENVINO_BFLOAT16
STORED = StoredBackend(backend=OPENVINO, requires={}, made_with={})
SAME, NEAR = structure(100, 100, 100), structure(100, 100, 90)
ABSENT, INVENTED = structure(0, 0, 0), structure(0, 1, 0)


def test_dice_is_the_mean_over_structures_of_the_cases_that_have_one() -> None:
    """As nnU-Net's ``foreground_mean``: a structure that is in few cases counts as much as one that is in all."""
    found = report({"a": SAME, "b": ABSENT}, {"a": SAME, "b": NEAR}, {"a": NEAR, "b": ABSENT})
    assert found.dice == pytest.approx(((1 + 1 + 0.9) / 3 + 0.9) / 2)
    assert found.summary()["structures"]["b"] == {
        "dice": 0.9,
        "worst_dice": 0.9,
        "worst_surface_distance_95_mm": 1.5,
        "dice_to_labels": None,
    }
    assert (found.summary()["different_voxels"], found.summary()["voxels"]) == (40, 30_000)


def test_what_is_lost_is_lost_against_labels_or_against_eager() -> None:
    worse = structure(100, 100, 90, to_labels(85, 80))
    found = report({"a": worse}, against=Reference.LABELS)
    assert found.mean_loss() == pytest.approx(0.05)
    assert worse.loss(Reference.EAGER) == pytest.approx(0.1)
    assert found.summary()["structures"]["a"]["dice_to_labels"] == {"eager": 0.85, "backend": 0.8}


def test_what_one_structure_gains_hides_no_other_ones_loss() -> None:
    better, worse = structure(100, 100, 90, to_labels(60, 85)), structure(100, 100, 90, to_labels(85, 80))
    assert better.loss(Reference.LABELS) == pytest.approx(-0.25)
    assert report({"a": better, "b": worse}, against=Reference.LABELS).mean_loss() == pytest.approx(0.025)
    assert report({"a": better}, {"a": worse}, against=Reference.LABELS).mean_loss() == 0  # it is better in the mean


def test_labels_without_a_structure_tell_nothing_of_its_loss() -> None:
    """Eager paints a voxel that is not there, the backend does not: that is no Dice of 1 that others could use up."""
    lost = structure(100, 100, 90, to_labels(85, 80))
    for eager, backend in ((1, 0), (0, 1), (50, 60)):
        nowhere = structure(eager, backend, 0, not_in_labels(eager, backend))
        assert nowhere.loss(Reference.LABELS) == nowhere.loss(Reference.EAGER) == 1
        found = report({"a": lost}, {"a": nowhere}, against=Reference.LABELS)
        assert found.mean_loss() == pytest.approx(0.05)
        both = found.summary()["structures"]["a"]["dice_to_labels"]
        assert both["eager"] - both["backend"] == pytest.approx(found.mean_loss())
    assert report({"a": nowhere}, against=Reference.LABELS).summary()["structures"]["a"]["dice_to_labels"] is None


def test_labels_that_are_ignored_are_none() -> None:
    """All of the structure lies where the labels say ``ignore``: an answer there is compared with eager's."""
    ignored = structure(100, 100, 40, not_in_labels(0, 0))
    assert ignored.loss(Reference.LABELS) == pytest.approx(0.6)
    assert structure(0, 0, 0, not_in_labels(0, 0)).loss(Reference.LABELS) == 0


def test_a_structure_that_only_the_backend_sees_is_lost_whole() -> None:
    assert INVENTED.dice == 0
    assert INVENTED.loss(Reference.EAGER) == 1
    assert ABSENT.dice is None
    assert ABSENT.loss(Reference.EAGER) == 0


@pytest.mark.parametrize(
    ("backends", "expected"),
    [
        ({Backend.EAGER}, "eager"),
        ({OPENVINO}, "openvino:float32; dice=0.9999"),
        ({BF16}, "openvino:bf16"),
        ({Backend.EAGER, OPENVINO}, "eager, openvino:float32"),
    ],
    ids=["eager", "measured", "another", "both"],
)
def test_a_header_has_a_number_of_the_backend_that_ran_and_of_no_other(backends: set[Backend], expected: str) -> None:
    """And it is not rounded up: 1.0000 would say that no voxel was different."""
    measured = report({"a": structure(4_000, 4_000, 4_000), "b": structure(9_000, 9_001, 9_000)})
    assert measured.dice is not None
    assert 0.99995 < measured.dice < 1
    assert said_of(backends, measured) == expected
    assert said_of(backends, None) == expected.partition(";")[0]


@pytest.mark.parametrize(
    ("calibrated_on", "cases", "said"),
    [
        (None, None, ""),
        ((), 0, ""),
        ((f"{9:064}",), 0, ""),
        ((f"{9:064}", f"{1:064}"), 1, "; images=partly-calibration"),
        ((f"{1:064}", f"{0:064}"), 2, "; images=calibration"),
    ],
    ids=["not calibrated", "on nothing", "on others", "on one of them", "on these"],
)
def test_what_was_measured_on_images_of_the_calibration_is_marked(
    calibrated_on: tuple[str, ...] | None, cases: int | None, said: str
) -> None:
    measured = report({"a": SAME}, {"a": SAME}, calibrated_on=calibrated_on)
    assert measured.summary()["calibrated_cases"] == cases
    assert said_of({OPENVINO}, measured) == f"openvino:float32; dice=1.0000{said}"


def test_a_header_has_no_number_where_nothing_was_seen() -> None:
    assert said_of({OPENVINO}, report({"a": ABSENT})) == "openvino:float32"
    assert said_of({OPENVINO}, report({"a": SAME})) == "openvino:float32; dice=1.0000"


def test_a_header_has_no_1_where_a_single_voxel_differs_in_many_cases() -> None:
    """A mean of so many that four digits and float64 do not tell it from 1."""
    near = report({"a": structure(5_000, 5_001, 5_000)})
    case = near.cases[0].model_copy(
        update={"voxels": 10**15, "different": 1, "structures": {"a": structure(10**14, 10**14 + 1, 10**14)}}
    )
    assert said_of({OPENVINO}, near.model_copy(update={"cases": (case,)})) == "openvino:float32; dice=0.9999"


def test_an_archive_keeps_all_but_the_names() -> None:
    """Names of cases may be those of patients, and a client may ask for the description."""
    kept = report({"a": NEAR}).without_names()
    assert "case_0" not in kept.model_dump_json()
    assert read_accuracy(kept.model_dump_json().encode(), STORED, FILES | {"nnunet_handler.py": "2" * 64}) == kept
    assert kept.summary() == report({"a": NEAR}).summary()


def more_in_common(document: Any) -> None:
    document["cases"][0]["structures"]["a"]["common"] = 101


def a_better_answer(document: Any) -> None:
    document["cases"][0]["structures"]["a"] |= {"common": 100, "surface_distance_95_mm": 0.0, "backend": 0}


def fewer_different(document: Any) -> None:
    document["cases"][0]["different"] = 0


def more_than_the_image(document: Any) -> None:
    document["cases"][0]["voxels"] = 99


def no_cases(document: Any) -> None:
    document["cases"] = []


def a_number_of_its_own(document: Any) -> None:
    document["dice"] = 1.0


def another_version(document: Any) -> None:
    document["report_version"] = REPORT_VERSION + 1


def of_eager(document: Any) -> None:
    document["backend"] = "eager"


def labels_that_are_not_there(document: Any) -> None:
    document["limits"]["against"] = "labels"


def not_a_number(document: Any) -> None:
    document["cases"][0]["structures"]["a"]["surface_distance_95_mm"] = "NaN"


@pytest.mark.parametrize(
    "change",
    [
        more_in_common, a_better_answer, fewer_different, more_than_the_image, no_cases, a_number_of_its_own,
        another_version, of_eager, labels_that_are_not_there, not_a_number,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_report_that_contradicts_itself_is_refused(change: Callable[[Any], None]) -> None:
    document = json.loads(report({"a": NEAR}).model_dump_json())
    assert read_accuracy(json.dumps(document).encode(), STORED, FILES)
    change(document)
    with pytest.raises(BundleError, match=r"accuracy\.json is not valid: "):
        read_accuracy(json.dumps(document).encode(), STORED, FILES)


def test_a_report_of_other_weights_or_another_backend_is_refused() -> None:
    text = report({"a": NEAR}).model_dump_json().encode()
    others = {"members/m/fold_0.safetensors": "3" * 64}
    for files in (others, {}, FILES | {"members/m/fold_0.openvino.bin": "3" * 64}, FILES | {"code/mine.py": "3" * 64}):
        with pytest.raises(BundleError, match="other weights or graphs"):
            read_accuracy(text, STORED, files)
    with pytest.raises(BundleError, match="measured with openvino:float32, the archive is made for openvino:bf16"):
        read_accuracy(text, STORED.model_copy(update={"backend": BF16}), FILES)
    with pytest.raises(BundleError, match="made for eager"):
        read_accuracy(text, None, FILES)
    assert deciding_files({"model-config.yaml": "4" * 64} | FILES) == FILES


def test_some_cases_cannot_have_labels_and_others_none() -> None:
    with_labels = structure(100, 100, 90, to_labels(80, 85))
    with pytest.raises(ValidationError, match="some has none"):
        report({"a": with_labels}, {"a": NEAR})
    with pytest.raises(ValidationError, match="other structures"):
        report({"a": SAME}, {"b": SAME})
    assert isinstance(report({"a": with_labels}, {"a": with_labels}), AccuracyReport)


def test_what_must_be_measured_serves_only_where_it_was(caplog: pytest.LogCaptureFixture) -> None:
    stored = STORED.model_copy(update={"backend": BF16})
    assert usable_backend(BF16, stored, "cpu", measured=True) is BF16
    assert not caplog.records
    assert usable_backend(BF16, stored, "cpu") is Backend.EAGER
    assert "has no report of its accuracy" in caplog.text
    assert usable_backend(OPENVINO, STORED, "cpu") is OPENVINO


NUMPY = importlib.metadata.version("numpy")
NEEDS_NUMPY = STORED.model_copy(update={"requires": {"numpy": ">=1"}})
"""As if numpy ran the networks."""


def made_here(**changes: Any) -> AccuracyReport:
    """A report of this machine."""
    here = {"processor": processor_name(), "software": {"numpy": NUMPY, "torch": "1"}, "max_patch_batch": 2}
    return report({"a": NEAR}).model_copy(update=here | changes)


def test_a_report_holds_where_the_backend_runs_as_it_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    """Other packages may be others: they do not run the networks."""
    measured = made_here()
    assert report_in_force(measured, NEEDS_NUMPY, OPENVINO, "cpu", 2) is measured
    of_one = made_here(max_patch_batch=1)
    assert report_in_force(of_one, NEEDS_NUMPY, OPENVINO, "cpu", "auto") is of_one
    assert report_in_force(None, NEEDS_NUMPY, OPENVINO, "cpu", 2) is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "batch", "reason"),
    [
        ({"software": {"numpy": "0.1"}}, 2, f"with numpy 0.1, and {NUMPY} is installed"),
        ({"software": {}}, 2, f"with numpy no version, and {NUMPY} is installed"),
        ({}, 4, "with a max_patch_batch of 2, and it is 4"),
        ({}, "auto", "with a max_patch_batch of 2, and it is 1"),
    ],
    ids=["another version", "an unknown version", "another batch", "no batch"],
)
def test_a_number_of_other_answers_is_stated_nowhere_and_lets_nothing_serve(
    changes: Any, batch: int | Literal["auto"], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    stored = NEEDS_NUMPY.model_copy(update={"backend": BF16})
    assert backend_here(BF16, stored, made_here(backend=BF16, **changes), "cpu", batch) == (Backend.EAGER, None)
    told, used_instead = (record.getMessage() for record in caplog.records)
    assert reason in told
    assert "no report of its accuracy that holds here" in used_instead


def test_a_server_warns_of_what_was_measured_on_images_of_the_calibration(caplog: pytest.LogCaptureFixture) -> None:
    flattered = made_here(calibrated_on=("0" * 64,))
    assert report_in_force(flattered, NEEDS_NUMPY, OPENVINO, "cpu", 2) is flattered
    [warning] = caplog.records
    assert "calibrated on 1 of the 1 cases that it was measured on" in warning.getMessage()


def test_another_processor_is_a_warning_only(caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = made_here(processor="another processor")
    assert report_in_force(elsewhere, NEEDS_NUMPY, OPENVINO, "cpu", 2) is elsewhere
    [warning] = caplog.records
    assert f"measured on another processor; this is {processor_name()}, and" in warning.getMessage()


def test_of_int8_another_processor_is_not_what_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    stored = StoredBackend(backend=Backend.OPENVINO_INT8, requires={"numpy": ">=1"}, made_with={})
    here = made_here(backend=Backend.OPENVINO_INT8)
    assert report_in_force(here, stored, Backend.OPENVINO_INT8, "cpu", 2) is here
    elsewhere = made_here(backend=Backend.OPENVINO_INT8, processor="another processor")
    assert report_in_force(elsewhere, stored, Backend.OPENVINO_INT8, "cpu", 2) is None
    assert "was measured on another processor, and may answer otherwise" in caplog.text


@pytest.mark.parametrize(("wanted", "device"), [(Backend.EAGER, "cpu"), (BF16, "cpu"), (OPENVINO, "cuda")])
def test_a_server_that_runs_no_measured_backend_has_nothing_to_say_of_the_report(
    wanted: Backend, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = made_here(software={}, processor="another processor")
    assert report_in_force(other, NEEDS_NUMPY, wanted, device, 4) is other
    assert not caplog.records
