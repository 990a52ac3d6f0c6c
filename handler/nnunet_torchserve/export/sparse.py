"""Exact labels without all classes at full resolution: only what the corners of a cell leave open is interpolated.

A *cell* is the box between neighbouring voxels of the network's grid. If all its corners have one and the same certain
code (:mod:`.rules`), every voxel of the image in it has that code: no interpolation is needed. The others, *open*, are
interpolated in float32, all classes of a voxel by one weighted gather, and the few of those that float32 cannot tell
apart are settled in stock's own arithmetic. In blocks of the image, each on one thread.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from ..taps import Taps
from . import stock_arithmetic
from .canvas import Canvas
from .grid import Array
from .rules import MIXED, ArgMax, Codes, Precision, Regions
from .threads import in_threads

GRID_BLOCK = 2**16
"""Voxels of the network's grid that are encoded at a time: a few arrays of them, float32, fit a core's cache."""

IMAGE_BLOCK = 2**16
"""Voxels of the image that are painted at a time, and of the network's grid that they lie among."""

SAME_GRID_BLOCK = 2**17
"""Voxels at a time where nothing is resampled and a voxel costs little."""

_ELEMENTS = 2**20
"""Values that are interpolated at a time; 4 MiB, and at most eight times as many around them."""

Box = tuple[slice, slice, slice]


def export(
    logits: torch.Tensor,
    taps: Sequence[Taps],
    rule: ArgMax | Regions,
    canvas: Canvas,
    deadline: float | None = None,
) -> None:
    """Paint the labels that stock would give.

    Args:
        logits: (C, z, y, x) on the network's grid, on the CPU, any strides.
        taps: of each axis.
        rule: the model's.
        canvas: what to paint on.
        deadline: ``time.monotonic()`` after which it is given up.

    Raises:
        Deadline: the time ran out.
        NonFiniteLogits: a logit is NaN or infinite.
    """
    shape = [len(each) for each in taps]
    if all(each.is_identity for each in taps):

        def paint(box: Box) -> None:
            canvas.paint(box, rule.encode(logits[:, *box], certify=False)[0])

        in_threads(paint, boxes(shape, SAME_GRID_BLOCK), deadline)
        return
    codes, largest = encode(logits, rule, deadline=deadline)
    painter = _Painter(logits, codes, taps, rule, Precision.of(logits.dtype, largest), canvas)
    crowd = max(1.0, codes.size / math.prod(shape))  # voxels of the network's grid for one of a coarse image
    in_threads(painter.paint, boxes(shape, int(IMAGE_BLOCK / crowd)), deadline)


def encode(
    logits: torch.Tensor, rule: ArgMax | Regions, *, certify: bool = True, deadline: float | None = None
) -> tuple[Codes, float]:
    """Codes of every voxel of the network's grid, and the largest magnitude of their logits."""
    shape = logits.shape[1:]
    codes: Codes = np.empty(shape, rule.dtype)

    def encode_box(box: Box) -> float:
        codes[box], largest = rule.encode(logits[:, *box], certify=certify)
        return largest

    return codes, max(in_threads(encode_box, boxes(shape, GRID_BLOCK), deadline))


