"""What the gate lets through, and what it says of what it does not."""

from __future__ import annotations

import pytest

from nnunet_torchserve.accuracy import AccuracyReport
from nnunet_torchserve.structure_accuracy import Reference, StructureAccuracy
from nnunet_torchserve_tools.accuracy_gate import DEFAULTS, FEW_VOXELS, check, limits_of, unseen
from nnunet_torchserve_tools.accuracy_table import held, in_short, lines
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.validation_cases import Tolerance
from support.accuracy import not_in_labels, report, structure, to_labels

SAME = structure(1000, 1000, 1000)
RIGHT = structure(100, 100, 100, to_labels(80, 80))
"""As eager has it, to labels."""


def to_the_labels(*cases: dict[str, StructureAccuracy]) -> AccuracyReport:
    """A report that is held by the defaults."""
    limits = DEFAULTS[Reference.LABELS]
    return report(*cases, against=limits.against, mean=limits.mean, most=limits.structure, unlabelled=limits.unlabelled)


def test_the_defaults_are_stricter_against_labels() -> None:
    with_labels, without = limits_of(None, has_labels=True), limits_of(None, has_labels=False)
    assert (with_labels.against, with_labels.mean, with_labels.structure) == (Reference.LABELS, 0.001, 0.005)
    assert (without.against, without.mean, without.structure) == (Reference.EAGER, 0.005, 0.01)
    assert with_labels.unlabelled == without.unlabelled == without.structure
    for has_labels, against in ((False, Reference.EAGER), (True, Reference.LABELS)):
        asked = limits_of(Tolerance(0.1, 0.2), has_labels=has_labels)
        assert (asked.against, asked.mean, asked.structure, asked.unlabelled) == (against, 0.1, 0.2, 0.2)


def test_what_loses_no_more_than_allowed_passes() -> None:
    check(report({"a": structure(1000, 1000, 990), "b": SAME}))


def test_one_structure_in_one_case_is_enough_to_be_refused_by_name() -> None:
    cases = [{"gm": SAME, "wm": SAME}] * 9 + [{"gm": SAME, "wm": structure(1000, 1000, 985)}]
    with pytest.raises(ToolError) as refused:
        check(report(*cases))
    told = str(refused.value)
    assert "wm of case case_9 loses 0.015 Dice to eager's answer, more than 0.01" in told
    assert "gm" not in told
    assert "with labels (--labels) it is asked whether it is worse" in told


def test_the_mean_is_held_where_no_structure_alone_loses_much() -> None:
    with pytest.raises(ToolError, match=r"the mean over structures and cases is a loss of 0\.008, more than 0\.005"):
        check(report({"a": structure(1000, 1000, 992)}))


def test_with_labels_it_may_be_different_and_not_worse() -> None:
    other = {"a": structure(100, 100, 70, to_labels(80, 80))}
    check(report(other, against=Reference.LABELS, mean=0.001, most=0.005))
    worse = {"a": structure(100, 100, 90, to_labels(80, 79))}
    with pytest.raises(ToolError, match=r"a of case case_0 loses 0\.01 Dice to the labels \(eager 0\.8000, .* 0\.7900"):
        check(report(worse, against=Reference.LABELS, mean=0.001, most=0.005))


def test_images_without_any_structure_prove_nothing() -> None:
    empty = {"a": structure(0, 0, 0)}
    with pytest.raises(ToolError, match="nothing was measured"):
        check(report(empty))
    some = report({"a": SAME, "b": structure(0, 0, 0)})
    check(some)
    assert unseen(some) == ["b"]


@pytest.mark.parametrize("right", [0, 9])
def test_labels_that_have_nothing_to_do_with_an_image_prove_nothing(right: int) -> None:
    """Both answers are as bad then, and nothing seems to be lost; some voxels fit by chance."""
    strange = {"a": structure(100, 100, 50, to_labels(right, right)), "b": structure(0, 0, 0, not_in_labels(0, 0))}
    sound = {"a": RIGHT, "b": RIGHT}
    found = to_the_labels(sound, strange, sound)
    assert found.mean_loss() == 0
    with pytest.raises(ToolError, match=f"case case_1 proves nothing: eager's Dice to its labels is 0.0{right}00 for"):
        check(found)


def test_a_case_of_which_eager_finds_one_structure_is_no_other_image() -> None:
    check(to_the_labels({"a": structure(100, 100, 100, to_labels(0, 0)), "b": RIGHT}))


def test_labels_of_healthy_cases_are_no_other_images_but_all_of_them_prove_nothing() -> None:
    healthy = {"a": structure(0, 0, 0, not_in_labels(0, 0)), "b": structure(50, 50, 50, not_in_labels(50, 50))}
    check(to_the_labels({"a": RIGHT, "b": RIGHT}, healthy))
    with pytest.raises(ToolError, match="the labels have no structure in any case"):
        check(to_the_labels(healthy, healthy))


