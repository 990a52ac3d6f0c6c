"""What the gate lets through, and what it says of what it does not."""

from __future__ import annotations

import pytest

from nnunet_torchserve.accuracy import Reference
from nnunet_torchserve_tools.accuracy_gate import check, limits_of, unseen
from nnunet_torchserve_tools.accuracy_table import lines
from nnunet_torchserve_tools.errors import ToolError
from nnunet_torchserve_tools.validation_cases import Tolerance
from support.accuracy import report, structure, to_labels

SAME = structure(1000, 1000, 1000)


def test_the_defaults_are_stricter_against_labels() -> None:
    with_labels, without = limits_of(None, has_labels=True), limits_of(None, has_labels=False)
    assert (with_labels.against, with_labels.mean, with_labels.structure) == (Reference.LABELS, 0.001, 0.005)
    assert (without.against, without.mean, without.structure) == (Reference.EAGER, 0.005, 0.01)
    asked = limits_of(Tolerance(0.1, 0.2), has_labels=False)
    assert (asked.against, asked.mean, asked.structure) == (Reference.EAGER, 0.1, 0.2)


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
    worse = {"a": structure(100, 100, 100, to_labels(80, 79))}
    with pytest.raises(ToolError, match=r"a of case case_0 loses 0\.01 Dice to the labels \(eager 0\.8000, .* 0\.7900"):
        check(report(worse, against=Reference.LABELS, mean=0.001, most=0.005))


def test_images_without_any_structure_prove_nothing() -> None:
    empty = {"a": structure(0, 0, 0)}
    with pytest.raises(ToolError, match="nothing was measured"):
        check(report(empty))
    some = report({"a": SAME, "b": structure(0, 0, 0)})
    check(some)
    assert unseen(some) == ["b"]


def test_labels_that_have_nothing_to_do_with_the_images_prove_nothing() -> None:
    """Both answers are as bad then, and nothing seems to be lost."""
    strange = report({"a": structure(100, 100, 50, to_labels(0, 0))}, against=Reference.LABELS)
    assert strange.mean_loss() == 0
    with pytest.raises(ToolError, match="nothing in common with the labels"):
        check(strange)


def test_many_reasons_are_told_by_the_worst_of_them() -> None:
    cases = [{"a": structure(1000, 1000, 900 - number)} for number in range(8)]
    with pytest.raises(ToolError, match=r"loses too much: a of case case_7 .* a of case case_3 .*; and 4 more\."):
        check(report(*cases))


def test_the_table_has_a_line_for_each_case_and_structure_and_what_was_worst() -> None:
    told = list(lines(report({"gm": SAME, "csf": structure(1000, 1000, 991)}, {"gm": SAME, "csf": structure(0, 0, 0)})))
    assert told[1].split() == ["case", "structure", "voxels", "different", "Dice", "95%", "mm"]
    assert told[3].split() == ["case_0", "csf", "1000", "18", "0.9910", "1.5"]
    assert told[5].split() == ["case_1", "csf", "0", "0", "-", "-"]
    assert "2 cases: 18 of 20000 voxels different, mean Dice 0.9955" in told
    assert "worst Dice of a structure in a case: csf, 0.9910" in told