def boxes(shape: Sequence[int], voxels: int) -> Iterator[Box]:
    """Boxes of about so many voxels that cover a grid: whole planes, or rows of one."""
    depth, height, width = shape
    planes = max(1, voxels // (height * width))
    rows = height if planes > 1 else min(height, max(1, voxels // width))
    for start, row in itertools.product(range(0, depth, planes), range(0, height, rows)):
        yield slice(start, min(depth, start + planes)), slice(row, min(height, row + rows)), slice(0, width)


def cell_codes(codes: Codes, taps: Sequence[Taps]) -> Codes:
    """For each output of ``taps`` the code that its corners share, or :data:`~.rules.MIXED`."""
    for axis, each in enumerate(taps):
        lower = np.take(codes, each.lower, axis=axis)
        if each.interpolates:
            upper = np.take(codes, each.upper, axis=axis)
            # all bits are set where they differ
            lower |= np.negative(np.not_equal(lower, upper).astype(codes.dtype))
        codes = lower
    return codes


@dataclass(frozen=True, slots=True)
class _Painter:
    logits: torch.Tensor
    codes: Codes
    taps: Sequence[Taps]
    rule: ArgMax | Regions
    precision: Precision
    canvas: Canvas

    def paint(self, box: Box) -> None:
        """Paint one block of the image."""
        taps = [each[part] for each, part in zip(self.taps, box, strict=True)]
        low = [int(each.lower.min()) for each in taps]
        region = tuple(slice(start, int(each.upper.max()) + 1) for start, each in zip(low, taps, strict=True))
        taps = [each.shifted(start) for each, start in zip(taps, low, strict=True)]
        painted = cell_codes(self.codes[region], taps)
        flat = painted.reshape(-1)
        open_voxels = np.flatnonzero(flat == MIXED[self.rule.dtype])
        step = max(1, _ELEMENTS // self.rule.classes)
        for start in range(0, open_voxels.size, step):
            chosen = open_voxels[start : start + step]
            flat[chosen] = self._decide(region, taps, np.unravel_index(chosen, painted.shape))
        self.canvas.paint(box, painted)

    def _decide(self, region: Sequence[slice], taps: Sequence[Taps], voxels: Sequence[npt.NDArray[np.intp]]) -> Codes:
        """Codes of some voxels of a block, given by their positions along each axis."""
        corners = _Corners.of(self.logits[:, *region], taps, voxels)
        moving = [(each, at) for each, at in zip(taps, voxels, strict=True) if each.interpolates]
        sides = [[torch.from_numpy(side.astype(np.float32)[at]) for side in each.weights] for each, at in moving]
        ones = torch.ones(len(corners.indices))  # a block without an interpolated axis has one corner
        weights = torch.stack([math.prod(corner, start=ones) for corner in itertools.product(*sides)], 1)
        table = torch.empty(corners.logits.shape[::-1]).copy_(torch.from_numpy(corners.logits).t())
        values = functional.embedding_bag(
            torch.from_numpy(corners.indices), table, mode="sum", per_sample_weights=weights
        )
        codes, near = self.rule.decide(values, self.precision)
        decided: Codes = codes.numpy()
        if (close := np.flatnonzero(near.numpy())).size:
            exact = [[side[at[close]] for side in each.weights] for each, at in moving]
            values_there = stock_arithmetic.at_points(corners.logits, corners.indices[close], exact)
            decided[close] = self.rule.settle(values_there)
        return decided


@dataclass(frozen=True, slots=True)
class _Corners:
    """The network's voxels around some of the image, each once.

    Attributes:
        logits: (C, u), as they came.
        indices: int32 (n, corners), a column of ``logits`` for each corner of a voxel, the last axis fastest.
    """

    logits: Array
    indices: npt.NDArray[np.int32]

    @classmethod
    def of(cls, logits: torch.Tensor, taps: Sequence[Taps], voxels: Sequence[npt.NDArray[np.intp]]) -> _Corners:
        """Gather them from a region (C, z, y, x) of the grid."""
        classes, *shape = logits.shape
        steps = (shape[1] * shape[2], shape[2], 1)
        sides = []
        for each, step, at in zip(taps, steps, voxels, strict=True):
            sides.append([(end * step)[at] for end in each.ends])
        around = np.stack([z + y + x for z, y, x in itertools.product(*sides)], 1)
        needed = np.zeros(math.prod(shape), np.bool_)
        needed[around] = True
        number = np.cumsum(needed, dtype=np.int32) - 1

        memory = logits.numpy()
        strides = [stride // memory.itemsize for stride in memory.strides[1:]]
        reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        lines = logits.as_strided((classes, reach), (logits.stride(0), 1)).numpy()
        z, y, x = np.unravel_index(np.flatnonzero(needed), shape)
        offsets = z * strides[0] + y * strides[1] + x * strides[2]
        found = np.empty((classes, int(number[-1]) + 1), memory.dtype)
        for line, out in zip(lines, found, strict=True):
            np.take(line, offsets, out=out, mode="clip")  # "raise" would copy `out`
        return cls(found, number[around])