@pytest.mark.parametrize(("eager", "backend"), [(0, 400), (400, 0), (400, 380)])
def test_what_the_labels_lack_is_compared_with_eagers_answer(eager: int, backend: int) -> None:
    """Whatever is painted there has a Dice of 0 to the labels: nothing would be lost by any answer."""
    common = min(eager, backend)
    invented = structure(eager, backend, common, not_in_labels(eager, backend))
    cases = [{"a": RIGHT, "b": RIGHT}] * 20 + [{"a": RIGHT, "b": invented}]
    with pytest.raises(ToolError) as refused:
        check(to_the_labels(*cases))
    assert f"b of case case_20 is not in the labels and loses {invented.loss(Reference.EAGER):.4g} Dice to eager's" in (
        str(refused.value)
    )
    assert str(refused.value).endswith("more than 0.01. --max-dice-loss allows more")
    check(to_the_labels({"a": RIGHT, "b": RIGHT}, {"a": RIGHT, "b": structure(9, 9, 9, not_in_labels(9, 9))}))


def test_a_voxel_that_is_not_there_hides_no_loss() -> None:
    """Eager paints it and the backend does not: a gain of 1 in the mean, if it counted."""
    worse = {"a": structure(1000, 1000, 996, to_labels(800, 796, voxels=1000, of_each=1000)), "b": RIGHT}
    spurious = {"a": structure(1, 0, 0, not_in_labels(1, 0)), "b": RIGHT}
    with pytest.raises(ToolError, match=r"mean over structures and cases is a loss of 0\.002, more than 0\.001"):
        check(to_the_labels(worse, spurious))


def test_a_few_voxels_of_a_small_structure_refuse_nobody_but_count_in_the_mean() -> None:
    small = structure(20, 20 + FEW_VOXELS, 20)
    cases = [{"a": SAME, "small": SAME}] * 19
    check(report(*cases, {"a": SAME, "small": small}))
    with pytest.raises(ToolError, match="small of case case_19 loses"):
        check(report(*cases, {"a": SAME, "small": structure(20, 20 + FEW_VOXELS + 1, 20)}))
    with pytest.raises(ToolError, match=r"loses too much: the mean over structures and cases is a loss of 0\.1,"):
        check(report({"a": SAME, "small": small}))
    with pytest.raises(ToolError, match=r"too much: the mean over structures and cases is a loss of 0\.025,"):
        check(report(*cases, {"a": SAME, "small": structure(FEW_VOXELS, 0, 0)}))


def test_many_reasons_are_told_by_the_worst_of_them() -> None:
    cases = [{"a": structure(1000, 1000, 900 - number)} for number in range(8)]
    with pytest.raises(ToolError, match=r"loses too much: a of case case_7 .* a of case case_3 .*; and 4 more\."):
        check(report(*cases))


def test_the_table_has_no_dice_to_labels_that_lack_the_structure() -> None:
    told = list(lines(to_the_labels({"gm": RIGHT, "csf": structure(90, 90, 90, not_in_labels(90, 90))})))
    assert told[2].split() == ["case_0", "gm", "100", "0", "1.0000", "0", "0.8000", "0.8000"]
    assert told[3].split() == ["case_0", "csf", "90", "0", "1.0000", "0", "-", "-"]
    assert told[-1].endswith("0.005 of a structure in a case; where a case's labels lack it, 0.01 to eager's answer")


def test_the_table_has_a_line_for_each_case_and_structure_and_what_was_worst() -> None:
    told = list(lines(report({"gm": SAME, "csf": structure(1000, 1000, 991)}, {"gm": SAME, "csf": structure(0, 0, 0)})))
    assert told[1].split() == ["case", "structure", "voxels", "different", "Dice", "95%", "mm"]
    assert told[3].split() == ["case_0", "csf", "1000", "18", "0.9910", "1.5"]
    assert told[5].split() == ["case_1", "csf", "0", "0", "-", "-"]
    assert "2 cases: 18 of 20000 voxels different, mean Dice 0.9955" in told
    assert "worst Dice of a structure in a case: csf, 0.9910" in told


def test_a_card_says_what_was_allowed_and_of_what_nothing_is_known() -> None:
    nothing = structure(0, 0, 0, not_in_labels(0, 0))
    allowed, unknown, to_labels_ = held(to_the_labels({"gm": RIGHT, "csf": nothing}).summary())
    assert allowed == (
        "allowed was a loss of Dice to the labels of 0.001 in the mean, and 0.005 of a structure in a case; where a "
        "case's labels lack it, 0.01 to eager's answer"
    )
    assert unknown == "in no answer, so nothing is known of it: csf"
    assert to_labels_ == "mean Dice to labels, of eager and of openvino:float32: gm 0.8000 and 0.8000"
    [allowed] = held(report({"gm": SAME}).summary())
    assert (
        allowed
        == "allowed was a loss of Dice to eager's answers of 0.005 in the mean, and 0.01 of a structure in a case"
    )


def test_a_mean_is_no_1_where_a_voxel_is_different() -> None:
    summary = report({"gm": SAME}).summary()
    assert in_short(summary).endswith("mean Dice 1.0000")
    assert in_short(summary | {"different_voxels": 1}).endswith("mean Dice 0.9999")
