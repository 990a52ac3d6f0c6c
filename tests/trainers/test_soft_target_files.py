"""A folder of soft targets holds one teacher's, and knows whose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_torchserve_trainers.soft_target_files import Channel, SoftTargetError, SoftTargets, Teacher

CHANNELS = (Channel("background", (0,)), Channel("one", (1,)))
TEACHER = Teacher("a teacher", f"sha256:{64 * '0'}", (0, 1), True, False, CHANNELS, "SimpleITKIO")
ANOTHER = replace(TEACHER, digest=f"sha256:{64 * '1'}")
HALVES = np.full((2, 4, 8, 8), 0.5, np.float16)


def test_a_teacher_of_whom_nothing_is_there_can_be_replaced(tmp_path: Path) -> None:
    """His first case failed; what was not written to its end is nobody's."""
    targets = SoftTargets(tmp_path / "soft_targets")
    targets.begin(TEACHER)
    (targets.folder / ".case_0.b2nd").write_bytes(b"half of an array")
    targets.begin(ANOTHER)
    assert targets.teacher() == ANOTHER
    targets.save("case_0", HALVES, (4, 8, 8))
    with pytest.raises(SoftTargetError, match="remove it to change the teacher"):
        targets.begin(TEACHER)
    assert targets.teacher() == ANOTHER
    np.testing.assert_array_equal(targets.load("case_0")[:], HALVES)


def test_a_teacher_that_was_renamed_goes_on(tmp_path: Path) -> None:
    targets = SoftTargets(tmp_path / "soft_targets")
    targets.begin(TEACHER)
    targets.save("case_0", HALVES, (4, 8, 8))
    targets.begin(replace(TEACHER, name="by another name"))
    assert targets.has("case_0", HALVES.shape)


def test_soft_targets_of_nobody_are_refused(tmp_path: Path) -> None:
    targets = SoftTargets(tmp_path / "soft_targets")
    targets.begin(TEACHER)
    targets.save("case_0", HALVES, (4, 8, 8))
    (targets.folder / "teacher.json").unlink()
    with pytest.raises(SoftTargetError, match="nobody knows whose"):
        targets.begin(TEACHER)
