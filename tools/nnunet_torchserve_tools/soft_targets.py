"""``nnunet-torchserve soft-targets``: a teacher's probabilities for all cases that a student may be trained on.

Cases that are there already are left alone, so a command that was ended goes on where it was. The files are those of
:mod:`nnunet_torchserve_trainers.soft_target_files`, which the student's trainer reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnunet_torchserve_trainers.soft_target_files import Channel, SoftTargetError, SoftTargets, Teacher, channels_of

from .errors import ToolError
from .student import Student
from .teachers import Probabilities, Source

_SUM_TOLERANCE = 0.02
"""float16 has three digits; a voxel's probabilities add up to 1 but for as many roundings as there are classes."""

_AS_STORED = frozenset({"SimpleITKIO", "NibabelIO"})
"""nnU-Net's readers of volumes that give voxels in the order in which the file has them, so one reads what the other
does. Those that are called ``…WithReorient`` turn them, and nobody knows what somebody's own reader does."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a call did.

    Attributes:
        made: cases whose soft targets it wrote.
        there: cases that had them.
    """

    made: int
    there: int


def make_soft_targets(student: Student, source: Source, tell: Callable[[str], None]) -> Made:
    """Write what is missing.

    Args:
        student: whose preprocessed cases they are for.
        source: of the probabilities.
        tell: is told of each case.

    Raises:
        ToolError: the teacher has other labels or images, or reads them in another way; another teacher's are there;
            images are missing; or a case failed: those before it are there then.
    """
    teacher, wanted = source.teacher, channels_of(student.label_manager)
    if (teacher.channels, teacher.has_regions) != (wanted, student.label_manager.has_regions):
        msg = f"{teacher} predicts {_spoken(teacher.channels)}, the student shall learn {_spoken(wanted)}"
        raise ToolError(msg)
    if source.image_channels != student.image_channels:
        taken, given = (", ".join(each.image_channels) for each in (source, student))
        msg = f"{teacher} takes images of {taken}; a case has {given}"
        raise ToolError(msg)
    _check_reader(student, teacher)
    targets = SoftTargets.beside(student.folder)
    try:
        grids = {case: student.grid(case) for case in student.cases}
        missing = [case for case in grids if not targets.has(case, (len(wanted), *grids[case].shape))]
        images = {case: student.images(case) for case in missing}  # of all, before hours go into the first
        targets.begin(teacher)
        for number, case in enumerate(student.cases, start=1):
            if case not in images:
                continue
            grid = grids[case]
            probabilities = source.probabilities(images[case], grid)
            _check(case, probabilities, (len(wanted), *grid.shape), has_regions=teacher.has_regions)
            targets.begin(teacher)  # another command may have begun meanwhile
            targets.save(case, probabilities, student.settings.patch_size)
            tell(f"{case} ({number} of {len(student.cases)})")
    except SoftTargetError as error:
        raise ToolError(str(error)) from error
    return Made(len(missing), len(student.cases) - len(missing))


def _check_reader(student: Student, teacher: Teacher) -> None:
    """Raise unless both read the same array from a file.

    Shape and crop do not tell: where an image is stored mirrored, one reader turns it and another does not, and the
    probabilities would be those of the mirrored body.
    """
    if teacher.reader != student.reader and not {teacher.reader, student.reader} <= _AS_STORED:
        msg = (
            f"{teacher} reads images by {teacher.reader or 'a reader that it does not name'}, the cases were "
            f"read by {student.reader}: the probabilities might be mirrored. Take a teacher whose plans name "
            f"{student.reader}, or plan and preprocess the student with the teacher's reader"
        )
        raise ToolError(msg)


def _check(case: str, probabilities: Probabilities, shape: tuple[int, ...], *, has_regions: bool) -> None:
    """Raise unless these are probabilities on the grid."""
    if probabilities.shape != shape:
        msg = f"{case}: the teacher gave probabilities of shape {probabilities.shape}, the case needs {shape}"
        raise ToolError(msg)
    between = bool(((probabilities >= 0) & (probabilities <= 1)).all())
    sums = probabilities.astype(np.float32).sum(0)
    if not between or not (has_regions or np.abs(sums - 1).max() < _SUM_TOLERANCE):
        msg = f"{case}: what the teacher gave are no probabilities"
        raise ToolError(msg)


def _spoken(channels: tuple[Channel, ...]) -> str:
    return ", ".join(f"{each.name} {'+'.join(map(str, each.labels))}" for each in channels)
