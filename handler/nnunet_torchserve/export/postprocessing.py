"""Components that a model's postprocessing removes from a label map, as ``nnUNetv2_apply_postprocessing`` does.

nnU-Net goes through the whole volume several times for every label: a mask, its components, their sizes as 64-bit
numbers, a copy of the labels. Steps whose labels have nothing in common do not disturb each other; so they are one step
here: cc3d finds the components of all their labels in one pass. A model of 40 labels has one such pass for all
foreground and one for its labels.

It runs in the calling thread, which keeps Python's lock while cc3d works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cc3d
import numpy as np
import numpy.typing as npt

from ..postprocessing import LARGEST_LABEL, KeepLargest, Postprocessing
from ..volume import LabelArray
from .canvas import written
from .threads import check

_CONNECTIVITY: dict[int, Literal[8, 26]] = {2: 8, 3: 26}
"""cc3d's full connectivity by dimension. nnU-Net calls ``acvl_utils``' ``remove_all_but_largest_component`` without a
connectivity, which means skimage's fullest: what touches by a corner only is connected."""

_BLOCK_VOXELS = 2**21
"""NumPy looks labels and components up as 64-bit numbers: in blocks of planes of about so many voxels."""

_BYTES_A_VOXEL = 28
_BLOCK_BYTES = 2**26


def memory_bytes(voxels: int) -> int:
    """The most memory that :func:`postprocess` takes beside a label map of so many voxels, in bytes; for a price.

    It is reached where every voxel is a component of its own. Organs with strays take a fifth of it.
    """
    return voxels * _BYTES_A_VOXEL + _BLOCK_BYTES


def postprocess(postprocessing: Postprocessing, labels: LabelArray, deadline: float | None = None) -> LabelArray:
    """What ``nnunetv2.postprocessing.remove_connected_components.apply_postprocessing`` gives.

    Args:
        postprocessing: what is done.
        labels: (Z, Y, X) or (Y, X), uint8 or uint16, in C order; they are changed.
        deadline: ``time.monotonic()`` after which it is given up, before the next pass.

    Returns:
        The same array; another one, if the labels that are left are written in another type (nnU-Net's rule: uint8 up
        to 254).

    Raises:
        Deadline: the time ran out; the labels are partly done.
    """
    steps = [step for step in postprocessing.steps if step.labels]
    if not steps or not labels.size:
        return labels
    values: npt.NDArray[Any] = labels
    if max(step.background for step in steps) > np.iinfo(values.dtype).max:
        values = values.astype(np.uint16)
    for group in _groups(steps):
        check(deadline)
        _keep_largest(values, group)
    return written(values)


def _groups(steps: Sequence[KeepLargest]) -> Iterator[list[KeepLargest]]:
    """Steps that can be done at once: in each, no label is another one's, or what another one has put in its place."""
    group: list[KeepLargest] = []
    touched: set[int] = set()
    for step in steps:
        if not touched.isdisjoint(step.labels):
            yield group
            group, touched = [], set()
        group.append(step)
        touched |= {*step.labels, step.background}
    yield group


def _keep_largest(labels: npt.NDArray[Any], steps: Sequence[KeepLargest]) -> None:
    """Do steps that have nothing in common."""
    numbered = _numbered(labels, steps)
    box = _box(numbered)
    if box is None:
        return
    labels, numbered = labels[box], np.ascontiguousarray(numbered[box])
    components, count = cc3d.connected_components(numbered, connectivity=_CONNECTIVITY[labels.ndim], return_N=True)
    sizes = np.zeros(count + 1, np.int64)
    step_of = np.zeros(count + 1, numbered.dtype)
    for block in _blocks(labels):
        inside = numbered[block] != 0
        found = components[block][inside]
        counts = np.bincount(found)
        sizes[: len(counts)] += counts
        step_of[found] = numbered[block][inside]
    largest = np.zeros(len(steps) + 1, np.int64)
    np.maximum.at(largest, step_of, sizes)
    goes = sizes < largest[step_of]
    if not goes.any():
        return
    background = np.array([0, *(step.background for step in steps)], labels.dtype)
    for block in _blocks(labels):
        gone = numbered[block] != 0
        found = components[block][gone]
        going = goes[found]
        gone[gone] = going
        labels[block][gone] = background[step_of[found[going]]]


def _numbered(labels: npt.NDArray[Any], steps: Sequence[KeepLargest]) -> npt.NDArray[Any]:
    """Of every voxel, which step is about it, from 1; 0 if none."""
    table = np.zeros(LARGEST_LABEL + 1, np.min_scalar_type(len(steps)))
    for number, step in enumerate(steps, start=1):
        table[list(step.labels)] = number
    numbered = np.empty(labels.shape, table.dtype)
    for block in _blocks(labels):
        numbered[block] = table[labels[block]]
    return numbered


def _box(numbered: npt.NDArray[Any]) -> tuple[slice, ...] | None:
    """The part that holds all that is not 0; ``None`` if nothing is."""
    box = []
    for axis in range(numbered.ndim):
        others = tuple(other for other in range(numbered.ndim) if other != axis)
        occupied = np.flatnonzero(numbered.max(axis=others))
        if not len(occupied):
            return None
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def _blocks(labels: npt.NDArray[Any]) -> Iterator[slice]:
    """Parts of the first axis."""
    planes = max(1, _BLOCK_VOXELS * len(labels) // labels.size)
    yield from (slice(first, first + planes) for first in range(0, len(labels), planes))
